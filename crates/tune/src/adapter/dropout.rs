//! Dropout of an adapter's input, as PEFT has it: the layer's own product `x W0^T` sees all of x.
//!
//! `D` is the mask of one pass and one site over `1 - rate`: the adapter computes with `x D` (elementwise), and
//! `dx += (dxd) D` for the gradient `dxd` of what it saw. The mask follows from the pass's seed and the site, so
//! that forward, backward and a block that is run again drop the same elements.

use lora_sb_kernels::{Accum, Generator, Kernels, Result, Stream, Tensor};
use lora_sb_model::{Layer, Site};

use super::Pass;

/// What an adapter drops of its inputs.
#[derive(Clone, Copy, Debug)]
pub struct InputDropout {
    rate: f32,
    pass: Pass,
}

impl InputDropout {
    /// Drops elements in training with probability `rate`, at least 0 and below 1.
    pub fn new(rate: f64) -> Self {
        InputDropout { rate: rate as f32, pass: Pass::Evaluation }
    }

    /// Says what the passes that follow are for.
    pub fn begin(&mut self, pass: Pass) {
        self.pass = pass;
    }

    /// Whether the passes drop anything.
    pub fn drops(&self) -> bool {
        self.rate > 0.0 && matches!(self.pass, Pass::Training { .. })
    }

    /// What is left of x `[T, K]` at a site; `None` where nothing is dropped, and x itself is meant.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn apply(&self, kernels: &dyn Kernels, site: Site, x: &Tensor) -> Result<Option<Tensor>> {
        let Some(seed) = self.seed(site) else { return Ok(None) };
        let mut dropped = kernels.empty_of(x.dtype(), x.shape())?; // [T, K]
        kernels.dropout(self.rate, seed, x, Accum::Replace, &mut dropped)?;
        Ok(Some(dropped))
    }

    /// `dx (+)= dy W0 + D (v A)` for a `term` (v, A): the gradient of a layer's input, what the adapter adds to it
    /// passing the mask. Where nothing is dropped it is one pass over dx.
    ///
    /// dy `[T, N]`, dx `[T, K]`; v `[T, r]` of dy's type, A `[r, K]`.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn input_gradient(
        &self,
        kernels: &dyn Kernels,
        layer: Layer<'_>,
        dy: &Tensor,
        term: (&Tensor, &Tensor),
        (dx, accum): (&mut Tensor, Accum),
    ) -> Result<()> {
        if self.seed(layer.site).is_none() {
            return layer.input_gradient(kernels, dy, Some(term), accum, dx);
        }
        layer.input_gradient(kernels, dy, None, accum, dx)?;
        self.backward(kernels, layer.site, dx, |seen| {
            kernels.linear_input_gradient(term.0, term.1, 1.0, Accum::Replace, seen)
        })
    }

    /// Adds to dx `[T, K]` the gradient of what the adapter saw, which `write` makes, through the mask.
    ///
    /// # Errors
    /// Where `write` or the device fails.
    pub fn backward(
        &self,
        kernels: &dyn Kernels,
        site: Site,
        dx: &mut Tensor,
        write: impl FnOnce(&mut Tensor) -> Result<()>,
    ) -> Result<()> {
        let mut seen = kernels.empty_of(dx.dtype(), dx.shape())?; // [T, K]
        write(&mut seen)?;
        match self.seed(site) {
            Some(seed) => kernels.dropout(self.rate, seed, &seen, Accum::Add, dx),
            None => kernels.add(1.0, &seen, dx),
        }
    }

    /// Of the mask at a site; `None` where nothing is dropped.
    fn seed(&self, site: Site) -> Option<u64> {
        match self.pass {
            Pass::Training { seed } if self.rate > 0.0 => {
                let site = (site.layer as u64) << 8 | site.projection as u64;
                Some(Generator::new(seed, Stream::Dropout, site).unit().to_bits())
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use lora_sb_model::Projection;

    use super::*;

    #[test]
    fn masks_differ_by_site_and_seed_and_by_nothing_else() {
        let at = |seed, site| {
            let mut dropout = InputDropout::new(0.1);
            dropout.begin(Pass::Training { seed });
            dropout.seed(site)
        };
        let sites = [Projection::Query.of(0), Projection::Key.of(0), Projection::Query.of(1)];
        let mut seeds: Vec<_> = (1..4).flat_map(|seed| sites.map(|site| at(seed, site).unwrap())).collect();
        assert_eq!(at(1, sites[0]), Some(seeds[0]));
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 9);
    }

    #[test]
    fn nothing_is_dropped_in_evaluation_or_at_rate_0() {
        let site = Projection::Up.of(2);
        assert_eq!(InputDropout::new(0.5).seed(site), None);
        let mut dropout = InputDropout::new(0.0);
        dropout.begin(Pass::Training { seed: 3 });
        assert_eq!(dropout.seed(site), None);
    }
}
