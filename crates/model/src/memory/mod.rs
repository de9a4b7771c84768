//! How many bytes a step takes, before it is taken.
//!
//! Every tensor that is live at the widest moments is counted at the size that a device takes for it ([`Place`]), what
//! the widest operation at that moment computes in included. The moments of a block are in `block.rs`; a step's peak is the largest of
//!
//! | moment | live, beside what the blocks before it keep |
//! |---|---|
//! | forward of the last block but one, whose rows are all read | that block's |
//! | forward of the last block, which computes only the rows that are read | that block's |
//! | the head | the last block's output and its gradient, their norms `[N, D]`, a chunk of logits |
//! | backward of the same blocks | the gradient of the residual stream, and that block's |

mod block;

use lora_sb_kernels::{DType, LossGradients, Place};

use self::block::Moments;
use crate::config::Task;
use crate::decode::cache_rows;
use crate::{Config, Parameter, Recompute, Storage};

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

/// Bytes of the weights of a model that computes in `dtype`; `file_element` is the size of an element in the file.
/// Mapped weights of the process's own memory are pages of the file that the system may drop and read again.
pub fn weights(config: &Config, storage: Storage, file_element: usize, dtype: DType, place: Place) -> usize {
    let rounds = dtype == DType::Bf16 && file_element != dtype.size();
    let held = |parameter: Parameter| {
        let elements: usize = config.parameter_shape(parameter).iter().product();
        match storage {
            Storage::Trainable => place.bytes(elements),
            Storage::Mapped if rounds && rounded(config, parameter) => place.bytes_of(dtype, elements),
            Storage::Mapped => place.file_bytes(elements * file_element),
        }
    };
    config.parameters().into_iter().map(held).sum()
}

/// Bytes that reading the weights takes at its largest beyond what is kept of them: on a device with a memory of its own,
/// the largest tensor in the type of the file, where it is not held in that.
pub fn reading(config: &Config, storage: Storage, file_element: usize, dtype: DType, place: Place) -> usize {
    let passes = |parameter: &Parameter| match storage {
        Storage::Trainable => true,
        Storage::Mapped => {
            dtype == DType::Bf16 && file_element != dtype.size() && rounded(config, *parameter)
        }
    };
    if place.is_host() {
        return 0;
    }
    let passing = config.parameters().into_iter().filter(passes);
    let bytes = |parameter| config.parameter_shape(parameter).iter().product::<usize>() * file_element;
    passing.map(|parameter| place.file_bytes(bytes(parameter))).max().unwrap_or(0)
}

/// Whether a model that computes in `bf16` holds a frozen parameter rounded to it: the matrices of products. Tables
/// that are only looked up, gains and biases are read as they lie in the file.
pub(crate) fn rounded(config: &Config, parameter: Parameter) -> bool {
    match parameter {
        Parameter::Weight(_) | Parameter::Head => true,
        Parameter::Embedding => config.tie_word_embeddings,
        _ => false,
    }
}

/// Bytes that the system maps around an access to a file (`fault_around_bytes` of Linux).
const MAPPED_AROUND: usize = 64 << 10;

/// Bytes of a mapped embedding that stay unread where the tokens are those `ids`; none where it is the head as
/// well, or is copied to a device's own memory.
pub fn embedding_unread(
    config: &Config,
    file_element: usize,
    place: Place,
    ids: impl IntoIterator<Item = u32>,
) -> usize {
    if config.tie_word_embeddings || !place.is_host() {
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

/// What the memory of a step depends on, whatever its batch.
#[derive(Clone, Copy, Debug)]
pub struct Footprint<'a> {
    /// The architecture.
    pub config: &'a Config,
    /// What the model computes in; see [`Model::dtype`](crate::Model::dtype).
    pub dtype: DType,
    /// Tokens whose loss is computed together; see [`Model::set_loss_chunk`](crate::Model::set_loss_chunk).
    pub loss_chunk: usize,
    /// How its weights are held.
    pub storage: Storage,
    /// The memory that it computes in.
    pub place: Place,
}

impl<'a> Footprint<'a> {
    /// Of a model that computes in `dtype`, with the usual chunks of the loss.
    pub fn new(config: &'a Config, dtype: DType, storage: Storage, place: Place) -> Self {
        let loss_chunk = place.loss_rows(config.vocab_size, config.hidden_size);
        Footprint { config, dtype, loss_chunk, storage, place }
    }

    /// The types of a product's operands: activations, and the weight beside them.
    fn types(&self) -> (DType, DType) {
        match self.storage {
            Storage::Trainable => (self.dtype, DType::F32),
            Storage::Mapped => (self.dtype, self.dtype),
        }
    }

    /// Bytes of everything that one block's backward reads, without the hook's part; all its rows are read.
    pub fn block_saved(&self, tokens: usize) -> usize {
        Moments::of(self, tokens, None).saved(true)
    }

    /// Bytes that one block takes at its widest beyond what it saved; all its rows are read.
    pub fn block_temporary(&self, tokens: usize, pass: Pass) -> usize {
        let moments = Moments::of(self, tokens, None);
        let widest = match pass {
            Pass::Forward => moments.forward(),
            Pass::Both(trained) => moments.forward().max(moments.backward(trained, true)),
        };
        widest.saturating_sub(moments.saved(true))
    }

    /// Bytes that all blocks together keep while the head is computed.
    pub fn blocks_kept(
        &self,
        tokens: usize,
        labelled: usize,
        recompute: Recompute,
        trained: Trained,
    ) -> usize {
        self.kept_before(self.config.num_hidden_layers, tokens, labelled, recompute, trained)
    }

    /// Bytes that the blocks below `layer` keep.
    fn kept_before(
        &self,
        layer: usize,
        tokens: usize,
        labelled: usize,
        recompute: Recompute,
        trained: Trained,
    ) -> usize {
        let layers = self.config.num_hidden_layers;
        let again = recompute.blocks(layers).min(layer);
        let whole = layer - again;
        let last = usize::from(layer == layers && whole > 0);
        let saved = |labelled| Moments::of(self, tokens, labelled).saved(trained.reads_inputs());
        again * self.stream(tokens) + (whole - last) * saved(None) + last * saved(Some(labelled))
    }

    /// Bytes of the residual stream, `[T, D]`.
    fn stream(&self, tokens: usize) -> usize {
        self.place.bytes(tokens * self.config.hidden_size)
    }

    /// Bytes that the head takes for `labelled` tokens, or so many sequences where it classifies them.
    pub fn head(&self, labelled: usize, pass: Pass) -> usize {
        let (d, v, place) = (self.config.hidden_size, self.config.vocab_size, self.place);
        let rows = place.bytes(labelled * d);
        if self.config.task != Task::LanguageModel {
            let hidden = 3 * rows + place.bytes(labelled * self.config.labels());
            return hidden + rows + place.product_scratch_bytes((DType::F32, DType::F32), labelled, d, d);
        }
        let normed = place.bytes_of(self.dtype, labelled * d);
        let mut held = rows + normed + place.bytes(labelled); // before and behind the norm, and its statistics
        let gradients = match pass {
            Pass::Forward => LossGradients::None,
            Pass::Both(Trained::Everything) => LossGradients::InputAndWeight,
            Pass::Both(_) => LossGradients::Input,
        };
        if gradients != LossGradients::None {
            held += normed;
        }
        let loss = place.loss_scratch_bytes(self.types(), (labelled, v, d), self.loss_chunk, gradients);
        (held + loss).max(2 * rows + normed + place.bytes(labelled))
    }

    /// Bytes of the keys and values when generating, `rooms` being the tokens that each text can come to.
    pub fn cache(&self, rooms: &[usize]) -> usize {
        let keys = self.config.num_key_value_heads * self.config.head_dim;
        let rows = |mask| -> usize { rooms.iter().map(|&room| cache_rows(mask, room)).sum() };
        let blocks = self.config.blocks.iter();
        blocks.map(|block| 2 * self.place.bytes_of(self.dtype, rows(block.mask) * keys)).sum()
    }

    /// Bytes of an evaluation's activations at their largest, without the hook's part.
    pub fn evaluation(&self, tokens: usize, labelled: usize) -> usize {
        let layers = self.config.num_hidden_layers;
        let whole = if layers > 1 { Moments::of(self, tokens, None).forward() } else { 0 };
        let last = Moments::of(self, tokens, Some(labelled)).forward();
        whole.max(last).max(self.head(labelled, Pass::Forward))
    }

    /// Bytes of a step's activations at their largest, without the hook's part.
    pub fn activations(
        &self,
        tokens: usize,
        labelled: usize,
        recompute: Recompute,
        trained: Trained,
    ) -> usize {
        let layers = self.config.num_hidden_layers;
        let kept = self.blocks_kept(tokens, labelled, recompute, trained);
        let mut peak = kept + self.head(labelled, Pass::Both(trained));
        // The last block, which is run in few rows; and the one before it, in all.
        for (layer, read) in [(layers - 1, Some(labelled)), (layers.saturating_sub(2), None)] {
            if read.is_none() && layers < 2 {
                continue;
            }
            let moments = Moments::of(self, tokens, read);
            let below = self.kept_before(layer, tokens, labelled, recompute, trained);
            let mut block = moments.forward();
            let again = layer < recompute.blocks(layers);
            if again {
                block += moments.stream_gradient();
            }
            block = block.max(moments.backward(trained, again || trained.reads_inputs()));
            peak = peak.max(below + block);
        }
        peak
    }
}
