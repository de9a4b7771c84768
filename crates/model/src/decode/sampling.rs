//! How the next token is chosen: the likeliest, or drawn.

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
