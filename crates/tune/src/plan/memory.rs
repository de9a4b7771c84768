//! The memory of a run, added up from the architecture and the largest batches.
//!
//! | phase | beside the weights and the process itself |
//! |---|---|
//! | initialisation from a gradient | the gradients of the blocks at hand, what is kept for the others, the adapter so far, and one micro-batch's or one factorisation's working set |
//! | initialisation from the weights | the adapter, and one weight with its factorisation's working set |
//! | training | what is trained, with gradient and two moments; what an adapter keeps frozen; the activations of the largest micro-batch |
//! | evaluation | the same without activations, and one block's working set of the largest batch |
//! | any | what the device keeps between tensors ([`Place::idle_bytes`]) |
//! | reading the weights | on a device with a memory of its own, one tensor as it lies in the file beside what is kept of it |
//!
//! At a site an adapter keeps `u [T, r]` for its backward, DoRA `z [T, out]` besides; see
//! [`adapter`](crate::adapter). Activations are counted in the type that the model computes in.
//!
//! The peak is within 10 % of what Linux counts for the process (`VmHWM`): tested on small shapes in both types, and measured
//! within 3 % on the four of `records/2026-11-23-memory.md`. Not counted are the scores that a thread holds while it
//! computes attention, about 256 floats for each token of the longest sequence.

use lora_sb_data::Example;
use lora_sb_kernels::{DType, Place};
use lora_sb_model::memory::{self, Footprint, Trained};
use lora_sb_model::{Config, Parameter, Projection, Recompute, Site, Storage};

use super::initialisation::{EstimatePlan, EstimateSize, from_weights};
use crate::adapter::Part;
use crate::eval::labels;
use crate::method::Kind;
use crate::{AdapterConfig, Method};

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
    /// What the model computes in.
    pub dtype: DType,
    /// What the model keeps for its backward pass.
    pub recompute: Recompute,
    /// Tokens whose loss is computed together; [`Footprint::new`] knows the usual number.
    pub loss_chunk: usize,
    /// The memory that is planned: the process's own, or a device's.
    pub place: Place,
    /// The largest micro-batch of training; see [`largest_micro_batch`](super::largest_micro_batch).
    pub train: BatchSize,
    /// The largest batch of an evaluation.
    pub evaluation: BatchSize,
    /// What an initialisation from a gradient ([`estimates_gradient`](super::estimates_gradient)) is estimated on.
    pub init: Option<EstimateSize>,
    /// Ids of all tokens that the run meets, as often as they like: mapped rows of an embedding that nobody reads
    /// take no memory.
    pub ids: &'a [u32],
    /// Bytes that are taken before the weights are read: [`Place::overhead_bytes`], or of the process's own memory what
    /// program, tokenizer and examples take, measured where the system tells, else [`PROCESS_OVERHEAD`].
    pub process: usize,
}

impl<'a> MemoryRequest<'a> {
    /// What the memory of a step depends on, whatever its batch.
    pub(super) fn footprint(&self) -> Footprint<'a> {
        let MemoryRequest { config, dtype, loss_chunk, storage, place, .. } = *self;
        Footprint { config, dtype, loss_chunk, storage, place }
    }

    /// The estimate of its gradient, of that size.
    pub(super) fn estimate(&self, size: EstimateSize) -> EstimatePlan<'a> {
        EstimatePlan { footprint: self.footprint(), adapter: self.adapter, sites: self.sites, size }
    }
}

/// Bytes by what they are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The memory that is planned.
    pub place: Place,
    /// The base model's weights; mapped ones count as far as they are read.
    pub weights: usize,
    /// What reading them takes beyond that, at its largest.
    pub reading: usize,
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
    /// The host's copy of one tensor at a time while a checkpoint is written; activations stay with the device then.
    pub copied: usize,
    /// The process itself, or the device's driver.
    pub process: usize,
}

impl MemoryPlan {
    /// Adds up a run.
    pub fn new(request: &MemoryRequest<'_>) -> Self {
        let MemoryRequest {
            config, storage, file_element, dtype, recompute, train, evaluation, place, ..
        } = *request;
        let footprint = request.footprint();
        let hooks = |batch| Hooks { request, batch };
        let full = request.adapter.method == Method::Full;
        let (frozen, adapted) = adapter(request);
        let head = head(request);
        let gradients = match full {
            true => memory::weights(config, Storage::Trainable, size_of::<f32>(), DType::F32, place),
            false => adapted + head,
        };
        // A head that the device holds already is trained where it is.
        let copied_head = if storage == Storage::Mapped { head } else { 0 };
        let reads = reads(request.adapter.method);
        let ids = request.ids.iter().copied();
        let unread = match storage {
            Storage::Mapped => memory::embedding_unread(config, file_element, place, ids),
            Storage::Trainable => 0,
        };
        MemoryPlan {
            place,
            weights: memory::weights(config, storage, file_element, dtype, place) - unread,
            reading: memory::reading(config, storage, file_element, dtype, place),
            frozen,
            trained: adapted + copied_head,
            gradients,
            optimizer: 2 * gradients,
            activations: footprint.activations(train.tokens, train.labelled, recompute, reads)
                + hooks(train).saved(recompute)
                + hooks(train).temporary(request.adapter.lora_dropout),
            evaluation: footprint.evaluation(evaluation.tokens, evaluation.labelled)
                + hooks(evaluation).saved(Recompute::Block)
                + hooks(evaluation).temporary(0.0),
            initialisation: match request.init {
                Some(size) => request.estimate(size).peak(),
                None => from_weights(request),
            },
            copied: match full && place.is_host() {
                true => size_of::<f32>() * memory::largest_parameter(config),
                false => 0,
            },
            process: request.process,
        }
    }

    /// Bytes of the initialisation at its largest.
    pub fn init_peak(&self) -> usize {
        self.process + self.weights + self.initialisation + self.place.idle_bytes(self.initialisation)
    }

    /// Bytes of reading the weights at its largest.
    fn reading_peak(&self) -> usize {
        self.process + self.weights + self.reading
    }

    /// Bytes of training at its largest.
    pub fn train_peak(&self) -> usize {
        self.process + self.weights + self.tensors() + self.idle() + self.copied
    }

    /// The device's tensors in training, the weights aside.
    fn tensors(&self) -> usize {
        let state = self.frozen + self.trained + self.gradients + self.optimizer;
        state + self.activations.max(self.evaluation)
    }

    /// What the device keeps in training for its next tensors.
    pub fn idle(&self) -> usize {
        self.place.idle_bytes(self.tensors())
    }

    /// Bytes of the run at its largest.
    pub fn peak(&self) -> usize {
        self.reading_peak().max(self.init_peak()).max(self.train_peak())
    }
}

/// What the backward pass of a method reads.
pub(crate) fn reads(method: Method) -> Trained {
    match method.kind() {
        Kind::Weights => Trained::Everything,
        Kind::Product | Kind::Magnitude => Trained::OfInputs,
        Kind::Latent => Trained::OfProducts,
    }
}

/// Bytes of what an adapter holds at a site: frozen, and trained.
pub(super) fn adapter_of(
    place: Place,
    config: &Config,
    adapter: &AdapterConfig,
    site: Site,
) -> (usize, usize) {
    let AdapterConfig { method, rank, .. } = *adapter;
    let shape = config.site_shape(site);
    let bytes = |parts: &[Part]| -> usize {
        parts.iter().map(|part| place.bytes(part.shape(rank, shape).iter().product())).sum()
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
    let MemoryRequest { place, config, adapter, sites, .. } = *request;
    let sites = sites.iter().map(|&site| adapter_of(place, config, adapter, site));
    sites.fold((0, 0), |sum, site| (sum.0 + site.0, sum.1 + site.1))
}

/// Bytes of the head's trained parameters.
fn head(request: &MemoryRequest<'_>) -> usize {
    let size = |&parameter: &Parameter| request.config.parameter_shape(parameter).iter().product();
    request.head.iter().map(size).map(|elements| request.place.bytes(elements)).sum()
}

/// An adapter's part in a pass over a batch.
struct Hooks<'a> {
    request: &'a MemoryRequest<'a>,
    batch: BatchSize,
}

impl Hooks<'_> {
    /// Rows that a site is given: of the last block, what is behind its attention sees those that are read alone.
    fn rows(&self, site: &Site) -> usize {
        let last = site.layer + 1 == self.request.config.num_hidden_layers;
        match last && site.projection >= Projection::Output {
            true => self.batch.labelled,
            false => self.batch.tokens,
        }
    }

    /// Bytes of activations at a site, `[T, width]`.
    fn activations(&self, site: &Site, width: usize) -> usize {
        self.request.place.bytes_of(self.request.dtype, self.rows(site) * width)
    }

    /// The same of what is `f32` in any case.
    fn exact(&self, site: &Site, width: usize) -> usize {
        self.request.place.bytes(self.rows(site) * width)
    }

    /// What the sites keep for their backward, of all blocks or of the one at hand where blocks are recomputed.
    fn saved(&self, recompute: Recompute) -> usize {
        let MemoryRequest { config, adapter, sites, .. } = *self.request;
        let of = |site: &Site| match adapter.method.kind() {
            Kind::Weights => 0,
            Kind::Product => self.activations(site, adapter.rank),
            Kind::Latent => self.exact(site, adapter.rank),
            Kind::Magnitude => {
                self.activations(site, adapter.rank) + self.activations(site, config.site_shape(*site).0)
            }
        };
        let in_layer = |layer| sites.iter().filter(|site| site.layer == layer).map(of).sum::<usize>();
        let layers = config.num_hidden_layers;
        let again = recompute.blocks(layers);
        let one = (0..again).map(in_layer).max().unwrap_or(0);
        (again..layers).map(in_layer).sum::<usize>().max(one)
    }

    /// What a site computes beside that, at the site where it is the most.
    fn temporary(&self, dropout: f64) -> usize {
        let MemoryRequest { place, config, adapter: &AdapterConfig { method, rank, .. }, sites, .. } =
            *self.request;
        let of = |site: &Site| {
            let (out, input) = config.site_shape(*site);
            let product = self.activations(site, rank);
            let (own, reads_input) = match method.kind() {
                Kind::Weights => return 0,
                Kind::Product if method.subtracts_start() => {
                    // Both terms side by side, and what A and B have moved by.
                    let moved = place.bytes(rank * input) + place.bytes(out * rank);
                    (3 * product + moved + place.bytes(2 * rank * out.max(input)), true)
                }
                Kind::Product => (product, true),
                Kind::Magnitude => (product + self.activations(site, out), true),
                // Query, key and value go together.
                Kind::Latent => (3 * (product + self.exact(site, rank)), false),
            };
            // What is left of the input, and the gradient of that.
            let dropped = if dropout > 0.0 { 1 + usize::from(reads_input) } else { 0 };
            own + dropped * self.activations(site, input)
        };
        sites.iter().map(of).max().unwrap_or(0)
    }
}
