//! The rotation's keys: `rope_theta` and `rope_scaling` up to transformers 4, `rope_parameters` from 5 on.

use lora_sb_kernels::RopeScaling;

use super::Fields;
use crate::Result;
use crate::config::Rotation;

/// Theta where no file says one.
const THETA: f64 = 10_000.0;

/// `layer_types` by which Gemma 3 tells its two rotations apart; the first is that of rotation 0.
const LAYER_TYPES: [&str; 2] = ["full_attention", "sliding_attention"];

/// One rotation for all blocks and whole heads.
pub(super) fn read(fields: &Fields) -> Result<Rotation> {
    let (rotation, factor) = with_factor(fields)?;
    match factor {
        Some((holder, factor)) if factor != 1.0 => {
            Err(holder.mismatch("partial_rotary_factor", "1: this family rotates whole heads"))
        }
        _ => Ok(rotation),
    }
}

/// One rotation for all blocks, and how many elements of a head of E it turns, by `partial_rotary_factor`.
pub(super) fn read_partial(fields: &Fields, head_dim: usize) -> Result<(Rotation, usize)> {
    let (rotation, factor) = with_factor(fields)?;
    let Some((holder, factor)) = factor else { return Ok((rotation, head_dim)) };
    let size = (head_dim as f64 * factor) as usize;
    if size == 0 || size > head_dim || !size.is_multiple_of(2) {
        let expected = format!("a part of head_dim = {head_dim} that is even");
        return Err(holder.mismatch("partial_rotary_factor", &expected));
    }
    Ok((rotation, size))
}

/// The rotation and, where there is one, the partial factor with the object it stands in.
fn with_factor(fields: &Fields) -> Result<(Rotation, Option<(Fields, f64)>)> {
    // transformers 5 prefers `rope_scaling`, if it says anything, as 4 knows nothing else.
    let scaling = fields.inner("rope_scaling")?.filter(|scaling| !scaling.object().is_empty());
    let Some(inner) = (match scaling {
        Some(scaling) => Some(scaling),
        None => fields.inner("rope_parameters")?,
    }) else {
        let theta = fields.positive("rope_theta")?.unwrap_or(THETA);
        let factor = fields.positive("partial_rotary_factor")?.map(|factor| (fields.clone(), factor));
        return Ok((Rotation { theta, scaling: RopeScaling::Default }, factor));
    };
    for layer_type in LAYER_TYPES {
        inner.absent(layer_type, "one rotation for all layers")?;
    }
    let theta = match inner.positive("rope_theta")? {
        Some(theta) => theta,
        None => fields.positive("rope_theta")?.unwrap_or(THETA),
    };
    let factor = match inner.positive("partial_rotary_factor")? {
        Some(factor) => Some((inner.clone(), factor)),
        None => fields.positive("partial_rotary_factor")?.map(|factor| (fields.clone(), factor)),
    };
    Ok((Rotation { theta, scaling: scaling_of(&inner)? }, factor))
}

/// One rotation for the blocks that see all, and one for those that slide, with theta's defaults.
///
/// Up to transformers 4 these are `rope_theta` with `rope_scaling`, and `rope_local_base_freq`, never scaled;
/// from 5 on `rope_parameters` has an object for each.
pub(super) fn read_by_layer_type(fields: &Fields, defaults: [f64; 2]) -> Result<Vec<Rotation>> {
    let parameters = fields.inner("rope_parameters")?;
    if let Some(parameters) = &parameters
        && let Some(other) = parameters.object().keys().find(|key| !LAYER_TYPES.contains(&key.as_str()))
    {
        return Err(parameters.mismatch(other, "one object for each of the layer types"));
    }
    let keys = ["rope_theta", "rope_local_base_freq"];
    let mut rotations = Vec::new();
    for ((layer_type, key), default) in LAYER_TYPES.into_iter().zip(keys).zip(defaults) {
        let inner = match &parameters {
            Some(parameters) => parameters.inner(layer_type)?,
            None => None,
        };
        let (theta, scaling) = match &inner {
            Some(inner) => (inner.positive("rope_theta")?, scaling_of(inner)?),
            None => (None, RopeScaling::Default),
        };
        let theta = match theta {
            Some(theta) => theta,
            None => fields.positive(key)?.unwrap_or(default),
        };
        rotations.push(Rotation { theta, scaling });
    }
    if let Some(scaling) = fields.inner("rope_scaling")? {
        rotations[0].scaling = scaling_of(&scaling)?;
    }
    Ok(rotations)
}

fn scaling_of(scaling: &Fields) -> Result<RopeScaling> {
    // `type` is the older name of `rope_type`.
    let key = if scaling.text("rope_type")?.is_some() { "rope_type" } else { "type" };
    match scaling.text(key)? {
        None | Some("default") => Ok(RopeScaling::Default),
        Some("linear") => Ok(RopeScaling::Linear { factor: scaling.required_positive("factor")? }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: scaling.required_positive("factor")?,
            low_frequency_factor: scaling.required_positive("low_freq_factor")?,
            high_frequency_factor: scaling.required_positive("high_freq_factor")?,
            original_context: scaling.required_positive("original_max_position_embeddings")?,
        }),
        Some(_) => Err(scaling.mismatch(key, "\"default\", \"linear\" or \"llama3\"")),
    }
}
