//! Generating tokens: a cache of keys and values, greedy choice or sampling.

use lora_sb_kernels::{Generator, Segments, Tensor};

use crate::{Error, LinearHook, Model, Parameter, Projection, Result};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampling {
    /// The likeliest; of equals, the one with the lowest id.
    Greedy,
    /// Drawn at random from what the limits leave, which are applied in this order.
    Random {
        /// The logits are divided by it; above 0.
        temperature: f64,
        /// Only the `k` likeliest, at least 1.
        top_k: Option<usize>,
        /// Only the likeliest that together reach this probability; in (0, 1].
        top_p: Option<f64>,
    },
}

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

/// Continues every prompt; all of them advance together.
///
/// `on_token` is called with the prompt's index and each new token as it is chosen.
///
/// # Errors
/// Where a prompt is empty, a setting is out of range, a logit is not a number, or the model is not prepared
/// for the longest prompt plus `max_new_tokens`.
pub fn generate(
    model: &Model,
    hook: &dyn LinearHook,
    prompts: &[Vec<u32>],
    options: &Generation,
    generator: &mut Generator,
    on_token: &mut dyn FnMut(usize, u32),
) -> Result<Vec<Vec<u32>>> {
    options.sampling.check()?;
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
            let id = options.sampling.choose(logits, generator, index)?;
            if options.stop.contains(&id) {
                continue;
            }
            texts[index].push(id);
            on_token(index, id);
            if texts[index].len() < options.max_new_tokens {
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

/// Sequences that grow, with the keys and values of what they already hold.
pub struct Decoder<'a> {
    model: &'a Model,
    hook: &'a dyn LinearHook,
    cache: Vec<LayerCache>,
    sequences: Vec<Held>,
}

/// One block's keys and values: `[S, G*E]` each, S the room of all sequences; unused rows are zero.
#[derive(Debug)]
struct LayerCache {
    k: Tensor,
    v: Tensor,
}

/// One sequence's rows of every block's cache.
#[derive(Clone, Copy, Debug)]
struct Held {
    start: usize,
    length: usize,
    room: usize,
}

/// Where new tokens stand, the same for every block.
struct Place {
    /// `[T]`, within each sequence.
    positions: Tensor,
    /// `[T]`, rows of the cache that the new tokens take.
    slots: Tensor,
    /// `[S]`, rows of the cache that the advancing sequences hold, the new ones included.
    held: Tensor,
    segments: Segments,
    /// `[sequences]`, the last new token of each.
    last: Tensor,
}

impl<'a> Decoder<'a> {
    /// Room for every prompt and `max_new_tokens` after it; nothing is computed yet.
    ///
    /// # Errors
    /// Where a prompt is empty, the model is not prepared for the longest sequence, or memory is short.
    pub fn new(
        model: &'a Model,
        hook: &'a dyn LinearHook,
        prompts: &[Vec<u32>],
        max_new_tokens: usize,
    ) -> Result<Decoder<'a>> {
        let (mut sequences, mut start) = (Vec::new(), 0);
        for (index, prompt) in prompts.iter().enumerate() {
            if prompt.is_empty() {
                return Err(Error::Generation {
                    message: format!("prompt {index} has no tokens; give at least one"),
                });
            }
            let room = prompt.len() + max_new_tokens;
            model.check_positions(room)?;
            sequences.push(Held { start, length: 0, room });
            start += room;
        }
        let shape = [start, model.config.num_key_value_heads * model.config.head_dim]; // [S, G*E]
        let zeros = || model.kernels.zeros(&shape);
        let layers = 0..model.config.num_hidden_layers;
        let cache: Result<_> = layers.map(|_| Ok(LayerCache { k: zeros()?, v: zeros()? })).collect();
        Ok(Decoder { model, hook, cache: cache?, sequences })
    }

    /// Appends new tokens to some of the sequences, given by index; returns the logits `[sequences, V]` that
    /// follow the last of each. The first call brings the prompts.
    ///
    /// # Errors
    /// Where a sequence is unknown, named twice, given no token or more than it has room for.
    pub fn advance(&mut self, pieces: &[(usize, &[u32])]) -> Result<Tensor> {
        let (model, kernels) = (self.model, &self.model.kernels);
        let place = self.place(pieces)?;
        let ids: Vec<u32> = pieces.iter().flat_map(|(_, ids)| ids.iter().copied()).collect();
        let mut x = model.lookup(&kernels.from_u32(&ids, &[ids.len()])?)?; // [T, D]
        for layer in 0..model.config.num_hidden_layers {
            x = self.block(layer, x, &place)?;
        }
        let mut last = kernels.empty(&[pieces.len(), model.config.hidden_size])?; // [sequences, D]
        kernels.gather_rows(&place.last, &x, &mut last)?;
        model.project(&last)
    }

    /// [`Model::block_forward`] with the keys and values of earlier tokens; x `[T, D]`.
    fn block(&mut self, layer: usize, x: Tensor, place: &Place) -> Result<Tensor> {
        let (model, hook) = (self.model, self.hook);
        let (n, _) = model.norm(Parameter::AttentionNorm(layer), &x)?; // [T, D]
        let new = model.attention_project(layer, &n, &place.positions, hook)?;
        drop(n);
        let cache = &mut self.cache[layer];
        let k = remember(model, &mut cache.k, &new.k, place)?; // [S, G*E]
        let v = remember(model, &mut cache.v, &new.v, place)?; // [S, G*E]
        let (o, _) = model.attend(&place.segments, &new.q, &k, &v)?; // [T, H*E]
        let (mut mid, _) = model.linear(Projection::Output.of(layer), &o, hook)?; // [T, D]
        model.kernels.add(1.0, &x, &mut mid)?;
        let (n, _) = model.norm(Parameter::FeedForwardNorm(layer), &mid)?; // [T, D]
        let (mut y, _) = model.feed_forward(layer, n, hook)?; // [T, D]
        model.kernels.add(1.0, &mid, &mut y)?;
        Ok(y)
    }

    /// Takes rows of the cache for the new tokens.
    fn place(&mut self, pieces: &[(usize, &[u32])]) -> Result<Place> {
        let (mut positions, mut slots, mut held) = (Vec::new(), Vec::new(), Vec::new());
        let (mut lengths, mut last) = (Vec::new(), Vec::new());
        for (order, &(index, ids)) in pieces.iter().enumerate() {
            let twice = pieces[..order].iter().any(|&(earlier, _)| earlier == index);
            let sequence = self.sequences.get_mut(index).filter(|_| !twice && !ids.is_empty());
            let Some(sequence) = sequence.filter(|sequence| sequence.length + ids.len() <= sequence.room)
            else {
                let message =
                    format!("{} new tokens for sequence {index}: no room, or no such sequence", ids.len());
                return Err(Error::Generation { message });
            };
            let (old, length) = (sequence.length, sequence.length + ids.len());
            sequence.length = length;
            positions.extend(old as u32..length as u32);
            slots.extend((sequence.start + old) as u32..(sequence.start + length) as u32);
            held.extend(sequence.start as u32..(sequence.start + length) as u32);
            lengths.push((ids.len(), length));
            last.push(positions.len() as u32 - 1);
        }
        let upload = |values: &[u32]| self.model.kernels.from_u32(values, &[values.len()]);
        Ok(Place {
            positions: upload(&positions)?,
            slots: upload(&slots)?,
            held: upload(&held)?,
            segments: Segments::cached(&lengths)?,
            last: upload(&last)?,
        })
    }
}

/// Writes new rows `[T, G*E]` into the cache; returns all rows `[S, G*E]` of the advancing sequences, in order.
fn remember(model: &Model, cache: &mut Tensor, new: &Tensor, place: &Place) -> Result<Tensor> {
    // A cache row is zero until its token comes, so adding to it writes it.
    model.kernels.embedding_gradient(&place.slots, new, cache)?;
    let mut all = model.kernels.empty(&[place.held.len(), new.shape()[1]])?; // [S, G*E]
    model.kernels.gather_rows(&place.held, cache, &mut all)?;
    Ok(all)
}

impl Sampling {
    fn check(&self) -> Result<()> {
        let Sampling::Random { temperature, top_k, top_p } = *self else { return Ok(()) };
        let failed = |message| Err(Error::Generation { message });
        if !(temperature > 0.0 && temperature.is_finite()) {
            return failed(format!("temperature: expected a positive number, found {temperature}"));
        }
        if top_k == Some(0) {
            return failed("top_k: expected at least 1, found 0".into());
        }
        match top_p {
            Some(p) if !(p > 0.0 && p <= 1.0) => {
                failed(format!("top_p: expected above 0 and at most 1, found {p}"))
            }
            _ => Ok(()),
        }
    }

    /// The next id from one row of logits `[V]`.
    fn choose(&self, logits: &[f32], generator: &mut Generator, prompt: usize) -> Result<u32> {
        if let Some(id) = logits.iter().position(|logit| logit.is_nan()) {
            let message = format!("the logit of token {id} after prompt {prompt} is not a number");
            return Err(Error::Generation { message });
        }
        match *self {
            Sampling::Greedy => Ok(likeliest(logits)),
            Sampling::Random { temperature, top_k, top_p } => {
                Ok(draw(logits, temperature, top_k, top_p, generator.unit()))
            }
        }
    }
}

fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

/// The id at which the summed probability of what the limits leave passes `unit`, a number from [0, 1).
///
/// top-p is nucleus sampling: Holtzman et al., arXiv 1904.09751, section 3.1.
fn draw(logits: &[f32], temperature: f64, top_k: Option<usize>, top_p: Option<f64>, unit: f64) -> u32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(top_k.unwrap_or(usize::MAX));
    let highest = f64::from(logits[order[0]]);
    let mut weights: Vec<f64> =
        order.iter().map(|&id| ((f64::from(logits[id]) - highest) / temperature).exp()).collect();
    if let Some(p) = top_p {
        let enough = p * weights.iter().sum::<f64>();
        let mut sum = 0.0;
        let reached = weights.iter().position(|weight| {
            sum += weight;
            sum >= enough
        });
        weights.truncate(reached.map_or(weights.len(), |last| last + 1));
    }
    let mut left = unit * weights.iter().sum::<f64>();
    let chosen = weights.iter().position(|weight| {
        left -= weight;
        left < 0.0
    });
    order[chosen.unwrap_or(weights.len() - 1)] as u32
}
