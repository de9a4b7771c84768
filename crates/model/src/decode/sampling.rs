//! How the next token is chosen: the likeliest, or drawn.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use lora_sb_kernels::Generator;

use crate::{Error, Result};

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

impl Sampling {
    pub(super) fn check(&self) -> Result<()> {
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
    pub(super) fn choose(&self, logits: &[f32], generator: &mut Generator, prompt: usize) -> Result<u32> {
        if let Some(id) = logits.iter().position(|logit| !logit.is_finite()) {
            let message = format!(
                "the logit of token {id} after prompt {prompt} is {}: a weight of the model or its adapter is not \
                 finite, or too large",
                logits[id]
            );
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
    let mut ranks = Ranks::of(logits);
    let highest = f64::from(logits[ranks.peek() as usize]);
    let weight = |id: u32| ((f64::from(logits[id as usize]) - highest) / temperature).exp();
    let mut kept: Vec<(u32, f64)> = Vec::new();
    let mut all = match top_k {
        Some(k) => {
            kept.extend(ranks.by_ref().take(k).map(|id| (id, weight(id))));
            ranks = Ranks::none();
            kept.iter().map(|(_, weight)| weight).sum::<f64>()
        }
        None => (0..logits.len() as u32).map(weight).sum(),
    };
    let mut candidates = kept.into_iter().chain(ranks.map(|id| (id, weight(id))));
    if let Some(p) = top_p {
        let (enough, mut nucleus) = (p * all, Vec::new());
        all = 0.0;
        while let Some((id, weight)) = candidates.next().filter(|_| all < enough) {
            all += weight;
            nucleus.push((id, weight));
        }
        return pick(nucleus.into_iter(), unit * all);
    }
    pick(candidates, unit * all)
}

/// The first candidate with which the weights pass `left`; the last one where rounding leaves none.
fn pick(candidates: impl Iterator<Item = (u32, f64)>, mut left: f64) -> u32 {
    let mut chosen = 0;
    for (id, weight) in candidates {
        chosen = id;
        left -= weight;
        if left < 0.0 {
            break;
        }
    }
    chosen
}

/// Ids from the likeliest on, of equals the lowest first. Mostly few are asked for, and to sort a vocabulary of 128,000 takes
/// longer than a GPU takes for the logits.
struct Ranks(BinaryHeap<(i32, Reverse<u32>)>);

impl Ranks {
    fn of(logits: &[f32]) -> Self {
        // The order of `f32::total_cmp`, as whole numbers.
        let key = |logit: f32| {
            let bits = logit.to_bits().cast_signed();
            bits ^ ((bits >> 31).cast_unsigned() >> 1).cast_signed()
        };
        let ranked = logits.iter().zip(0..).map(|(&logit, id)| (key(logit), Reverse(id)));
        Ranks(ranked.collect::<Vec<_>>().into())
    }

    fn none() -> Self {
        Ranks(BinaryHeap::new())
    }

    fn peek(&self) -> u32 {
        self.0.peek().map_or(0, |&(_, Reverse(id))| id)
    }
}

impl Iterator for Ranks {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        self.0.pop().map(|(_, Reverse(id))| id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_by_their_logits_and_equals_by_their_number() {
        let logits = [0.5, -3.0, 0.0, 7.25, -0.0, 0.5, -1e-30, f32::MAX, f32::MIN];
        let mut sorted: Vec<u32> = (0..logits.len() as u32).collect();
        sorted.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        assert_eq!(Ranks::of(&logits).collect::<Vec<_>>(), sorted);
    }

    /// Four tokens of probabilities 0.4, 0.3, 0.2, 0.1, the likeliest last.
    #[test]
    fn limits_cut_the_unlikely_and_the_rest_is_drawn_by_its_share() {
        let logits = [0.1f32, 0.2, 0.3, 0.4].map(f32::ln);
        let ids = |top_k, top_p| {
            let draws = (0..1000).map(|i| draw(&logits, 1.0, top_k, top_p, (f64::from(i) + 0.5) / 1000.0));
            let mut counts = [0; 4];
            draws.for_each(|id| counts[id as usize] += 1);
            counts
        };
        assert_eq!(ids(None, None), [100, 200, 300, 400]);
        assert_eq!(ids(Some(2), None), [0, 0, 429, 571]);
        assert_eq!(ids(None, Some(0.6)), [0, 0, 429, 571]);
        assert_eq!(ids(Some(3), Some(0.5)), [0, 0, 429, 571]);
        assert_eq!(ids(Some(1), None), [0, 0, 0, 1000]);
        assert_eq!(ids(None, Some(1e-9)), [0, 0, 0, 1000]);
    }
}
