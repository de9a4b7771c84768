//! The memory of a run, added up from the architecture and the largest batches.
//!
//! | phase | beside the weights and the process itself |
//! |---|---|
//! | initialisation from a gradient | the kept block inputs, one block's gradients, the adapter so far, and one micro-batch's or one factorisation's working set |
//! | initialisation from the weights | the adapter, and one weight with its factorisation's working set |
//! | training | what is trained, with gradient and two moments; what an adapter keeps frozen; the activations of the largest micro-batch |
//! | evaluation | the same without activations, and one block's working set of the largest batch |
//!
//! At a site an adapter keeps `u [T, r]` for its backward, DoRA `z [T, out]` besides; see
//! [`adapter`](crate::adapter).
//!
//! The peak is within 10 % of what Linux counts for the process (`VmHWM`): tested on three small shapes, and measured
//! within 3 % on the four of `records/2026-11-23-memory.md`. Not counted are the scores that a thread holds while it
//! computes attention, about 256 floats for each token of the longest sequence.

use lora_sb_data::Example;
use lora_sb_kernels::linalg::SvdOptions;
use lora_sb_kernels::{allocated_bytes, product_scratch_bytes};
use lora_sb_model::memory::{self, Pass, Trained};
use lora_sb_model::{Config, Parameter, Recompute, Site, Storage};

use crate::adapter::Part;
use crate::eval::labels;
use crate::method::Kind;
use crate::{AdapterConfig, Bases, Method};

/// Bytes that the process takes beside weights and tensors where the system does not tell: program and threads
/// (14 MiB measured with two threads and a model of a few kilobytes), and room for a tokenizer and the examples.
pub const PROCESS_OVERHEAD: usize = 24 << 20;

/// The size of a packed batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchSize {
    /// T.
    pub tokens: usize,
    /// Labels that are in the loss: trained tokens, or examples with a class or value.
    pub labelled: usize,
}

impl BatchSize {
    /// Grows to the size of a batch of `examples`, where that is larger.
    pub fn include<'a>(&mut self, examples: impl IntoIterator<Item = &'a Example>) {
        let mut found = BatchSize::default();
        for example in examples {
            found.tokens += example.ids.len();
            found.labelled += labels(example);
        }
        self.tokens = self.tokens.max(found.tokens);
        self.labelled = self.labelled.max(found.labelled);
    }
}

/// What the memory of a run depends on.
#[derive(Clone, Copy, Debug)]
pub struct MemoryRequest<'a> {
    /// The architecture.
    pub config: &'a Config,
    /// How its weights are held.
    pub storage: Storage,
    /// Bytes of a weight's element in its file.
    pub file_element: usize,
    /// What is trained.
    pub adapter: &'a AdapterConfig,
    /// The adapted layers.
    pub sites: &'a [Site],
    /// Parameters of a classification head that are trained beside the adapter.
    pub head: &'a [Parameter],
    /// What the model keeps for its backward pass.
    pub recompute: Recompute,
    /// The largest micro-batch of training; see [`largest_micro_batch`](super::largest_micro_batch).
    pub train: BatchSize,
    /// The largest batch of an evaluation.
    pub evaluation: BatchSize,
    /// An initialisation from a gradient ([`estimates_gradient`](super::estimates_gradient)): tokens of all its
    /// samples, and its largest micro-batch.
    pub init: Option<(usize, BatchSize)>,
    /// Ids of all tokens that the run meets, as often as they like: mapped rows of an embedding that nobody reads
    /// take no memory.
    pub ids: &'a [u32],
    /// Bytes that the process takes before the weights are read: program, tokenizer, examples. Measured where the
    /// system tells, else [`PROCESS_OVERHEAD`].
    pub process: usize,
}

/// Bytes by what they are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The base model's weights; mapped ones count as far as they are read.
    pub weights: usize,
    /// What an adapter holds and does not train: the bases A and B, the factors of a start, norms of weights.
    pub frozen: usize,
    /// Values that are trained beside the base model's: R, or A and B, and a head's copy of its own.
    pub trained: usize,
    /// Their gradients.
    pub gradients: usize,
    /// AdamW's two moments.
    pub optimizer: usize,
    /// Activations of the largest micro-batch, the adapter's and the head's included.
    pub activations: usize,
    /// Working set of the largest evaluation batch.
    pub evaluation: usize,
    /// What the initialisation takes at its largest beside the weights, what it has made so far included.
    pub initialisation: usize,
    /// The copy of one tensor at a time while a checkpoint is written; activations stay with the device then.
    pub copied: usize,
    /// The process itself.
    pub process: usize,
}

impl MemoryPlan {
    /// Adds up a run.
    pub fn new(request: &MemoryRequest<'_>) -> Self {
        let MemoryRequest { config, recompute, train, evaluation, .. } = *request;
        let full = request.adapter.method == Method::Full;
        let (frozen, adapted) = adapter(request);
        let head = head(request);
        let gradients = match full {
            true => memory::weights(config, Storage::Trainable, size_of::<f32>()),
            false => adapted + head,
        };
        // A head that the device holds already is trained where it is.
        let copied_head = if request.storage == Storage::Mapped { head } else { 0 };
        let reads = reads(request.adapter.method);
        let ids = request.ids.iter().copied();
        let unread = match request.storage {
            Storage::Mapped => memory::embedding_unread(config, request.file_element, ids),
            Storage::Trainable => 0,
        };
        MemoryPlan {
            weights: memory::weights(config, request.storage, request.file_element) - unread,
            frozen,
            trained: adapted + copied_head,
            gradients,
            optimizer: 2 * gradients,
            activations: memory::activations(config, train.tokens, train.labelled, recompute, reads)
                + hook_saved(request, train.tokens, recompute)
                + hook_temporary(request, train.tokens, request.adapter.lora_dropout),
            evaluation: (memory::block_saved(config, evaluation.tokens)
                + memory::block_temporary(config, evaluation.tokens, Pass::Forward))
            .max(memory::head(config, evaluation.tokens, evaluation.labelled, Pass::Forward))
                + hook_saved(request, evaluation.tokens, Recompute::Block)
                + hook_temporary(request, evaluation.tokens, 0.0),
            initialisation: match request.init {
                Some((tokens, batch)) => initialisation(request, tokens, batch),
                None => initialisation_from_weights(request),
            },
            copied: if full { size_of::<f32>() * memory::largest_parameter(config) } else { 0 },
            process: request.process,
        }
    }

    /// Bytes of the initialisation at its largest.
    pub fn init_peak(&self) -> usize {
        self.process + self.weights + self.initialisation
    }

    /// Bytes of training at its largest.
    pub fn train_peak(&self) -> usize {
        let state = self.frozen + self.trained + self.gradients + self.optimizer;
        self.process + self.weights + state + self.copied + self.activations.max(self.evaluation)
    }

    /// Bytes of the run at its largest.
    pub fn peak(&self) -> usize {
        self.init_peak().max(self.train_peak())
    }
}

/// What the backward pass of a method reads.
fn reads(method: Method) -> Trained {
    match method.kind() {
        Kind::Weights => Trained::Everything,
        Kind::Product | Kind::Magnitude => Trained::OfInputs,
        Kind::Latent => Trained::OfProducts,
    }
}

/// Bytes of what an adapter holds at a site: frozen, and trained.
fn adapter_of(request: &MemoryRequest<'_>, site: Site) -> (usize, usize) {
    let (method, rank) = (request.adapter.method, request.adapter.rank);
    let shape = request.config.site_shape(site);
    let bytes = |parts: &[Part]| -> usize {
        parts.iter().map(|part| allocated_bytes(part.shape(rank, shape).iter().product())).sum()
    };
    match method.kind() {
        // The trained values are the model's own weights.
        Kind::Weights => (0, 0),
        Kind::Product if method.subtracts_start() => {
            (bytes(&[Part::StartA, Part::StartB]), bytes(&[Part::A, Part::B]))
        }
        Kind::Product => (0, bytes(&[Part::A, Part::B])),
        // The rows' squares in W0, and their factors now.
        Kind::Magnitude => (2 * bytes(&[Part::Magnitude]), bytes(&[Part::A, Part::B, Part::Magnitude])),
        Kind::Latent => (bytes(&[Part::A, Part::B]), bytes(&[Part::R])),
    }
}

fn adapter(request: &MemoryRequest<'_>) -> (usize, usize) {
    let sites = request.sites.iter().map(|&site| adapter_of(request, site));
    sites.fold((0, 0), |sum, site| (sum.0 + site.0, sum.1 + site.1))
}

/// Bytes of the head's trained parameters.
fn head(request: &MemoryRequest<'_>) -> usize {
    let size = |&parameter: &Parameter| request.config.parameter_shape(parameter).iter().product();
    request.head.iter().map(size).map(allocated_bytes).sum()
}

/// What the sites keep for their backward, of all blocks or of the one at hand where blocks are recomputed.
fn hook_saved(request: &MemoryRequest<'_>, tokens: usize, recompute: Recompute) -> usize {
    let of = |site: &Site| {
        let product = allocated_bytes(tokens * request.adapter.rank);
        match request.adapter.method.kind() {
            Kind::Weights => 0,
            Kind::Product | Kind::Latent => product,
            Kind::Magnitude => product + allocated_bytes(tokens * request.config.site_shape(*site).0),
        }
    };
    let in_layer = |layer| request.sites.iter().filter(|site| site.layer == layer).map(of).sum::<usize>();
    match recompute {
        Recompute::None => request.sites.iter().map(of).sum(),
        Recompute::Block => (0..request.config.num_hidden_layers).map(in_layer).max().unwrap_or(0),
    }
}

/// What a site computes beside that, at the site where it is the most.
fn hook_temporary(request: &MemoryRequest<'_>, tokens: usize, dropout: f64) -> usize {
    let (method, rank) = (request.adapter.method, request.adapter.rank);
    let of = |site: &Site| {
        let (out, input) = request.config.site_shape(*site);
        let product = allocated_bytes(tokens * rank);
        let (own, reads_input) = match method.kind() {
            Kind::Weights => return 0,
            Kind::Product if method.subtracts_start() => {
                (2 * product + allocated_bytes(rank * input) + allocated_bytes(out * rank), true)
            }
            Kind::Product => (product, true),
            Kind::Magnitude => (product + allocated_bytes(tokens * out), true),
            Kind::Latent => (product, false),
        };
        // What is left of the input, and the gradient of that.
        let dropped = if dropout > 0.0 { 1 + usize::from(reads_input) } else { 0 };
        own + dropped * allocated_bytes(tokens * input)
    };
    request.sites.iter().map(of).max().unwrap_or(0)
}

/// Bytes of the adapter as it is made, with its gradients, and the working set of the largest factorisation where
/// it comes from the SVD of each weight.
fn initialisation_from_weights(request: &MemoryRequest<'_>) -> usize {
    let AdapterConfig { method, rank, ref init, .. } = *request.adapter;
    let from_weights = match method.kind() {
        Kind::Latent => matches!(init.bases, Bases::Xs | Bases::W0Orthonormal),
        _ => method == Method::Pissa,
    };
    if !from_weights {
        return 0;
    }
    let (frozen, trained) = adapter(request);
    let of = |&site: &Site| {
        let (out, input) = request.config.site_shape(site);
        allocated_bytes(out * input) + factorisation((out, input), rank)
    };
    frozen + 2 * trained + request.sites.iter().map(of).max().unwrap_or(0)
}

/// The largest moment of the streamed initialisation; blocks go from the last to the first. As it goes, the
/// kept inputs become fewer and the adapter grows.
fn initialisation(request: &MemoryRequest<'_>, tokens: usize, batch: BatchSize) -> usize {
    let MemoryRequest { config, sites, .. } = *request;
    // LoRA-GA takes twice as many singular vectors as its rank.
    let rank = request.adapter.rank * if request.adapter.method == Method::LoraGa { 2 } else { 1 };
    let (layers, width) = (config.num_hidden_layers, config.hidden_size);
    let one = allocated_bytes(batch.tokens * width); // [T, D] of a micro-batch
    let whole = tokens / batch.tokens.max(1);
    let stream = whole * one + allocated_bytes((tokens - whole * batch.tokens) * width); // of all samples
    let pass = Pass::Both(Trained::OfInputs);
    let saved = memory::block_saved(config, batch.tokens);
    let block = saved + memory::block_temporary(config, batch.tokens, pass);
    let lowest = sites.iter().map(|site| site.layer).min().unwrap_or(0);
    // The last micro-batch's forward: the gradients of the others wait for it.
    let forward = saved + memory::block_temporary(config, batch.tokens, Pass::Forward) - one;
    let head = memory::head(config, batch.tokens, batch.labelled, pass);
    let mut largest = (layers - lowest) * stream + stream.saturating_sub(one) + forward.max(head);
    let mut adapter = 0;
    for layer in (lowest..layers).rev() {
        let in_layer = || sites.iter().copied().filter(|site| site.layer == layer);
        let shapes = || in_layer().map(|site| config.site_shape(site));
        let gradients: usize = shapes().map(|(out, input)| allocated_bytes(out * input)).sum();
        // The first micro-batch: its own input and gradient are among what the block counts.
        let inputs = (layer - lowest + 1) * stream + stream;
        largest = largest.max(adapter + gradients + inputs.saturating_sub(2 * one) + block);
        // Each site's gradient goes as its factors come, so the two do not add up.
        let factorising = shapes().map(|shape| factorisation(shape, rank)).max().unwrap_or(0);
        largest = largest.max(adapter + gradients + inputs - stream + factorising);
        adapter += in_layer()
            .map(|site| {
                let (frozen, trained) = adapter_of(request, site);
                frozen + 2 * trained // with its gradient
            })
            .sum::<usize>();
        largest = largest.max(adapter + inputs - stream);
    }
    largest
}

/// Working set of one truncated SVD: the smaller side's Gram matrix and the iterated vectors, five times on the
/// smaller side (vectors, images, and the filter's three) and once on the larger.
fn factorisation((out, input): (usize, usize), rank: usize) -> usize {
    let (small, large) = (out.min(input), out.max(input));
    let block = (rank + ((rank as f64 * SvdOptions::default().oversampling) as usize).max(8)).min(small);
    let product = product_scratch_bytes(small, small, large).max(product_scratch_bytes(block, large, small));
    let vectors = 5 * allocated_bytes(block * small) + allocated_bytes(block * large);
    allocated_bytes(small * small) + vectors + product
}
