//! What is trained, and the settings that decide where it starts.

use std::fmt;
use std::str::FromStr;

use lora_sb_kernels::{Generator, Stream};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, Targets};

/// What is trained of a weight `W0 [out, in]`, at rank r.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Every parameter of the model.
    Full,
    /// `W0 + s B A`, A and B trained (Hu et al., arXiv 2106.09685).
    Lora,
    /// `W0 + s B R A`, R trained, B and A from the SVD of W0 (Bałazy et al., arXiv 2405.17604).
    LoraXs,
    /// `W0 + s B R A`, R trained, B and A from the SVD of the first update (arXiv 2411.19557).
    LoraSb,
}

impl Method {
    /// All methods, in the order of reports.
    pub const ALL: [Method; 4] = [Method::LoraSb, Method::LoraXs, Method::Lora, Method::Full];

    /// The name in options and files.
    pub fn name(self) -> &'static str {
        match self {
            Method::Full => "full",
            Method::Lora => "lora",
            Method::LoraXs => "lora-xs",
            Method::LoraSb => "lora-sb",
        }
    }

    /// Values that the optimizer changes for one weight `[out, input]`. For [`Method::Full`] this is the weight
    /// itself; biases, norms and embeddings come on top.
    pub fn trained_values(self, rank: usize, (out, input): (usize, usize)) -> usize {
        match self {
            Method::Full => out * input,
            Method::Lora => rank * (out + input),
            Method::LoraXs | Method::LoraSb => rank * rank,
        }
    }

    /// Values that a native adapter file keeps for one weight `[out, input]`: the r x r family stores its frozen
    /// bases too.
    pub fn stored_values(self, rank: usize, (out, input): (usize, usize)) -> usize {
        match self {
            Method::Full | Method::Lora => self.trained_values(rank, (out, input)),
            Method::LoraXs | Method::LoraSb => rank * (out + input) + rank * rank,
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.to_ascii_lowercase().replace('_', "-").as_str() {
            "full" => Ok(Method::Full),
            "lora" => Ok(Method::Lora),
            "lora-xs" | "loraxs" => Ok(Method::LoraXs),
            "lora-sb" | "lorasb" => Ok(Method::LoraSb),
            _ => Err(Error::Config {
                name: "method".into(),
                expected: "one of lora-sb, lora-xs, lora, full".into(),
                found: format!("{text:?}"),
            }),
        }
    }
}

/// An adapter as it is resolved, complete enough to make the same one again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterConfig {
    /// The method.
    pub method: Method,
    /// The rank r.
    pub rank: usize,
    /// The update is scaled by `s = lora_alpha / rank`; alpha = rank gives the `s = 1` of LoRA-SB.
    pub lora_alpha: f64,
    /// Which linear layers are adapted.
    pub target_modules: Targets,
    /// How LoRA-SB estimates the first update; the other methods do not read it.
    pub init: InitConfig,
    /// The run's seed; each site draws from its own generator of it.
    pub seed: u64,
}

impl AdapterConfig {
    /// The scale `s = lora_alpha / rank`.
    pub fn scale(&self) -> f32 {
        (self.lora_alpha / self.rank as f64) as f32
    }

    /// Checks what can be checked without a model.
    ///
    /// # Errors
    /// A rank of 0, or an alpha that is not a positive number.
    pub fn validate(&self) -> Result<()> {
        let invalid = |name: &str, expected: &str, found: String| {
            Err(Error::Config { name: name.into(), expected: expected.into(), found })
        };
        if self.rank == 0 {
            return invalid("rank", "at least 1", "0".into());
        }
        if !(self.lora_alpha.is_finite() && self.lora_alpha > 0.0) {
            return invalid("lora_alpha", "a positive number", self.lora_alpha.to_string());
        }
        if self.method == Method::LoraSb {
            self.init.validate()?;
        }
        Ok(())
    }
}

/// How LoRA-SB estimates the first full-fine-tuning update `-eta sign(G)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitConfig {
    /// How many training examples G is summed over.
    pub samples: usize,
    /// How their gradients are weighed.
    pub convention: Convention,
    /// The size of the simulated step: the learning rate of the first optimizer step. It scales R alone.
    pub eta: f64,
    /// The most tokens of one packed micro-batch of the estimation (a longer sample is its own micro-batch).
    /// It bounds memory and does not change the result beyond rounding.
    pub max_tokens: usize,
}

impl InitConfig {
    /// No estimate: for the methods that take none. LoRA-SB refuses it.
    pub const NONE: InitConfig =
        InitConfig { samples: 0, convention: Convention::PerSample, eta: 0.0, max_tokens: 0 };

    /// Which of `total` examples the estimate is made from: distinct, in the data's order, drawn by `seed`.
    pub fn select(&self, total: usize, seed: u64) -> Vec<usize> {
        let mut chosen = Generator::new(seed, Stream::InitSamples, 0).permutation(total);
        chosen.truncate(self.samples);
        chosen.sort_unstable();
        chosen
    }

    fn validate(&self) -> Result<()> {
        if !(self.eta.is_finite() && self.eta > 0.0) {
            let (name, found) = ("init eta".into(), self.eta.to_string());
            return Err(Error::Config { name, expected: "a positive number".into(), found });
        }
        if self.convention == (Convention::Reference { batch_size: 0 }) {
            let name = "init batch size".into();
            return Err(Error::Config { name, expected: "at least 1".into(), found: "0".into() });
        }
        Ok(())
    }
}

/// How the gradients of the initialisation's samples are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Convention {
    /// `G = sum over samples of d(mean loss over the sample's labelled tokens)`: every sample weighs the same,
    /// as the paper's equation 8 says, and the batch size has no part in it.
    PerSample,
    /// The authors' code: `G = sum over batches of d(mean loss over the batch's labelled tokens) / (samples in
    /// the batch)`, so that a long answer weighs more inside its batch and a short last batch weighs more.
    Reference {
        /// Samples of one batch, in the data's order.
        batch_size: usize,
    },
}
