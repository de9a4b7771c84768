//! What a model computes in.

use std::fmt;
use std::str::FromStr;

use lora_sb_kernels::DType;
use serde::{Deserialize, Serialize};

use super::named;
use crate::{Error, Result};

/// What activations are held and multiplied in.
///
/// With [`Bf16`](Precision::Bf16), what linear layers and attention read and write is `bf16` (8 bits of mantissa) and
/// their products are summed in `f32`; frozen weights that are not `bf16` in their file are rounded to it once, as
/// they are read. The residual stream, the statistics of norms, the loss, what is trained, its gradients and AdamW's
/// moments are `f32` with either.
///
/// ```
/// use lora_sb_tune::config::Precision;
///
/// assert_eq!("bfloat16".parse::<Precision>()?, Precision::Bf16);
/// assert_eq!(Precision::default().to_string(), "f32");
/// # Ok::<(), lora_sb_tune::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Everything in `f32`.
    #[default]
    F32,
    /// Activations and products in `bf16`, sums and what is trained in `f32`.
    Bf16,
}

impl Precision {
    /// Both, by the names that settings have for them.
    pub const ALL: [(&'static str, Precision); 2] = [("f32", Precision::F32), ("bf16", Precision::Bf16)];

    /// The type of a model's activations; see [`Model::dtype`](lora_sb_model::Model::dtype).
    pub fn dtype(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::Bf16,
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.dtype().name())
    }
}

impl FromStr for Precision {
    type Err = Error;

    /// Reads the names of settings and those that PyTorch has for the same.
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "f32" | "float32" => Ok(Precision::F32),
            "bf16" | "bfloat16" => Ok(Precision::Bf16),
            found => Err(named("dtype", "f32 or bf16", found)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_read_by_every_name_and_no_other_type_is() {
        for (name, precision) in Precision::ALL {
            assert_eq!((name.parse::<Precision>().unwrap(), precision.to_string()), (precision, name.into()));
            assert_eq!(serde_json::to_string(&precision).unwrap(), format!("{name:?}"));
        }
        assert_eq!("float32".parse::<Precision>().unwrap(), Precision::F32);
        for wrong in ["f16", "BF16 ", "", "fp8"] {
            let message = wrong.parse::<Precision>().unwrap_err().to_string();
            assert_eq!(message, format!("dtype: expected f32 or bf16, found {wrong:?}"));
        }
    }
}
