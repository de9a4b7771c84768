//! Whether a written directory computes what the adapter computes that it was made from.
//!
//! The directory is read as any other program would get it, on base weights that are loaded anew, and both give their
//! logits for the same tokens. What may differ follows from how the values were rounded. With the largest logit |z|,
//! the largest change |z - z0| that the adapter makes to one, L blocks, the widest sum K of a layer, and `u` the unit of
//! rounding of the file (2^-24, 2^-9, 2^-12 for f32, bf16, f16):
//!
//! ```text
//! products summed in another order:   |z| 2^-20 sqrt(L K)
//! rounded factors of an update:       |z - z0| 16 u sqrt(L)
//! rounded weights, or DoRA's rows:    |z| 16 u sqrt(L)
//! ```
//!
//! The roots are how independent errors add up; 16 = 2^4 leaves room for the chance in them, and 2^-20 is 16 f32 units.

use std::path::Path;
use std::sync::Arc;

use lora_sb_kernels::{DType, Generator, Stream, Tensor};
use lora_sb_model::{
    Batch, Config, Frozen, LinearHook, LoadOptions, Model, Parameter, Positions, Sequence, Storage, Task,
    WeightFile,
};

use super::peft;
use crate::method::Kind;
use crate::{AdapterConfig, Error, Result, Tuned};

/// How many standard roundings are allowed.
const ROOM: f64 = 16.0;

/// What was compared, and how far it is apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Verification {
    /// All tokens of all sequences.
    pub tokens: usize,
    /// The largest difference of two logits.
    pub max_abs_logit_difference: f64,
    /// What rounding explains; a larger difference is an [`Error::Verification`].
    pub tolerance: f64,
    /// The largest logit of the adapter.
    pub max_abs_logit: f64,
    /// How far the adapter moves a logit from where the base model has it; where this is not above the tolerance, the
    /// comparison says nothing about the adapter.
    pub max_abs_logit_change: f64,
    /// What was found on the way, as what of the base model could not be checked.
    pub warnings: Vec<String>,
}

/// Compares a PEFT directory or a merged model with the adapter `tuned` that it was written from. `base` loads a fresh
/// copy of the base model for a PEFT directory; it is not called for a merged one.
///
/// # Errors
/// Logits that differ by more than the tolerance, or are not finite; a directory that cannot be read; tokens that the
/// model does not have.
pub fn verify(
    dir: &Path,
    tuned: &Tuned,
    sequences: &[Vec<u32>],
    base: &mut dyn FnMut() -> Result<Model>,
) -> Result<Verification> {
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
    let written = match dir.join(peft::MANIFEST).exists() {
        true => {
            let mut model = base()?;
            model.prepare(longest)?;
            exported(dir, model, sequences)?
        }
        false => merged(dir, &tuned.model, sequences, longest)?,
    };
    compare(dir, tuned, written, sequences)
}

/// Token ids to compare on where none are given: three sequences, one of a single token.
pub fn random_sequences(config: &Config, seed: u64) -> Vec<Vec<u32>> {
    let mut generator = Generator::new(seed, Stream::Sampling, 0);
    let room = match config.positions {
        Positions::Learned { offset } => config.max_position_embeddings - offset,
        Positions::Rotary { .. } => config.max_position_embeddings,
    };
    let mut sequence = |length: usize| {
        (0..length.min(room)).map(|_| generator.below(config.vocab_size) as u32).collect::<Vec<u32>>()
    };
    [31, 13, 1].map(&mut sequence).to_vec()
}

/// What a directory gives.
struct Written {
    logits: Vec<f32>,
    /// The unit of rounding of what the files hold.
    unit: f64,
    /// Whether whole weights were rounded, not only an update's factors.
    whole: bool,
    warnings: Vec<String>,
}

fn exported(dir: &Path, base: Model, sequences: &[Vec<u32>]) -> Result<Written> {
    let peft::Imported { tuned, warnings } = peft::import(dir, base)?;
    // A magnitude scales a whole row of the weight, and a head's weights are whole.
    let rounds_weights = |config: &AdapterConfig| {
        config.method.kind() == Kind::Magnitude || !config.modules_to_save.is_empty()
    };
    let file = WeightFile::open(&dir.join(peft::NAMES.tensors))?;
    let mut coarsest = unit(DType::F32);
    for name in file.names() {
        coarsest = file.get(&name)?.map_or(coarsest, |view| coarsest.max(unit(view.dtype)));
    }
    let (logits, whole) =
        (logits(&tuned.model, tuned.hook(), sequences)?, tuned.config().is_some_and(rounds_weights));
    Ok(Written { logits, unit: coarsest, whole, warnings })
}

fn merged(dir: &Path, base: &Model, sequences: &[Vec<u32>], longest: usize) -> Result<Written> {
    let task = Some(base.config().task).filter(|&task| task != Task::LanguageModel);
    let options = LoadOptions { task, ..LoadOptions::default() };
    let mut model = Model::load_with(dir, Arc::clone(base.kernels()), Storage::Mapped, options)?;
    let (own, other) = (base.config(), model.config());
    if (own.task, own.vocab_size) != (other.task, other.vocab_size) {
        let says = |config: &Config| {
            format!("{} with a vocabulary of {}", config.family.model_type(), config.vocab_size)
        };
        return Err(Error::File {
            path: dir.into(),
            message: format!("a {}, expected the adapter's base model, a {}", says(other), says(own)),
            hint: Some("give the directory that `merge` wrote from this adapter".into()),
        });
    }
    model.prepare(longest)?;
    let unit = unit(model.weight(Parameter::Embedding).map_or(DType::F32, Tensor::dtype));
    let logits = logits(&model, &Frozen, sequences)?;
    Ok(Written { logits, unit, whole: true, warnings: model.warnings().to_vec() })
}

/// Half the distance from 1 to the next number of a type.
fn unit(dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 => 2f64.powi(-9),
        DType::F16 => 2f64.powi(-12),
        _ => 2f64.powi(-24),
    }
}

fn compare(dir: &Path, tuned: &Tuned, written: Written, sequences: &[Vec<u32>]) -> Result<Verification> {
    let expected = logits(&tuned.model, tuned.hook(), sequences)?;
    let base = logits(&tuned.model, &Frozen, sequences)?;
    if !written.logits.iter().chain(&expected).all(|logit| logit.is_finite()) {
        return Err(Error::NotFinite { what: format!("a logit of {}", dir.display()) });
    }
    let largest = expected.iter().fold(0.0, |largest: f64, logit| largest.max(f64::from(logit.abs())));
    let change = distance(&expected, &base);
    let config = tuned.model.config();
    let blocks = config.num_hidden_layers as f64;
    let widest =
        tuned.model.sites().into_iter().map(|site| tuned.model.shape(site).1).max().unwrap_or(1) as f64;
    let summed = largest * 2f64.powi(-20) * (blocks * widest).sqrt();
    let rounded = if written.whole { largest } else { change } * ROOM * written.unit * blocks.sqrt();
    let difference = distance(&expected, &written.logits);
    let tolerance = summed + rounded;
    if difference > tolerance {
        return Err(Error::Verification { path: dir.into(), found: difference, tolerance, largest });
    }
    Ok(Verification {
        tokens: sequences.iter().map(Vec::len).sum(),
        max_abs_logit_difference: difference,
        tolerance,
        max_abs_logit: largest,
        max_abs_logit_change: change,
        warnings: written.warnings,
    })
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).fold(0.0, |largest, (a, b)| largest.max((f64::from(*a) - f64::from(*b)).abs()))
}

/// Of every token, or of every sequence.
fn logits(model: &Model, hook: &dyn LinearHook, sequences: &[Vec<u32>]) -> Result<Vec<f32>> {
    let untrained: Vec<Vec<bool>> = sequences.iter().map(|ids| vec![false; ids.len()]).collect();
    let pairs = sequences.iter().zip(&untrained);
    let packed: Vec<Sequence<'_>> =
        pairs.map(|(ids, untrained)| Sequence::text(ids, untrained, 0.0)).collect();
    let kernels = model.kernels();
    let batch = Batch::pack(kernels.as_ref(), &packed)?;
    Ok(kernels.to_f32(&model.logits(&batch, hook)?)?)
}
