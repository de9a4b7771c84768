//! How many values are trained, and how many other methods would train: from a configuration alone.

use lora_sb_model::{Config, Parameter, Site};

use crate::method::Kind;
use crate::{Error, Method, Result, Targets, head};

/// Trained values of a run beside those of other methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterReport {
    /// Values of the base model, a classification head included.
    pub model: usize,
    /// Values that the run trains, but for a head beside an adapter.
    pub trained: usize,
    /// Values that LoRA would train at the same rank on the same targets.
    pub lora: usize,
    /// Values that full fine-tuning trains.
    pub full: usize,
}

impl ParameterReport {
    /// Counts from the architecture alone.
    pub fn new(config: &Config, method: Method, rank: usize, sites: &[Site]) -> Self {
        ParameterReport {
            model: config.parameter_count(),
            trained: trained(config, method, rank, sites),
            lora: trained(config, Method::Lora, rank, sites),
            full: config.parameter_count(),
        }
    }
}

fn trained(config: &Config, method: Method, rank: usize, sites: &[Site]) -> usize {
    match method.kind() {
        Kind::Weights => config.parameter_count(),
        _ => sites.iter().map(|&site| method.trained_values(rank, config.site_shape(site))).sum(),
    }
}

/// What each of several methods trains and stores on one model, at several ranks.
///
/// ```
/// use lora_sb_model::Config;
/// use lora_sb_tune::plan::ParameterTable;
/// use lora_sb_tune::{Method, Targets};
///
/// let config = Config::from_json(
///     br#"{"model_type": "llama", "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12,
///          "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}"#,
/// )?;
/// let targets = Targets::parse("q_proj,v_proj");
/// let table = ParameterTable::new(&config, &targets, &[], &[Method::LoraSb, Method::Lora], &[2, 4])?;
/// let trained: Vec<usize> = table.rows.iter().map(|row| row.trained).collect();
/// assert_eq!(trained, [4 * 2 * 2, 4 * 4 * 4, 4 * 2 * (8 + 8), 4 * 4 * (8 + 8)]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterTable {
    /// Values of the model, a classification head included.
    pub model: usize,
    /// Those of them that a task adds: the last layer of a classification head. The layer before it counts to the
    /// encoder, as the pooler in transformers' `BertModel` and `RobertaModel`. 0 of a language model.
    pub head: usize,
    /// The adapted layers.
    pub sites: usize,
    /// A line for each method and rank, in the order of the methods; full fine-tuning has one.
    pub rows: Vec<ParameterRow>,
}

/// One line of a [`ParameterTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterRow {
    /// The method.
    pub method: Method,
    /// Its rank; `None` for full fine-tuning.
    pub rank: Option<usize>,
    /// Values that the optimizer changes, `head` not counted.
    pub trained: usize,
    /// Values of a classification head that it changes besides: of the modules that are named, or, in full
    /// fine-tuning, [`ParameterTable::head`].
    pub head: usize,
    /// Values that what is saved holds: the native adapter and its head, or all of the model.
    pub stored: usize,
    /// Values of the model with the adapter on it.
    pub total: usize,
}

impl ParameterTable {
    /// Counts from the architecture alone; `modules_to_save` are the head's modules that are trained beside an
    /// adapter.
    ///
    /// # Errors
    /// An unknown target or module of the head; a rank of 0, or one that a target is too small for.
    pub fn new(
        config: &Config,
        targets: &Targets,
        modules_to_save: &[String],
        methods: &[Method],
        ranks: &[usize],
    ) -> Result<Self> {
        let sites = targets.resolve(config)?;
        let size = |parameter: &Parameter| config.parameter_shape(*parameter).iter().product::<usize>();
        let model = config.parameter_count();
        let last_layer =
            |parameter: &&Parameter| matches!(parameter, Parameter::Classifier | Parameter::ClassifierBias);
        let head: usize = config.parameters().iter().filter(last_layer).map(size).sum();
        let saved_head: usize = head::resolve(modules_to_save, config)?.iter().map(size).sum();
        let mut rows = Vec::new();
        for &method in methods {
            if method.kind() == Kind::Weights {
                let trained = model - head;
                rows.push(ParameterRow { method, rank: None, trained, head, stored: model, total: model });
                continue;
            }
            for &rank in ranks {
                // LoRA-GA is counted with the others even where it has no start.
                check_rank(config, &sites, Method::Lora, rank)?;
                let sum = |of: &dyn Fn((usize, usize)) -> usize| -> usize {
                    sites.iter().map(|&site| of(config.site_shape(site))).sum()
                };
                let stored = sum(&|shape| method.stored_values(rank, shape));
                rows.push(ParameterRow {
                    method,
                    rank: Some(rank),
                    trained: sum(&|shape| method.trained_values(rank, shape)),
                    head: saved_head,
                    stored: stored + saved_head,
                    total: model + stored,
                });
            }
        }
        Ok(ParameterTable { model, head, sites: sites.len(), rows })
    }
}

/// Checks that an adapter of that rank fits every target: a matrix has no more singular values than its smaller side,
/// and LoRA-GA takes twice as many as its rank.
///
/// # Errors
/// A rank of 0, or one that is too large for the smallest target, which is named.
pub fn check_rank(config: &Config, sites: &[Site], method: Method, rank: usize) -> Result<()> {
    let invalid = |expected: String| {
        let found = rank.to_string();
        Err(Error::Config { name: "rank".into(), expected, found })
    };
    if rank == 0 {
        return invalid("at least 1".into());
    }
    let side = |site: Site| config.site_shape(site).0.min(config.site_shape(site).1);
    let Some(&site) = sites.iter().min_by_key(|&&site| side(site)) else { return Ok(()) };
    let ((out, input), module) = (config.site_shape(site), config.module(site));
    if rank > side(site) {
        return Err(Error::RankTooLarge { rank, module, out, input });
    }
    if method == Method::LoraGa && 2 * rank > side(site) {
        return invalid(format!(
            "at most half the smaller side of {module} (out={out}, in={input}) for {method}"
        ));
    }
    Ok(())
}
