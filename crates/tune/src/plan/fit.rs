//! The layout of a run that fits: which blocks are computed again, and how many tokens share a pass of the loss.
//!
//! Tried one after another until the planned peak is within the limit, the cheapest first:
//!
//! | layout | its price |
//! |---|---|
//! | every block keeps what its backward reads | none |
//! | the first n blocks keep their input alone, n = 1, 2, ... | n forwards of a block more, the same bits |
//! | all of them, and half the tokens of a pass of the loss, a quarter, ... | the head's weights are read more often |
//!
//! The tokens come last because, of all this, they alone may show in the last bits of a loss.

use lora_sb_model::memory::Footprint;
use lora_sb_model::{Recompute, Task};

use super::{MemoryPlan, MemoryRequest};
use crate::config::GradientCheckpointing;
use crate::{Error, Result};

/// The fewest tokens worth a pass over the head's weights.
const LEAST_ROWS: usize = 16;

/// A layout that was chosen, and what it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fitted {
    /// What the model keeps for its backward pass.
    pub recompute: Recompute,
    /// Rows of logits that exist at a time.
    pub loss_chunk: usize,
    /// Blocks that the estimate of a first gradient takes at once: as many as take no more memory than the training
    /// will, or than one at a time; no bit depends on it.
    pub blocks_at_once: Option<usize>,
    /// The memory of the run.
    pub memory: MemoryPlan,
}

/// The cheapest layout of a run within `limit` bytes; without a limit, the fastest. What is given stays as it is:
/// `checkpointing` that is not `auto`, and `loss_chunk`. The request's own layout is not read.
///
/// # Errors
/// [`Error::DoesNotFit`], with the plan of the layout that takes least.
pub fn fit(
    request: &MemoryRequest<'_>,
    checkpointing: GradientCheckpointing,
    loss_chunk: Option<usize>,
    limit: Option<usize>,
) -> Result<Fitted> {
    let recomputes = recomputes(checkpointing, request.config.num_hidden_layers);
    let chunks = chunks(request, loss_chunk);
    let last = recomputes.last().copied().unwrap_or(Recompute::None);
    let layouts = recomputes.into_iter().map(|recompute| (recompute, chunks[0]));
    let layouts = layouts.chain(chunks[1..].iter().map(|&rows| (last, rows)));
    let mut least: Option<Fitted> = None;
    for (recompute, loss_chunk) in layouts {
        let request = MemoryRequest { recompute, loss_chunk, ..*request };
        let mut memory = MemoryPlan::new(&request);
        let blocks_at_once = widen_estimate(&request, &mut memory, limit);
        let fitted = Fitted { recompute, loss_chunk, blocks_at_once, memory };
        if limit.is_none_or(|limit| fitted.memory.peak() <= limit) {
            return Ok(fitted);
        }
        if least.is_none_or(|least| fitted.memory.peak() < least.memory.peak()) {
            least = Some(fitted);
        }
    }
    let plan = least.map_or_else(|| MemoryPlan::new(request), |least| least.memory);
    Err(Error::DoesNotFit { plan: Box::new(plan), limit: limit.unwrap_or(usize::MAX) })
}

/// Lets the estimate of a first gradient take as many blocks at once as the memory of the training has room for and the
/// limit allows, where nobody has said how many.
fn widen_estimate(
    request: &MemoryRequest<'_>,
    memory: &mut MemoryPlan,
    limit: Option<usize>,
) -> Option<usize> {
    let given = request.adapter.init.blocks_at_once;
    let Some(plan) = request.init.filter(|_| given.is_none()).map(|size| request.estimate(size)) else {
        return given;
    };
    let beside = |bytes: usize| {
        let tensors = bytes.saturating_sub(memory.process + memory.weights);
        tensors - memory.place.idle_bytes(tensors)
    };
    let room = beside(memory.train_peak()).max(memory.initialisation);
    let blocks = plan.most_blocks_within(room.min(limit.map_or(usize::MAX, beside)));
    memory.initialisation = plan.peak_of(blocks);
    Some(blocks)
}

fn recomputes(checkpointing: GradientCheckpointing, layers: usize) -> Vec<Recompute> {
    match checkpointing {
        GradientCheckpointing::Fixed(recompute) => vec![recompute],
        GradientCheckpointing::Auto => {
            let some = (1..layers).map(Recompute::First);
            [Recompute::None].into_iter().chain(some).chain([Recompute::Block]).collect()
        }
    }
}

/// Rows of logits, the usual number first; never none.
fn chunks(request: &MemoryRequest<'_>, given: Option<usize>) -> Vec<usize> {
    let MemoryRequest { config, dtype, storage, place, .. } = *request;
    let usual = Footprint::new(config, dtype, storage, place).loss_chunk;
    match given {
        Some(rows) => vec![rows],
        // A few classes take no memory to speak of.
        None if config.task != Task::LanguageModel => vec![usual],
        None => {
            let halved = std::iter::successors(Some(usual / 2), |rows| Some(rows / 2));
            [usual].into_iter().chain(halved.take_while(|&rows| rows >= LEAST_ROWS)).collect()
        }
    }
}
