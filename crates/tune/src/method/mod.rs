//! The methods: what each trains, where it starts, and how much that is. One file a method.
//!
//! A method is an update of the weight `W0 [out, in]` at rank r, a start, and a list of what is trained. Its
//! arithmetic at a linear layer stands in [`adapter`](crate::adapter), which several methods share.
//!
//! | method | update | trained values of an `[out, in]` weight |
//! |---|---|---|
//! | `full` | W | out in, and all other parameters |
//! | `lora` | `W0 + (alpha/r) B A` | r (out + in) |
//! | `rslora` | `W0 + (alpha/sqrt r) B A` | r (out + in) |
//! | `pissa` | `W0 + s (B A - B0 A0)`, from W0's first singular vectors | r (out + in) |
//! | `dora` | `m (W0 + s B A) / norm of its rows` | r (out + in) + out |
//! | `lora-pro` | `W0 + s B A`, gradients bent towards the full one | r (out + in) |
//! | `lora-ga` | `W0 + s (B A - B0 A0)`, from the gradient's singular vectors | r (out + in) |
//! | `lora-xs` | `W0 + s B R A`, from W0's singular vectors | r^2 |
//! | `lora-sb` | `W0 + s B R A`, from the first update's singular vectors | r^2 |

pub mod dora;
pub mod full;
pub mod lora;
pub mod lora_ga;
pub mod lora_pro;
pub mod lora_sb;
pub mod lora_xs;
pub mod pissa;
pub mod rslora;
mod settings;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

pub use settings::{AdapterConfig, Bases, Convention, InitConfig};

/// What is trained of a weight `W0 [out, in]`, at rank r.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Every parameter of the model.
    Full,
    /// `W0 + (alpha/r) B A`, A and B trained (Hu et al., arXiv 2106.09685).
    Lora,
    /// `W0 + (alpha/sqrt r) B A`, A and B trained (Kalajdzievski, arXiv 2312.03732).
    #[serde(rename = "rslora")]
    RsLora,
    /// LoRA from the first singular vectors of W0 (Meng et al., arXiv 2404.02948).
    Pissa,
    /// `m (W0 + s B A) / norm of its rows`, m, A and B trained (Liu et al., arXiv 2402.09353).
    Dora,
    /// LoRA with gradients bent towards the full one (Wang et al., arXiv 2407.18242).
    LoraPro,
    /// LoRA from the singular vectors of the first gradient (Wang et al., arXiv 2407.05000).
    LoraGa,
    /// `W0 + s B R A`, R trained, B and A from the SVD of W0 (Bałazy et al., arXiv 2405.17604).
    LoraXs,
    /// `W0 + s B R A`, R trained, B and A from the SVD of the first update (arXiv 2411.19557).
    LoraSb,
}

/// How a method's adapter works at a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No adapter: the weights themselves.
    Weights,
    /// `B A`, both trained, perhaps less what they were at the start.
    Product,
    /// `B A` with a magnitude for each row.
    Magnitude,
    /// `B R A`, R trained.
    Latent,
}

impl Method {
    /// All methods, in the order of reports.
    pub const ALL: [Method; 9] = [
        Method::LoraSb,
        Method::LoraXs,
        Method::Lora,
        Method::RsLora,
        Method::Pissa,
        Method::Dora,
        Method::LoraPro,
        Method::LoraGa,
        Method::Full,
    ];

    /// The name in options and files.
    pub fn name(self) -> &'static str {
        match self {
            Method::Full => "full",
            Method::Lora => "lora",
            Method::RsLora => "rslora",
            Method::Pissa => "pissa",
            Method::Dora => "dora",
            Method::LoraPro => "lora-pro",
            Method::LoraGa => "lora-ga",
            Method::LoraXs => "lora-xs",
            Method::LoraSb => "lora-sb",
        }
    }

    /// How its adapter works.
    pub fn kind(self) -> Kind {
        match self {
            Method::Full => Kind::Weights,
            Method::Lora | Method::RsLora | Method::Pissa | Method::LoraPro | Method::LoraGa => Kind::Product,
            Method::Dora => Kind::Magnitude,
            Method::LoraXs | Method::LoraSb => Kind::Latent,
        }
    }

    /// Whether its update is taken relative to the adapter's own start, `B A - B0 A0`, so that it begins at W0.
    pub fn subtracts_start(self) -> bool {
        matches!(self, Method::Pissa | Method::LoraGa)
    }

    /// Values that the optimizer changes for one weight `[out, input]`. For [`Method::Full`] this is the weight
    /// itself; biases, norms and embeddings come on top.
    pub fn trained_values(self, rank: usize, (out, input): (usize, usize)) -> usize {
        match self.kind() {
            Kind::Weights => out * input,
            Kind::Product => rank * (out + input),
            Kind::Magnitude => rank * (out + input) + out,
            Kind::Latent => rank * rank,
        }
    }

    /// Values that a native adapter file keeps for one weight `[out, input]`: what is trained, and what is frozen
    /// and cannot be had from the base model.
    pub fn stored_values(self, rank: usize, (out, input): (usize, usize)) -> usize {
        let bases =
            if self.kind() == Kind::Latent || self.subtracts_start() { rank * (out + input) } else { 0 };
        bases + self.trained_values(rank, (out, input))
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
        let bare = |text: &str| text.to_ascii_lowercase().replace(['-', '_'], "");
        Method::ALL.into_iter().find(|method| bare(method.name()) == bare(text)).ok_or_else(|| {
            Error::Config {
                name: "method".into(),
                expected: format!("one of {}", Method::ALL.map(Method::name).join(", ")),
                found: format!("{text:?}"),
            }
        })
    }
}
