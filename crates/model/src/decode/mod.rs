//! Generating tokens: prompts that grow together, with a cache of keys and values.

mod cache;
mod decoder;
mod sampling;

use lora_sb_kernels::Generator;

pub(crate) use cache::cache_rows;
pub use decoder::Decoder;
pub use sampling::Sampling;

use crate::{Error, LinearHook, Model, Result};

/// How texts are generated.
#[derive(Clone, Debug)]
pub struct Generation {
    /// At most so many tokens for each prompt.
    pub max_new_tokens: usize,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Ids that end a text; they are not part of it.
    pub stop: Vec<u32>,
}

/// What follows a new token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The text goes on, unless it has ended by itself.
    Continue,
    /// The text ends with this token.
    Stop,
}

/// Continues every prompt; all of them advance together.
///
/// `generators` has one for each prompt, so that what is drawn for a prompt does not depend on the others beside it.
/// `on_token` is called with the prompt's index and each new token as it is chosen, and can end that text.
///
/// # Errors
/// Where the model is no decoder, a prompt is empty or has no generator, a setting is out of range, a logit is not
/// finite, or the model is not prepared for the longest prompt plus `max_new_tokens`.
pub fn generate(
    model: &Model,
    hook: &dyn LinearHook,
    prompts: &[Vec<u32>],
    options: &Generation,
    generators: &mut [Generator],
    on_token: &mut dyn FnMut(usize, u32) -> Next,
) -> Result<Vec<Vec<u32>>> {
    options.sampling.check()?;
    if generators.len() != prompts.len() {
        let message = format!("{} prompts with {} generators", prompts.len(), generators.len());
        return Err(Error::Generation { message });
    }
    let mut texts = vec![Vec::new(); prompts.len()];
    if options.max_new_tokens == 0 || prompts.is_empty() {
        return Ok(texts);
    }
    let mut decoder = Decoder::new(model, hook, prompts, options.max_new_tokens)?;
    let mut active: Vec<usize> = (0..prompts.len()).collect();
    let mut new: Vec<Vec<u32>> = prompts.to_vec();
    loop {
        let pieces: Vec<(usize, &[u32])> =
            active.iter().zip(&new).map(|(&index, ids)| (index, &ids[..])).collect();
        let logits = decoder.advance(&pieces)?; // [sequences, V]
        let logits = model.kernels.to_f32(&logits)?;
        let (mut still, mut chosen) = (Vec::new(), Vec::new());
        for (&index, logits) in active.iter().zip(logits.chunks_exact(model.config.vocab_size)) {
            let id = options.sampling.choose(logits, &mut generators[index], index)?;
            if options.stop.contains(&id) {
                continue;
            }
            texts[index].push(id);
            let next = on_token(index, id);
            if next == Next::Continue && texts[index].len() < options.max_new_tokens {
                still.push(index);
                chosen.push(vec![id]);
            }
        }
        (active, new) = (still, chosen);
        if active.is_empty() {
            return Ok(texts);
        }
    }
}
