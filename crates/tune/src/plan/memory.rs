//! The memory of a run, added up from the architecture and the largest batches.
//!
//! | phase | beside the weights and the process itself |
//! |---|---|
//! | initialisation (LoRA-SB) | the kept block inputs, one block's gradients, the adapter so far, and one micro-batch's or one factorisation's working set |
//! | training | what is trained, with gradient and two moments; A and B; the activations of the largest micro-batch |
//! | evaluation | the same without activations, and one block's working set of the largest batch |

use lora_sb_data::Example;
use lora_sb_kernels::linalg::SvdOptions;
use lora_sb_model::{Config, Recompute, Site, Storage, memory};

use super::parameters::trained;
use crate::Method;
use crate::eval::labelled_tokens;

/// Bytes of a trained, kept or computed value.
const F32: usize = 4;

/// Bytes that the process takes beside weights and tensors: program and threads (14 MiB measured with two
/// threads and a model of a few kilobytes), and room for a tokenizer and the examples.
pub const PROCESS_OVERHEAD: usize = 24 << 20;

/// The size of a packed batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchSize {
    /// T.
    pub tokens: usize,
    /// Tokens whose prediction is in the loss.
    pub labelled: usize,
}

impl BatchSize {
    /// Grows to the size of a batch of `examples`, where that is larger.
    pub fn include<'a>(&mut self, examples: impl IntoIterator<Item = &'a Example>) {
        let mut found = BatchSize::default();
        for example in examples {
            found.tokens += example.ids.len();
            found.labelled += labelled_tokens(example);
        }
        self.tokens = self.tokens.max(found.tokens);
        self.labelled = self.labelled.max(found.labelled);
    }
}

/// What the memory of a run depends on.
#[derive(Clone, Copy, Debug)]
pub struct MemoryRequest<'a> {
    /// The architecture.
    pub config: &'a Config,
    /// How its weights are held.
    pub storage: Storage,
    /// Bytes of a weight's element in its file.
    pub file_element: usize,
    /// What is trained.
    pub method: Method,
    /// The rank.
    pub rank: usize,
    /// The adapted layers.
    pub sites: &'a [Site],
    /// What the model keeps for its backward pass.
    pub recompute: Recompute,
    /// The largest micro-batch of training; see [`largest_micro_batch`](super::largest_micro_batch).
    pub train: BatchSize,
    /// The largest batch of an evaluation.
    pub evaluation: BatchSize,
    /// LoRA-SB's initialisation: tokens of all its samples, and its largest micro-batch.
    pub init: Option<(usize, BatchSize)>,
}

/// Bytes by what they are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The base model's weights; mapped ones count in full, since all of them are read.
    pub weights: usize,
    /// The frozen A and B.
    pub frozen: usize,
    /// Values that are trained beside the base model's: R, or LoRA's A and B.
    pub trained: usize,
    /// Their gradients.
    pub gradients: usize,
    /// AdamW's two moments.
    pub optimizer: usize,
    /// Activations of the largest micro-batch, the adapter's and the head's included.
    pub activations: usize,
    /// Working set of the largest evaluation batch.
    pub evaluation: usize,
    /// What the initialisation takes at its largest beside the weights, what it has made so far included.
    pub initialisation: usize,
    /// The process itself.
    pub process: usize,
}

impl MemoryPlan {
    /// Adds up a run.
    pub fn new(request: &MemoryRequest<'_>) -> Self {
        let MemoryRequest { config, method, rank, sites, recompute, train, evaluation, .. } = *request;
        let values = trained(config, method, rank, sites);
        let stored: usize =
            sites.iter().map(|&site| method.stored_values(rank, config.site_shape(site))).sum();
        let (trained, frozen) = match method {
            // The trained values are the model's own weights.
            Method::Full => (0, 0),
            _ => (F32 * values, F32 * (stored - values)),
        };
        MemoryPlan {
            weights: memory::weights(config, request.storage, request.file_element),
            frozen,
            trained,
            gradients: F32 * values,
            optimizer: 2 * F32 * values,
            activations: memory::activations(config, train.tokens, train.labelled, recompute)
                + hook_saved(request),
            evaluation: memory::block_saved(config, evaluation.tokens)
                + memory::block_temporary(config, evaluation.tokens)
                    .max(memory::head(config, evaluation.labelled)),
            initialisation: request.init.map_or(0, |(tokens, batch)| initialisation(request, tokens, batch)),
            process: PROCESS_OVERHEAD,
        }
    }

    /// Bytes of the initialisation at its largest.
    pub fn init_peak(&self) -> usize {
        self.process + self.weights + self.initialisation
    }

    /// Bytes of training at its largest.
    pub fn train_peak(&self) -> usize {
        let state = self.frozen + self.trained + self.gradients + self.optimizer;
        self.process + self.weights + state + self.activations.max(self.evaluation)
    }

    /// Bytes of the run at its largest.
    pub fn peak(&self) -> usize {
        self.init_peak().max(self.train_peak())
    }
}

/// The `[T, r]` product that each site keeps: of all blocks, or of the one at hand where blocks are recomputed.
fn hook_saved(request: &MemoryRequest<'_>) -> usize {
    if request.method == Method::Full {
        return 0;
    }
    let layers = request.config.num_hidden_layers;
    let in_layer = |layer| request.sites.iter().filter(|site| site.layer == layer).count();
    let sites = match request.recompute {
        Recompute::None => request.sites.len(),
        Recompute::Block => (0..layers).map(in_layer).max().unwrap_or(0),
    };
    F32 * request.train.tokens * request.rank * sites
}

/// The largest moment of the streamed initialisation; blocks go from the last to the first. As it goes, the
/// kept inputs become fewer and the adapter grows.
fn initialisation(request: &MemoryRequest<'_>, tokens: usize, batch: BatchSize) -> usize {
    let MemoryRequest { config, method, rank, sites, .. } = *request;
    let layers = config.num_hidden_layers;
    let stream = F32 * tokens * config.hidden_size; // one [T, D] of all samples
    let block = memory::block_saved(config, batch.tokens) + memory::block_temporary(config, batch.tokens);
    let head = memory::head(config, batch.labelled) + F32 * batch.tokens * config.hidden_size;
    let lowest = sites.iter().map(|site| site.layer).min().unwrap_or(0);
    let mut adapter = 0;
    let mut largest = (layers - lowest) * stream + stream + block.max(head);
    for layer in (lowest..layers).rev() {
        let shapes: Vec<_> =
            sites.iter().filter(|site| site.layer == layer).map(|&site| config.site_shape(site)).collect();
        let gradients: usize = shapes.iter().map(|(out, input)| F32 * out * input).sum();
        let kept = (layer - lowest) * stream + stream + adapter;
        let made: usize = shapes.iter().map(|&shape| F32 * method.stored_values(rank, shape)).sum();
        let factorising = shapes.iter().map(|&shape| factorisation(shape, rank)).max().unwrap_or(0);
        // Each site's gradient goes as its factors come, so the two do not add up.
        largest = largest.max(kept + gradients + block.max(factorising));
        adapter += made;
        largest = largest.max(kept + made);
    }
    largest
}

/// Working set of one truncated SVD: the smaller side's Gram matrix and the iterated vectors, five times on the
/// smaller side (vectors, images, and the filter's three) and once on the larger.
fn factorisation((out, input): (usize, usize), rank: usize) -> usize {
    let (small, large) = (out.min(input), out.max(input));
    let block = (rank + ((rank as f64 * SvdOptions::default().oversampling) as usize).max(8)).min(small);
    F32 * (small * small + 5 * block * small + block * large)
}
