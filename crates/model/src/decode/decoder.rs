//! Texts that grow token by token.

use lora_sb_kernels::{Mask, Tensor};

use super::cache::{LayerCache, Layout, Piece, Step};
use crate::attention::Attend;
use crate::config::{Positions, Task};
use crate::{Error, LinearHook, Model, Result};

/// Texts that grow, with the keys and values of what they already hold.
pub struct Decoder<'a> {
    model: &'a Model,
    hook: &'a dyn LinearHook,
    /// One for each mask that a block has.
    layouts: Vec<Layout>,
    /// One for each block, with the number of its layout.
    caches: Vec<(usize, LayerCache)>,
    texts: Vec<Text>,
}

/// How many tokens a text has and may have.
#[derive(Clone, Copy, Debug)]
struct Text {
    length: usize,
    room: usize,
}

impl<'a> Decoder<'a> {
    /// Room for every prompt and `max_new_tokens` behind it; nothing is computed yet.
    ///
    /// # Errors
    /// Where the model is no decoder, a prompt is empty, the model is not prepared for so many positions, or the
    /// device has no memory for the cache.
    pub fn new(
        model: &'a Model,
        hook: &'a dyn LinearHook,
        prompts: &[Vec<u32>],
        max_new_tokens: usize,
    ) -> Result<Decoder<'a>> {
        check_decoder(model)?;
        if let Some(index) = prompts.iter().position(Vec::is_empty) {
            let message = format!("prompt {index} has no tokens; give at least one");
            return Err(Error::Generation { message });
        }
        let rooms: Vec<usize> =
            prompts.iter().map(|prompt| prompt.len().saturating_add(max_new_tokens)).collect();
        model.check_positions(rooms.iter().copied().max().unwrap_or(0))?;
        let (mut layouts, mut caches) = (Vec::<Layout>::new(), Vec::new());
        for block in &model.config.blocks {
            let known = layouts.iter().position(|layout| layout.mask == block.mask);
            let index = known.unwrap_or_else(|| {
                layouts.push(Layout::new(block.mask, &rooms));
                layouts.len() - 1
            });
            caches.push((index, LayerCache::new(model, &layouts[index])?));
        }
        let texts = rooms.into_iter().map(|room| Text { length: 0, room }).collect();
        Ok(Decoder { model, hook, layouts, caches, texts })
    }

    /// Appends new tokens to some of the texts, given by index; returns the logits `[pieces, V]` that follow the
    /// last of each. The first call brings the prompts.
    ///
    /// # Errors
    /// Where a text is unknown, named twice, given no token or more than it has room for.
    pub fn advance(&mut self, pieces: &[(usize, &[u32])]) -> Result<Tensor> {
        let (model, hook) = (self.model, self.hook);
        let upload = |values: &[u32]| model.kernels.from_u32(values, &[values.len()]);
        let grown = self.grow(pieces)?;
        let steps: Vec<Step> =
            self.layouts.iter().map(|layout| layout.step(model, &grown)).collect::<Result<_>>()?;
        let ids: Vec<u32> = pieces.iter().flat_map(|(_, ids)| ids.iter().copied()).collect();
        let positions: Vec<u32> =
            grown.iter().flat_map(|piece| piece.held as u32..(piece.held + piece.new) as u32).collect();
        let positions = upload(&positions)?; // [T]

        let ends = grown.iter().scan(0, |end, piece| {
            *end += piece.new as u32;
            Some(*end - 1)
        });
        let ends = upload(&ends.collect::<Vec<_>>())?; // [pieces]

        let mut x = model.lookup(&upload(&ids)?)?; // [T, D]; of the last block [pieces, D]
        for (layer, (layout, cache)) in self.caches.iter_mut().enumerate() {
            let attend: Attend<'_> = &mut |q, k, v| cache.attend(model, layer, &steps[*layout], q, k, v);
            (x, _) = model.block(layer, x, &positions, attend, model.read_behind(layer, &ends), hook)?;
        }
        model.project(x)
    }

    /// Checks the pieces, and counts their tokens as held.
    fn grow(&mut self, pieces: &[(usize, &[u32])]) -> Result<Vec<Piece>> {
        let mut grown = Vec::with_capacity(pieces.len());
        for (order, &(index, ids)) in pieces.iter().enumerate() {
            let twice = pieces[..order].iter().any(|&(earlier, _)| earlier == index);
            let text = self
                .texts
                .get(index)
                .filter(|text| !twice && !ids.is_empty() && text.length + ids.len() <= text.room);
            let Some(text) = text else {
                let message =
                    format!("{} new tokens for sequence {index}: no room, or no such sequence", ids.len());
                return Err(Error::Generation { message });
            };
            grown.push(Piece { text: index, held: text.length, new: ids.len() });
        }
        grown.iter().for_each(|piece| self.texts[piece.text].length += piece.new);
        Ok(grown)
    }
}

/// A model generates if it predicts tokens, each from those before it.
fn check_decoder(model: &Model) -> Result<()> {
    let config = &model.config;
    let causal = config.blocks.iter().all(|block| block.mask != Mask::Full);
    let rotary = matches!(config.positions, Positions::Rotary { .. });
    if config.task == Task::LanguageModel && causal && rotary {
        return Ok(());
    }
    let family = config.family.model_type();
    let message =
        format!("a `{family}` model reads texts and writes none; a decoder such as Llama is needed");
    Err(Error::Generation { message })
}
