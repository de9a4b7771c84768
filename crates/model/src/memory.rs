//! How many bytes a step takes, before it is taken.
//!
//! Every tensor that is live at the widest moments is counted at the size that a device takes for it
//! ([`allocated_bytes`]), the packed blocks of the largest product at that moment included
//! ([`product_scratch_bytes`]).
//!
//! | moment | live, beside what the blocks keep |
//! |---|---|
//! | a block's forward, its product `[T, F]` made | dy where the block is run again, `h [T, F]`, `y [T, D]` |
//! | feed-forward's backward | `dy`, and `dh [T, F]` or `dn [T, D]`, with the layer's input where it is read |
//! | attention's backward | `dy`, `do`, `dq`, `dk`, `dv`; what the feed-forward layer kept is gone |
//! | the head | rows, their norm and its gradient `[N, D]`, a chunk of logits |

use lora_sb_kernels::{allocated_bytes, product_scratch_bytes};

use crate::head::chunk_rows;
use crate::{Config, Recompute, Storage};

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
    let Widths { d, f, queries, keys } = Widths::of(config);
    let kept = [d, 1, queries, keys, keys, queries, config.num_attention_heads, d, 1, f, f];
    kept.into_iter().map(|width| allocated_bytes(tokens * width)).sum()
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
    let forward = bytes(f) + bytes(d) + product_scratch_bytes(tokens, d, f);
    let Pass::Both(trained) = pass else { return forward };
    let reads = usize::from(trained.reads_inputs());
    let product = |out: usize, input: usize| {
        let weight_gradient = reads * product_scratch_bytes(out, input, tokens);
        product_scratch_bytes(tokens, input, out).max(weight_gradient)
    };
    let dy = bytes(d);
    let down = dy + (1 + reads) * bytes(f) + product(d, f);
    let gate = dy + (1 + reads) * bytes(d) + product(f, d);
    let attention = dy + 2 * bytes(queries) + 2 * bytes(keys);
    let attention = attention.saturating_sub(bytes(d) + bytes(1) + 2 * bytes(f));
    (dy + forward).max(down).max(gate).max(attention)
}

/// Bytes that the head takes for `labelled` of `tokens` tokens.
pub fn head(config: &Config, tokens: usize, labelled: usize, pass: Pass) -> usize {
    let (d, v) = (config.hidden_size, config.vocab_size);
    let (stream, rows) = (allocated_bytes(tokens * d), allocated_bytes(labelled * d));
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

/// Bytes of the keys and values of `tokens` held tokens when generating.
pub fn cache(config: &Config, tokens: usize) -> usize {
    2 * config.num_hidden_layers * allocated_bytes(tokens * Widths::of(config).keys)
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
