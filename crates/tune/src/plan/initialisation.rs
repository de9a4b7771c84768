//! The memory of an initialisation, and how many blocks its estimate takes at once.

use lora_sb_data::Example;
use lora_sb_kernels::linalg::{SvdOptions, truncated_svd_bytes};
use lora_sb_kernels::{DType, Place};
use lora_sb_model::memory::{Footprint, Pass, Trained};
use lora_sb_model::{Config, Recompute, Site};

use super::memory::{BatchSize, MemoryRequest, adapter_of};
use crate::eval::labels;
use crate::init::AT_ONCE;
use crate::init::gradient::{block_groups, micro_batches};
use crate::method::Kind;
use crate::{AdapterConfig, Bases, Method};

/// What the gradient is estimated on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EstimateSize {
    /// Tokens of all samples.
    pub tokens: usize,
    /// The largest micro-batch.
    pub batch: BatchSize,
}

impl EstimateSize {
    /// Of these samples in micro-batches of at most `max_tokens` tokens; samples without a label are left out, as the
    /// estimate does.
    pub fn of<'a>(samples: impl IntoIterator<Item = &'a Example>, max_tokens: usize) -> Self {
        let samples: Vec<&Example> = samples.into_iter().filter(|sample| labels(sample) > 0).collect();
        let lengths: Vec<usize> = samples.iter().map(|sample| sample.ids.len()).collect();
        let mut size = EstimateSize { tokens: lengths.iter().sum(), batch: BatchSize::default() };
        for micro_batch in micro_batches(&lengths, max_tokens) {
            size.batch.include(samples[micro_batch].iter().copied());
        }
        size
    }
}

/// An initialisation from a gradient: what it takes beside the weights.
#[derive(Clone, Copy, Debug)]
pub struct EstimatePlan<'a> {
    /// What the memory of its micro-batches depends on.
    pub footprint: Footprint<'a>,
    /// What is initialised.
    pub adapter: &'a AdapterConfig,
    /// The adapted layers.
    pub sites: &'a [Site],
    /// What the gradient is estimated on.
    pub size: EstimateSize,
}

impl EstimatePlan<'_> {
    /// How many blocks are taken at once: what the settings say, and without that as many as take no more memory than
    /// one at a time does. More of them are faster: the blocks of the last group go forward only once.
    pub fn blocks_at_once(&self) -> usize {
        self.adapter.init.blocks_at_once.unwrap_or_else(|| self.most_blocks_within(self.peak_of(1)))
    }

    /// The most blocks at once whose memory is within `limit` bytes; those that take least where none is.
    pub fn most_blocks_within(&self, limit: usize) -> usize {
        let layers = self.footprint.config.num_hidden_layers;
        let choices = || (1..=(layers - self.lowest()).max(1)).rev();
        let fits = choices().find(|&blocks| self.peak_of(blocks) <= limit);
        fits.or_else(|| choices().min_by_key(|&blocks| self.peak_of(blocks))).unwrap_or(1)
    }

    /// Bytes at the largest moment, with as many blocks at once as [are taken](Self::blocks_at_once).
    pub fn peak(&self) -> usize {
        self.peak_of(self.blocks_at_once())
    }

    /// Bytes at the largest moment, with so many blocks at once. Groups of blocks go from the last to the first; as it
    /// goes, what is kept becomes less and the adapter grows.
    pub fn peak_of(&self, blocks_at_once: usize) -> usize {
        let Footprint { config, place, .. } = self.footprint;
        let layers = config.num_hidden_layers;
        let groups = block_groups(self.lowest()..layers, blocks_at_once);
        let one = self.stream(self.size.batch.tokens); // [T, D] of a micro-batch
        let whole = self.size.tokens / self.size.batch.tokens.max(1);
        let rest = self.size.tokens - whole * self.size.batch.tokens;
        let all = whole * one + self.stream(rest); // [T, D] of all samples
        let mut kept = groups.iter().skip(1).filter(|group| group.start > 0).count();
        let (mut largest, mut adapter) = (0, 0);
        for (index, group) in groups.iter().enumerate() {
            let in_group = || self.sites.iter().filter(|site| group.contains(&site.layer));
            let gradients: usize = in_group().map(|&site| place.bytes(elements(config, site))).sum();
            let reads_kept = index > 0 && group.start > 0;
            // The gradients of the groups' outputs of the micro-batches that wait, and the inputs that are kept; those
            // of the micro-batch at hand are among its activations.
            let waiting = match (index, groups.len()) {
                (0, 1) => 0,
                _ => all - one,
            };
            let inputs = kept * all - if reads_kept { one } else { 0 };
            largest =
                largest.max(adapter + gradients + inputs + waiting + self.activations(index, group.len()));
            kept -= usize::from(reads_kept);
            let going_on = if index + 1 < groups.len() { all } else { 0 };
            // Each site's gradient goes as its factors come, so the two do not add up.
            let mut factorising: Vec<usize> =
                in_group().map(|&site| self.factorisation(config.site_shape(site))).collect();
            factorising.sort_unstable();
            let factorising: usize = factorising.iter().rev().take(AT_ONCE).sum();
            largest = largest.max(adapter + gradients + kept * all + going_on + factorising);
            let made = in_group().map(|&site| adapter_of(place, config, self.adapter, site));
            adapter += made.map(|(frozen, trained)| frozen + 2 * trained).sum::<usize>(); // with its gradient
            largest = largest.max(adapter + kept * all + going_on);
        }
        largest
    }

    /// Bytes of a micro-batch on its way through a group of `blocks` blocks: the first group's with the head.
    fn activations(&self, index: usize, blocks: usize) -> usize {
        let (BatchSize { tokens, labelled }, footprint) = (self.size.batch, self.footprint);
        let (trained, layers) = (Trained::OfInputs, footprint.config.num_hidden_layers);
        if index > 0 {
            return blocks * footprint.block_saved(tokens)
                + footprint.block_temporary(tokens, Pass::Both(trained));
        }
        let below = layers - blocks;
        let through = footprint.activations(tokens, labelled, Recompute::First(below), trained)
            - below * self.stream(tokens);
        let passing = footprint.block_saved(tokens) + footprint.block_temporary(tokens, Pass::Forward);
        if below > 0 { through.max(passing) } else { through }
    }

    fn stream(&self, tokens: usize) -> usize {
        self.footprint.place.bytes(tokens * self.footprint.config.hidden_size)
    }

    fn lowest(&self) -> usize {
        self.sites.iter().map(|site| site.layer).min().unwrap_or(0)
    }

    /// What a site's factorisation takes beside its gradient.
    fn factorisation(&self, (out, input): (usize, usize)) -> usize {
        let (rank, place) = (self.adapter.rank, self.footprint.place);
        match (self.adapter.method, self.adapter.init.bases) {
            // Twice as many singular vectors as its rank.
            (Method::LoraGa, _) => factorisation(place, DType::F32, (out, input), 2 * rank),
            (_, Bases::SbGradient) => factorisation(place, DType::F32, (out, input), rank),
            // The gradient goes as soon as its signs stand beside it.
            _ => {
                let signs = place.bytes_of(DType::Bf16, out * input);
                let gradient = place.bytes(out * input);
                signs + factorisation(place, DType::Bf16, (out, input), rank).saturating_sub(gradient)
            }
        }
    }
}

fn elements(config: &Config, site: Site) -> usize {
    let (out, input) = config.site_shape(site);
    out * input
}

/// Bytes of the adapter as it is made, with its gradients, and the working set of the largest factorisation where
/// it comes from the SVD of each weight.
pub(super) fn from_weights(request: &MemoryRequest<'_>) -> usize {
    let MemoryRequest { place, config, adapter, sites, .. } = *request;
    let AdapterConfig { method, rank, ref init, .. } = *adapter;
    let from_weights = match method.kind() {
        Kind::Latent => matches!(init.bases, Bases::Xs | Bases::W0Orthonormal),
        _ => method == Method::Pissa,
    };
    if !from_weights {
        return 0;
    }
    let made = |&site: &Site| {
        let (frozen, trained) = adapter_of(place, config, adapter, site);
        frozen + 2 * trained
    };
    let working = |&site: &Site| {
        place.bytes(elements(config, site)) + factorisation(place, DType::F32, config.site_shape(site), rank)
    };
    sites.iter().map(made).sum::<usize>() + sites.iter().map(working).max().unwrap_or(0)
}

fn factorisation(place: Place, dtype: DType, shape: (usize, usize), rank: usize) -> usize {
    truncated_svd_bytes(place, dtype, shape, rank, &SvdOptions::default())
}
