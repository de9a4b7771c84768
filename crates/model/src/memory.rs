//! How many bytes a step takes, before it is taken.
//!
//! Every tensor that is live at the widest moments is counted at the size that a device takes for it
//! ([`allocated_bytes`]), the packed blocks of the largest product at that moment included
//! ([`product_scratch_bytes`]).
//!
//! | moment | live, beside what the blocks keep |
//! |---|---|
//! | a block's forward, its product `[T, F]` made | dy where the block is run again, `h [T, F]`, `y [T, D]` |
//! | the same, gate and up fused | both once more, `[T, 2F]`, on their way to or from one product |
//! | feed-forward's backward | `dy`, and `dh [T, F]` or `dn [T, D]`, with the layer's input where it is read |
//! | attention's backward | `dy`, `do`, `dq`, `dk`, `dv`, normed q and k; what the feed-forward layer kept is gone |
//! | the head | rows, their norm and its gradient `[N, D]`, a chunk of logits |
//!
//! Where norms stand around or behind, other tensors `[T, D]` are kept, and they take part in these moments.

use lora_sb_kernels::{allocated_bytes, product_scratch_bytes};

use crate::config::{FeedForward, NormKind, NormPlacement, Task};
use crate::decode::cache_rows;
use crate::head::chunk_rows;
use crate::{Config, Projection, Recompute, Storage};

/// What is trained decides what the backward pass reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trained {
    /// Parts that only read the products of frozen matrices, such as an r x r matrix between two of them.
    OfProducts,
    /// Parts that read the inputs of linear layers.
    OfInputs,
    /// The model's own parameters, the head's included.
    Everything,
}

impl Trained {
    fn reads_inputs(self) -> bool {
        self != Trained::OfProducts
    }
}

/// Which way a batch goes through the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Forward only.
    Forward,
    /// Forward and backward.
    Both(Trained),
}

/// Bytes of the weights; `file_element` is the size of an element in the file. Mapped weights are pages of
/// the file that the system may drop and read again.
pub fn weights(config: &Config, storage: Storage, file_element: usize) -> usize {
    match storage {
        Storage::Mapped => config.parameter_count() * file_element,
        Storage::Trainable => parameter_sizes(config).map(allocated_bytes).sum(),
    }
}

/// Bytes that the system maps around an access to a file (`fault_around_bytes` of Linux).
const MAPPED_AROUND: usize = 64 << 10;

/// Bytes of a mapped embedding that stay unread where the tokens are those `ids`; none where it is the head as
/// well.
pub fn embedding_unread(config: &Config, file_element: usize, ids: impl IntoIterator<Item = u32>) -> usize {
    if config.tie_word_embeddings {
        return 0;
    }
    let row = config.hidden_size * file_element;
    let mut unread = vec![true; (config.vocab_size * row).div_ceil(MAPPED_AROUND)];
    for id in ids.into_iter().map(|id| id as usize).filter(|&id| id < config.vocab_size) {
        unread[id * row / MAPPED_AROUND..=((id + 1) * row - 1) / MAPPED_AROUND].fill(false);
    }
    unread.into_iter().filter(|&unread| unread).count() * MAPPED_AROUND
}

/// Elements of the largest parameter: what is read, or copied to be saved, at a time.
pub fn largest_parameter(config: &Config) -> usize {
    parameter_sizes(config).max().unwrap_or(0)
}

fn parameter_sizes(config: &Config) -> impl Iterator<Item = usize> {
    config.parameters().into_iter().map(|parameter| config.parameter_shape(parameter).iter().product())
}

/// Bytes of everything that one block's backward reads, without the hook's part.
pub fn block_saved(config: &Config, tokens: usize) -> usize {
    let Kept { stream, attention, feed_forward } = Kept::of(config, tokens);
    stream + attention + feed_forward
}

/// What a block keeps, in bytes.
struct Kept {
    /// Its input, and what the norms of the residual stream read and keep.
    stream: usize,
    attention: usize,
    feed_forward: usize,
}

impl Kept {
    fn of(config: &Config, tokens: usize) -> Self {
        let Widths { d, f, queries, keys } = Widths::of(config);
        let bytes = |width| allocated_bytes(tokens * width);
        let norm = norm_saved(config, tokens);
        let stream = match config.norm_placement {
            NormPlacement::Before => 2 * (bytes(d) + norm),
            NormPlacement::Around => 4 * (bytes(d) + norm),
            NormPlacement::Behind => 3 * bytes(d) + 2 * norm,
        };
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let head_norms = if config.query_key_norm { bytes(heads) + bytes(kv_heads) } else { 0 };
        let attention = 2 * bytes(queries) + 2 * bytes(keys) + bytes(heads) + head_norms;
        let feed_forward = match config.feed_forward {
            FeedForward::Gated(_) => 2 * bytes(f),
            FeedForward::Plain(_) => bytes(f),
        };
        Kept { stream, attention, feed_forward }
    }
}

/// Bytes of the statistics of one norm of the residual stream.
fn norm_saved(config: &Config, tokens: usize) -> usize {
    match config.norm {
        NormKind::Rms(_) => allocated_bytes(tokens),
        NormKind::Layer => 2 * allocated_bytes(tokens),
    }
}

/// Bytes that all blocks together keep while the head is computed.
pub fn blocks_kept(config: &Config, tokens: usize, recompute: Recompute) -> usize {
    config.num_hidden_layers
        * match recompute {
            Recompute::None => block_saved(config, tokens),
            Recompute::Block => allocated_bytes(tokens * config.hidden_size),
        }
}

/// Bytes that one block takes at its widest beyond what it saved.
pub fn block_temporary(config: &Config, tokens: usize, pass: Pass) -> usize {
    let Widths { d, f, queries, keys } = Widths::of(config);
    let bytes = |width| allocated_bytes(tokens * width);
    let fused = config.projections.contains(&Projection::GateUp);
    // Behind, what the feed-forward layer reads is live as well; around and behind, what it makes is kept.
    let beside_h = if config.norm_placement == NormPlacement::Around { 0 } else { bytes(d) };
    let mut forward = beside_h + bytes(f) + product_scratch_bytes(tokens, d, f);
    if fused {
        forward = forward.max(bytes(d) + bytes(2 * f).max(product_scratch_bytes(tokens, 2 * f, d)));
    }
    let Pass::Both(trained) = pass else { return forward };
    let reads = usize::from(trained.reads_inputs());
    let product = |out: usize, input: usize| {
        let weight_gradient = reads * product_scratch_bytes(out, input, tokens);
        product_scratch_bytes(tokens, input, out).max(weight_gradient)
    };
    // The gradient of the residual stream; behind, it has taken the place of the second sum.
    let dy = if config.norm_placement == NormPlacement::Behind { 0 } else { bytes(d) };
    let down = dy + (1 + reads) * bytes(f) + product(d, f);
    let mut gate = dy + (1 + reads) * bytes(d) + product(if fused { 2 * f } else { f }, d);
    if fused {
        gate = gate.max(dy + bytes(2 * f));
    }
    let norm = norm_saved(config, tokens);
    let (gradients, gone) = match config.norm_placement {
        NormPlacement::Before => (1, bytes(d) + norm),
        NormPlacement::Around => (2, 3 * (bytes(d) + norm)),
        NormPlacement::Behind => (1, 2 * (bytes(d) + norm)),
    };
    let heads_again = if config.query_key_norm { bytes(queries) + bytes(keys) } else { 0 };
    let attention = gradients * bytes(d) + 2 * bytes(queries) + 2 * bytes(keys) + heads_again;
    let attention = attention.saturating_sub(gone + Kept::of(config, tokens).feed_forward);
    (bytes(d) + forward).max(down).max(gate).max(attention)
}

/// Bytes that the head takes for `labelled` of `tokens` tokens, or so many sequences where it classifies them.
pub fn head(config: &Config, tokens: usize, labelled: usize, pass: Pass) -> usize {
    let (d, v) = (config.hidden_size, config.vocab_size);
    let (stream, rows) = (allocated_bytes(tokens * d), allocated_bytes(labelled * d));
    if config.task != Task::LanguageModel {
        let hidden = 3 * rows + allocated_bytes(labelled * config.labels());
        return (hidden + rows + product_scratch_bytes(labelled, d, d)).max(stream + rows);
    }
    let chunk = chunk_rows(v).min(labelled);
    let mut product = product_scratch_bytes(chunk, v, d);
    let mut held = 2 * rows + allocated_bytes(labelled); // before and behind the norm, and its statistics
    if let Pass::Both(trained) = pass {
        product = product.max(product_scratch_bytes(chunk, d, v));
        held += rows; // the gradient
        if trained == Trained::Everything {
            product = product.max(product_scratch_bytes(v, d, chunk));
        }
    }
    (held + allocated_bytes(chunk * v) + product).max(stream + rows)
}

/// Bytes of the keys and values when generating, `rooms` being the tokens that each text can come to.
pub fn cache(config: &Config, rooms: &[usize]) -> usize {
    let keys = Widths::of(config).keys;
    let rows = |mask| -> usize { rooms.iter().map(|&room| cache_rows(mask, room)).sum() };
    config.blocks.iter().map(|block| 2 * allocated_bytes(rows(block.mask) * keys)).sum()
}

/// Bytes of a step's activations at their largest, without the hook's part.
pub fn activations(
    config: &Config,
    tokens: usize,
    labelled: usize,
    recompute: Recompute,
    trained: Trained,
) -> usize {
    let kept = blocks_kept(config, tokens, recompute);
    // The last block's backward: all is still kept, and the block's own saved part is rebuilt if it was not.
    let rebuilt = match recompute {
        Recompute::None => 0,
        Recompute::Block => block_saved(config, tokens) - allocated_bytes(tokens * config.hidden_size),
    };
    let pass = Pass::Both(trained);
    kept + head(config, tokens, labelled, pass).max(rebuilt + block_temporary(config, tokens, pass))
}

struct Widths {
    d: usize,
    f: usize,
    /// H*E.
    queries: usize,
    /// G*E.
    keys: usize,
}

impl Widths {
    fn of(config: &Config) -> Self {
        Widths {
            d: config.hidden_size,
            f: config.intermediate_size,
            queries: config.num_attention_heads * config.head_dim,
            keys: config.num_key_value_heads * config.head_dim,
        }
    }
}
