//! The crate's error.

use std::path::PathBuf;

use crate::config::ByteSize;
use crate::plan::MemoryPlan;

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a model and its fine-tuned self.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation or a device failed.
    #[error(transparent)]
    Kernels(#[from] lora_sb_kernels::Error),
    /// The model failed, or its files are not what they should be.
    #[error(transparent)]
    Model(#[from] lora_sb_model::Error),
    /// The data failed.
    #[error(transparent)]
    Data(#[from] lora_sb_data::Error),
    /// A setting outside its range.
    #[error("{name}: expected {expected}, found {found}")]
    Config {
        /// The setting.
        name: String,
        /// Its range.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A target module that the model does not have.
    #[error("target_modules: the model has no linear layer named {name:?}")]
    UnknownTarget {
        /// The name as it was given.
        name: String,
        /// Names of the model that are spelt alike, the nearest first.
        near: Vec<String>,
        /// The last names of all linear layers.
        known: Vec<String>,
    },
    /// A rank that a target's weight cannot have.
    #[error("rank {rank} is larger than the smaller side of {module} (out={out}, in={input})")]
    RankTooLarge {
        /// The rank.
        rank: usize,
        /// The first module that is too small.
        module: String,
        /// Its rows.
        out: usize,
        /// Its columns.
        input: usize,
    },
    /// The initialisation has nothing to take a gradient of.
    #[error("none of the {samples} initialisation samples has a labelled token")]
    NoLabelledSample {
        /// How many samples were given.
        samples: usize,
    },
    /// A number that is NaN or infinite.
    #[error("{what} is not finite")]
    NotFinite {
        /// What was computed, with the module or the step.
        what: String,
    },
    /// A tensor that is missing from a file, too many in it, or of another shape or type.
    #[error("{file}: tensor {tensor}: expected {expected}, found {found}")]
    Tensor {
        /// The file, or what the tensors were handed in for.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// What was expected of it.
        expected: String,
        /// What was found.
        found: String,
    },
    /// An adapter made for another base model.
    #[error("{}: the adapter belongs to the base model {expected}, found {found}", path.display())]
    BaseMismatch {
        /// The adapter's directory.
        path: PathBuf,
        /// The fingerprint that the adapter was trained on.
        expected: String,
        /// The fingerprint of the model at hand.
        found: String,
    },
    /// A run that takes more memory than there is for it, however it is laid out.
    #[error(
        "the run takes {} at its peak, {} more than the {} that there are for it",
        ByteSize(plan.peak()).rounded(),
        ByteSize(plan.peak().saturating_sub(*limit)).rounded(),
        ByteSize(*limit).rounded()
    )]
    DoesNotFit {
        /// What it takes where it takes least.
        plan: Box<MemoryPlan>,
        /// Bytes that it may take.
        limit: usize,
    },
    /// A file that cannot be read or written.
    #[error("{}: {message}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What failed.
        message: String,
        /// How to mend it.
        hint: Option<String>,
    },
    /// A loss or gradient that is NaN or infinite, which stops a training run before its step is taken.
    #[error("step {step}: the {quantity} is {found}; {}", name_examples(examples))]
    NotFiniteStep {
        /// The optimizer step, counted from 1.
        step: usize,
        /// What was computed.
        quantity: &'static str,
        /// Its value.
        found: f64,
        /// The examples of the micro-batch that gave it.
        examples: Vec<lora_sb_data::Location>,
        /// Where the state before the step is saved, or why it could not be.
        saved: String,
    },
    /// A run resumed with another plan than it was started with.
    #[error("the run was started with another plan: {}", changes.iter().map(PlanChange::to_string).collect::<Vec<_>>().join("; "))]
    PlanChanged {
        /// Every value that differs.
        changes: Vec<PlanChange>,
    },
    /// Adapters that have no common average.
    #[error("{} and {} cannot be averaged: {reason}", first.display(), second.display())]
    Average {
        /// The directory of the first adapter.
        first: PathBuf,
        /// That of the one that does not fit to it.
        second: PathBuf,
        /// What is not alike, with the module.
        reason: String,
    },
    /// A written adapter or model that does not compute what it was made from computes.
    #[error(
        "{}: the logits differ by up to {found:.3e} from those of the adapter, more than the {tolerance:.3e} that \
         rounding explains (the largest logit is {largest:.3e})",
        path.display()
    )]
    Verification {
        /// The directory.
        path: PathBuf,
        /// The largest difference.
        found: f64,
        /// What is allowed.
        tolerance: f64,
        /// The largest logit.
        largest: f64,
    },
    /// An adapter with a feature that is not supported here.
    #[error("{}: {feature} is not supported", path.display())]
    Unsupported {
        /// The file that asks for it.
        path: PathBuf,
        /// The feature with its value.
        feature: String,
        /// What can be done instead.
        hint: String,
    },
}

/// A value of a run's plan that differs from the one the run was started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanChange {
    /// The value's name.
    pub key: String,
    /// What the run was started with.
    pub old: String,
    /// What was given now.
    pub new: String,
}

impl std::fmt::Display for PlanChange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}, now {}", self.key, self.old, self.new)
    }
}

fn name_examples(examples: &[lora_sb_data::Location]) -> String {
    let names: Vec<String> = examples.iter().map(ToString::to_string).collect();
    format!("the micro-batch holds {}", names.join(", "))
}

impl Error {
    /// What the user can do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Kernels(error) => error.hint(),
            Error::Model(error) => error.hint(),
            Error::Data(error) => error.hint(),
            Error::UnknownTarget { near, known, .. } => Some(match near.first() {
                Some(_) => format!("did you mean {}? The model has {}", near.join(" or "), known.join(", ")),
                None => format!("the model has {}; `all-linear` takes them all", known.join(", ")),
            }),
            Error::RankTooLarge { out, input, .. } => Some(format!(
                "take a rank of at most {}, or leave the module out of the targets",
                out.min(input)
            )),
            Error::NoLabelledSample { .. } => Some(
                "take more samples, or check that their answers are not cut off by the maximum length".into(),
            ),
            Error::Tensor { .. } => {
                Some("the file was not written for this adapter, or not to its end".into())
            }
            Error::BaseMismatch { .. } => Some("give the model that the adapter was trained on".into()),
            Error::DoesNotFit { .. } => Some(
                "lower per_device_train_batch_size (and raise gradient_accumulation_steps by as much), max_length or \
                 rank, or compute in dtype bf16; a larger memory_limit is believed"
                    .into(),
            ),
            Error::File { hint, .. } => hint.clone(),
            Error::NotFiniteStep { saved, .. } => Some(format!(
                "lower learning_rate, raise warmup_steps or lower max_grad_norm, and look at these examples; {saved}"
            )),
            Error::PlanChanged { .. } => Some(format!(
                "give the old values, or start a new run in another directory; only {} may change",
                crate::config::CHANGEABLE_ON_RESUME.join(", ")
            )),
            Error::Unsupported { hint, .. } => Some(hint.clone()),
            Error::Average { .. } => Some(
                "adapters share A and B where they were trained from one start: the same base, seed, settings and \
                 initialisation samples"
                    .into(),
            ),
            Error::Verification { .. } => {
                Some("do not use it: check that the base model is the adapter's, and write it again".into())
            }
            Error::NotFinite { .. } => Some("look for NaN in the model's or the adapter's files; take them from their source again".into()),
            Error::Config { .. } => None,
        }
    }

    /// A failed read or write.
    pub(crate) fn io(path: impl Into<PathBuf>, action: &str, error: std::io::Error) -> Self {
        let hint = (error.kind() == std::io::ErrorKind::NotFound).then(|| "check the path".to_owned());
        Error::File { path: path.into(), message: format!("cannot be {action}: {error}"), hint }
    }
}
