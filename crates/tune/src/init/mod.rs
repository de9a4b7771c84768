//! Where an adapter starts: from nothing, or from what was saved of it.
//!
//! [`gradient`] streams the summed gradient that LoRA-SB and LoRA-GA need, and [`bases`] holds the starts that the r x
//! r family can choose from; each method's own stands in [`method`](crate::method). Every site draws from its own
//! generator of the run's seed, so that leaving a module out of the targets does not shift the others.

pub mod bases;
pub mod gradient;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError, mpsc};

use lora_sb_data::Example;
use lora_sb_kernels::{Generator, Kernels, Stream, Tensor};
use lora_sb_model::{Model, Parameter, Site};

use crate::adapter::dora::{Dora, DoraSite};
use crate::adapter::latent::{Latent, LatentSite};
use crate::adapter::lora::{Gradients, Lora, LoraSite};
use crate::adapter::{Adapter, Part};
use crate::method::{Kind, dora, lora, lora_ga, lora_sb, lora_xs, pissa};
use crate::plan::{EstimatePlan, EstimateSize, check_rank};
use crate::{AdapterConfig, Bases, Error, Method, Result};

pub use gradient::{Estimate, stream_gradients};

/// How far an initialisation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitProgress {
    /// Samples whose loss has been computed.
    Forward {
        /// Done.
        samples: usize,
        /// All of them.
        of: usize,
    },
    /// Sites whose gradient is complete and whose factors are made.
    Factorised {
        /// Done.
        sites: usize,
        /// All of them.
        of: usize,
    },
}

/// What there is to say of an initialisation.
#[derive(Clone, Debug, PartialEq)]
pub struct InitReport {
    /// The samples of the gradient, where one was taken.
    pub estimate: Option<Estimate>,
    /// Modules whose factorisation stopped at its limit of iterations, short of its tolerance.
    pub unconverged: Vec<String>,
}

/// A new adapter on `sites`, and what there is to say of its start.
///
/// The model must have been prepared for the longest example.
pub(crate) fn start(
    model: &Model,
    sites: &[Site],
    config: &AdapterConfig,
    examples: &[Example],
    progress: &mut dyn FnMut(InitProgress),
) -> Result<(Box<dyn Adapter>, Option<InitReport>)> {
    check_rank(model.config(), sites, config.method, config.rank)?;
    let report = InitReport { estimate: None, unconverged: Vec::new() };
    let mut start = Start { model, sites, config, examples, progress, report };
    let kernels = model.kernels().as_ref();
    let (rank, scale, AdapterConfig { init, .. }) = (config.rank, config.scale(), config);
    let adapter: Box<dyn Adapter> = match config.method {
        Method::Full => return Err(no_adapter()),
        Method::Lora | Method::RsLora | Method::LoraPro => product(
            config,
            start.of_weights(|weight, Draws { adapter, .. }| {
                Ok((lora::start(kernels, (weight.shape()[0], weight.shape()[1]), rank, adapter)?, true))
            })?,
        ),
        Method::Pissa => product(
            config,
            start.of_weights(|weight, draws| pissa::start(kernels, weight, rank, scale, &mut draws.svd))?,
        ),
        Method::LoraGa => product(
            config,
            start.of_gradients(|gradient, draws| lora_ga::start(kernels, gradient, rank, &mut draws.svd))?,
        ),
        Method::Dora => magnitude(
            config,
            start.of_weights(|weight, draws| {
                Ok((dora::start(kernels, weight, rank, &mut draws.adapter)?, true))
            })?,
        ),
        Method::LoraXs | Method::LoraSb => latent(
            kernels,
            config,
            match init.bases {
                Bases::Sb | Bases::SbGradient | Bases::SbZero => start.of_gradients(|gradient, draws| {
                    lora_sb::start(kernels, gradient, init.bases, init.eta, rank, scale, &mut draws.svd)
                }),
                Bases::Xs => start.of_weights(|weight, Draws { svd, adapter }| {
                    lora_xs::start(kernels, weight, rank, svd, adapter)
                }),
                Bases::W0Orthonormal => {
                    start.of_weights(|weight, draws| bases::of_weight(kernels, weight, rank, &mut draws.svd))
                }
                Bases::RandomOrthonormal => start.of_weights(|weight, Draws { adapter, .. }| {
                    let shape = (weight.shape()[0], weight.shape()[1]);
                    Ok((bases::random(kernels, shape, rank, adapter)?, true))
                }),
            }?,
        )?,
    };
    let InitReport { estimate, unconverged } = &start.report;
    let told = estimate.is_some() || !unconverged.is_empty();
    Ok((adapter, told.then_some(start.report)))
}

/// The adapter on `sites` of tensors that were saved of it; `take` gives each in its part's
/// [shape](Part::shape), in f32.
pub(crate) fn restore(
    model: &Model,
    sites: &[Site],
    config: &AdapterConfig,
    take: &mut dyn FnMut(Site, Part) -> Result<Tensor>,
) -> Result<Box<dyn Adapter>> {
    // Factors of any rank are an adapter; it is only a start that has no more than a weight's singular vectors.
    let kernels = model.kernels().as_ref();
    Ok(match config.method.kind() {
        Kind::Weights => return Err(no_adapter()),
        Kind::Product => {
            let mut states = BTreeMap::new();
            for &site in sites {
                let (a, b) = (take(site, Part::A)?, take(site, Part::B)?);
                let state = if config.method.subtracts_start() {
                    let start = (take(site, Part::StartA)?, take(site, Part::StartB)?);
                    LoraSite::relative(kernels, a, b, start)?
                } else {
                    LoraSite::new(kernels, a, b)?
                };
                states.insert(site, state);
            }
            product(config, states)
        }
        Kind::Magnitude => {
            let mut states = BTreeMap::new();
            for &site in sites {
                let Some(weight) = model.weight(Parameter::Weight(site)) else { continue };
                let (a, b, magnitude) =
                    (take(site, Part::A)?, take(site, Part::B)?, take(site, Part::Magnitude)?);
                states.insert(site, DoraSite::new(kernels, weight, a, b, magnitude)?);
            }
            magnitude(config, states)
        }
        Kind::Latent => {
            let mut states = BTreeMap::new();
            for &site in sites {
                let (a, b, r) = (take(site, Part::A)?, take(site, Part::B)?, take(site, Part::R)?);
                states.insert(site, LatentSite::new(a, b, r));
            }
            latent(kernels, config, states)?
        }
    })
}

fn product(config: &AdapterConfig, sites: BTreeMap<Site, LoraSite>) -> Box<dyn Adapter> {
    let gradients = match config.method {
        Method::LoraPro => Gradients::Nearest,
        _ => Gradients::Plain,
    };
    Box::new(Lora::new(config.scale(), config.lora_dropout, gradients, sites))
}

fn magnitude(config: &AdapterConfig, sites: BTreeMap<Site, DoraSite>) -> Box<dyn Adapter> {
    Box::new(Dora::new(config.scale(), config.lora_dropout, sites))
}

fn latent(
    kernels: &dyn Kernels,
    config: &AdapterConfig,
    sites: BTreeMap<Site, LatentSite>,
) -> Result<Box<dyn Adapter>> {
    Ok(Box::new(Latent::new(kernels, config.scale(), config.lora_dropout, sites)?))
}

/// A site's generators.
struct Draws {
    /// For the SVD's range finder.
    svd: Generator,
    /// For the adapter's own values.
    adapter: Generator,
}

/// A start on its way through the sites.
struct Start<'a> {
    model: &'a Model,
    sites: &'a [Site],
    config: &'a AdapterConfig,
    examples: &'a [Example],
    progress: &'a mut dyn FnMut(InitProgress),
    report: InitReport,
}

impl Start<'_> {
    /// Makes each site's adapter from its weight; `make` also says whether its factorisation converged.
    fn of_weights<S>(
        &mut self,
        mut make: impl FnMut(&Tensor, &mut Draws) -> lora_sb_kernels::Result<(S, bool)>,
    ) -> Result<BTreeMap<Site, S>> {
        let (index, mut states) = (numbering(self.model), BTreeMap::new());
        for &site in self.sites {
            let Some(weight) = self.model.weight(Parameter::Weight(site)) else { continue };
            let module = self.model.module(site);
            let made = make(weight, &mut draws(self.config.seed, index[&site]));
            if made.is_err() && !self.model.kernels().to_f32(weight)?.iter().all(|value| value.is_finite()) {
                // What failed knows a matrix, not whose it is.
                return Err(Error::NotFinite { what: format!("the weight of {module}") });
            }
            let (state, converged) = made?;
            self.report.unconverged.extend((!converged).then_some(module));
            states.insert(site, state);
            (self.progress)(InitProgress::Factorised { sites: states.len(), of: self.sites.len() });
        }
        Ok(states)
    }

    /// Makes each site's adapter from its gradient on the examples; `make` as there.
    fn of_gradients<S: Send>(
        &mut self,
        make: impl Fn(Tensor, &mut Draws) -> lora_sb_kernels::Result<(S, bool)> + Sync,
    ) -> Result<BTreeMap<Site, S>> {
        let Start { model, sites, config, examples, progress, report } = self;
        let (index, mut states, mut made) = (numbering(model), BTreeMap::new(), 0);
        let progress = RefCell::new(progress);
        let mut take = |gradients: BTreeMap<Site, Tensor>| {
            let make = |site, gradient| make(gradient, &mut draws(config.seed, index[&site]));
            let group = factorise(gradients, &make, &mut || {
                made += 1;
                progress.borrow_mut()(InitProgress::Factorised { sites: made, of: sites.len() });
            })?;
            for (site, (state, converged)) in group {
                report.unconverged.extend((!converged).then(|| model.module(site)));
                states.insert(site, state);
            }
            Ok(())
        };
        let plan = EstimatePlan {
            footprint: model.footprint(),
            adapter: config,
            sites,
            size: EstimateSize::of(*examples, config.init.max_tokens),
        };
        let (blocks, mut forward) = (plan.blocks_at_once(), |done| progress.borrow_mut()(done));
        let estimate =
            stream_gradients(model, sites, examples, &config.init, blocks, &mut forward, &mut take)?;
        report.estimate = Some(estimate);
        Ok(states)
    }
}

/// Factorisations at a time: the small problems of one, on the host, beside the products of another.
pub(crate) const AT_ONCE: usize = 2;

/// What `make` makes of each site's gradient, two at a time, the last sites first; `done` hears of each.
///
/// # Errors
/// The first that `make` returned.
pub fn factorise<G: Send, S: Send>(
    gradients: BTreeMap<Site, G>,
    make: &(dyn Fn(Site, G) -> lora_sb_kernels::Result<S> + Sync),
    done: &mut dyn FnMut(),
) -> Result<BTreeMap<Site, S>> {
    let queue = Mutex::new(gradients.into_iter().rev());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    std::thread::scope(|scope| {
        let (sender, made) = mpsc::channel();
        for sender in vec![sender; AT_ONCE] {
            scope.spawn(move || {
                while let Some((site, gradient)) = next() {
                    if sender.send((site, make(site, gradient))).is_err() {
                        break; // another has failed
                    }
                }
            });
        }
        let mut states = BTreeMap::new();
        for (site, state) in made {
            states.insert(site, state?);
            done();
        }
        Ok(states)
    })
}

fn draws(seed: u64, site: u64) -> Draws {
    let [svd, adapter] = [Stream::Svd, Stream::Adapter].map(|stream| Generator::new(seed, stream, site));
    Draws { svd, adapter }
}

/// The number of each site among all of the model's, whether it is a target or not.
fn numbering(model: &Model) -> BTreeMap<Site, u64> {
    model.sites().into_iter().zip(0..).collect()
}

fn no_adapter() -> Error {
    Error::Config {
        name: "method".into(),
        expected: "a method with an adapter".into(),
        found: Method::Full.to_string(),
    }
}
