//! How many bytes a step takes, before it is taken. Counts of elements, the same on every device.
//!
//! | what | elements |
//! |---|---|
//! | a block's saved activations | T (2 D + 2 HE + 2 GE + 2 F + H + 2) |
//! | a block's kept input, when it is run again | T D |
//! | a block's backward beyond that, at its widest | T (D + 2 F), mostly |

use crate::head::chunk_rows;
use crate::{Config, Recompute, Storage};

/// Bytes of an activation's element.
const F32: usize = 4;

/// Bytes of the weights; `file_element` is the size of an element in the file. Mapped weights are pages of
/// the file that the system may drop and read again.
pub fn weights(config: &Config, storage: Storage, file_element: usize) -> usize {
    let element = match storage {
        Storage::Mapped => file_element,
        Storage::Trainable => F32,
    };
    config.parameter_count() * element
}

/// Bytes of everything that one block's backward reads, without the hook's part.
pub fn block_saved(config: &Config, tokens: usize) -> usize {
    let w = Widths::of(config);
    F32 * tokens * (2 * w.d + 2 * w.queries + 2 * w.keys + 2 * w.f + config.num_attention_heads + 2)
}

/// Bytes that all blocks together keep while the head is computed.
pub fn blocks_kept(config: &Config, tokens: usize, recompute: Recompute) -> usize {
    config.num_hidden_layers
        * match recompute {
            Recompute::None => block_saved(config, tokens),
            Recompute::Block => F32 * tokens * config.hidden_size,
        }
}

/// Bytes that one block takes at the widest point of its backward beyond what it saved; somewhat less
/// where nothing reads the inputs that are computed again.
pub fn block_temporary(config: &Config, tokens: usize) -> usize {
    let w = Widths::of(config);
    // Run forward again: dy, the gated product and the block's output.
    let forward = 2 * w.d + w.f;
    // Backward of the feed-forward layer: dy, and either dh with the gated product computed again, or the
    // normed input computed again with its gradient.
    let feed_forward = w.d + (2 * w.f).max(2 * w.d);
    // Backward of the attention: dy, d_o and the gradients of q, k and v; but by then what the feed-forward
    // layer saved is gone.
    let attention = (w.d + 2 * w.queries + 2 * w.keys).saturating_sub(w.d + 2 * w.f);
    F32 * tokens * forward.max(feed_forward).max(attention)
}

/// Bytes that the head takes for `labelled` tokens: their rows before and after the norm with gradients, and
/// a chunk of logits.
pub fn head(config: &Config, labelled: usize) -> usize {
    F32 * (4 * labelled * config.hidden_size
        + chunk_rows(config.vocab_size).min(labelled) * config.vocab_size)
}

/// Bytes of the keys and values of `tokens` held tokens when generating.
pub fn cache(config: &Config, tokens: usize) -> usize {
    F32 * 2 * config.num_hidden_layers * tokens * Widths::of(config).keys
}

/// Bytes of a step's activations at their largest, without the hook's part and what the device's operations
/// use inside.
pub fn activations(config: &Config, tokens: usize, labelled: usize, recompute: Recompute) -> usize {
    let kept = blocks_kept(config, tokens, recompute);
    // The last block's backward: all is still kept, and the block's own saved part is rebuilt if it was not.
    let rebuilt = match recompute {
        Recompute::None => 0,
        Recompute::Block => block_saved(config, tokens) - F32 * tokens * config.hidden_size,
    };
    // The head's input and its gradient are as long as the batch, and never exist together.
    let head = head(config, labelled) + F32 * tokens * config.hidden_size;
    kept + head.max(rebuilt + block_temporary(config, tokens))
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
