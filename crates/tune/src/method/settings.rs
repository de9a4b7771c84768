//! The settings that decide where an adapter starts and how large its update is.

use std::fmt;
use std::str::FromStr;

use lora_sb_kernels::{Generator, Stream};
use serde::{Deserialize, Serialize};

use super::{Kind, Method, rslora};
use crate::{Error, Result, Targets};

/// An adapter as it is resolved, complete enough to make the same one again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterConfig {
    /// The method.
    pub method: Method,
    /// The rank r.
    pub rank: usize,
    /// The update is scaled by `s = lora_alpha / rank`, with [`Method::RsLora`] by `lora_alpha / sqrt(rank)`;
    /// alpha = rank gives the `s = 1` of LoRA-SB.
    pub lora_alpha: f64,
    /// The probability with which an element of the adapter's input is left out in training, the others being
    /// scaled up; 0 leaves none out.
    pub lora_dropout: f64,
    /// Which linear layers are adapted.
    pub target_modules: Targets,
    /// Where the adapter starts, as far as its method leaves a choice.
    pub init: InitConfig,
    /// Modules of a classification head that are trained in full beside the adapter: as in PEFT, those whose name
    /// is in the list or ends with `.` and a name of the list, and what they contain. Empty for a language model.
    pub modules_to_save: Vec<String>,
    /// The run's seed; each site draws from its own generator of it.
    pub seed: u64,
}

impl AdapterConfig {
    /// The scale s of the update.
    pub fn scale(&self) -> f32 {
        let scale = match self.method {
            Method::RsLora => rslora::scale(self.lora_alpha, self.rank),
            _ => self.lora_alpha / self.rank as f64,
        };
        scale as f32
    }

    /// Checks what can be checked without a model.
    ///
    /// # Errors
    /// A rank of 0, an alpha that is not a positive number, a dropout outside its range; where a gradient is read,
    /// an eta or a batch size that is not positive.
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
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return invalid("lora_dropout", "at least 0 and below 1", self.lora_dropout.to_string());
        }
        self.init.validate(self.method)
    }
}

/// Where B, R and A of the r x r family start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bases {
    /// From the first update `-eta sign(G)` of AdamW; R its singular values: LoRA-SB.
    Sb,
    /// From the first update `-eta G` of plain gradient descent; R its singular values.
    SbGradient,
    /// The bases of [`Bases::Sb`], R = 0.
    SbZero,
    /// B = U, A = S V^T of W0, R nearly 0: LoRA-XS.
    Xs,
    /// B = U, A = V^T of W0, R = 0.
    W0Orthonormal,
    /// Random orthonormal B and A, R = 0.
    RandomOrthonormal,
}

impl Bases {
    /// All of them.
    pub const ALL: [Bases; 6] = [
        Bases::Sb,
        Bases::SbGradient,
        Bases::SbZero,
        Bases::Xs,
        Bases::W0Orthonormal,
        Bases::RandomOrthonormal,
    ];

    /// The name in options and files.
    pub fn name(self) -> &'static str {
        match self {
            Bases::Sb => "sb",
            Bases::SbGradient => "sb-gradient",
            Bases::SbZero => "sb-zero",
            Bases::Xs => "xs",
            Bases::W0Orthonormal => "w0-orthonormal",
            Bases::RandomOrthonormal => "random-orthonormal",
        }
    }

    /// The start that a method of the r x r family is named for.
    pub fn of(method: Method) -> Bases {
        if method == Method::LoraXs { Bases::Xs } else { Bases::Sb }
    }

    /// Whether they come from a gradient on training examples.
    pub fn read_gradient(self) -> bool {
        matches!(self, Bases::Sb | Bases::SbGradient | Bases::SbZero)
    }
}

impl fmt::Display for Bases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Bases {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Bases::ALL.into_iter().find(|bases| bases.name() == text.replace('_', "-")).ok_or_else(|| {
            Error::Config {
                name: "init".into(),
                expected: format!("one of {}", Bases::ALL.map(Bases::name).join(", ")),
                found: format!("{text:?}"),
            }
        })
    }
}

/// Where an adapter starts, and how the gradient is estimated that it may start from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitConfig {
    /// The start of the r x r family; not read by the other methods.
    pub bases: Bases,
    /// How many training examples G is summed over.
    pub samples: usize,
    /// How their gradients are weighed.
    pub convention: Convention,
    /// The size of the simulated step: the learning rate of the first optimizer step. It scales R alone, and is not
    /// read by LoRA-GA.
    pub eta: f64,
    /// The most tokens of one packed micro-batch of the estimation (a longer sample is its own micro-batch).
    /// It bounds memory and does not change the result beyond rounding.
    pub max_tokens: usize,
    /// How many blocks the estimate takes at once; left out, as many as take no more memory than one at a time. More
    /// are faster, and the bits are the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocks_at_once: Option<usize>,
}

impl InitConfig {
    /// No estimate: for methods and starts that take none.
    pub const NONE: InitConfig = InitConfig {
        bases: Bases::Xs,
        samples: 0,
        convention: Convention::PerSample,
        eta: 0.0,
        max_tokens: 0,
        blocks_at_once: None,
    };

    /// Which of `total` examples the estimate is made from: distinct, in the data's order, drawn by `seed`.
    pub fn select(&self, total: usize, seed: u64) -> Vec<usize> {
        let mut chosen = Generator::new(seed, Stream::InitSamples, 0).permutation(total);
        chosen.truncate(self.samples);
        chosen.sort_unstable();
        chosen
    }

    fn validate(&self, method: Method) -> Result<()> {
        let update = method.kind() == Kind::Latent && self.bases.read_gradient();
        if !(update || method == Method::LoraGa) {
            return Ok(());
        }
        if update && !(self.eta.is_finite() && self.eta > 0.0) {
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
