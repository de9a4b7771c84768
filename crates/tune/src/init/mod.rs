//! Where an adapter starts.
//!
//! [`gradient`] streams the summed gradient that LoRA-SB needs; [`sb`], [`xs`] and [`lora`] hold each method's
//! starting values. Every site draws from its own generator of the run's seed, so that leaving a module out of
//! the targets does not shift the others.

pub mod gradient;
pub mod lora;
pub mod sb;
pub mod xs;

use std::collections::BTreeMap;

use lora_sb_data::Example;
use lora_sb_kernels::{Generator, Stream};
use lora_sb_model::{Model, Parameter, Site};

use crate::adapter::Adapter;
use crate::adapter::latent::Latent;
use crate::adapter::lora::Lora;
use crate::{AdapterConfig, Error, Method, Result};

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

/// What LoRA-SB's initialisation did.
#[derive(Clone, Debug, PartialEq)]
pub struct InitReport {
    /// The samples of the gradient.
    pub estimate: Estimate,
    /// Modules whose factorisation stopped at its limit of iterations, short of its tolerance.
    pub unconverged: Vec<String>,
}

/// A new adapter on `sites`, and what its gradient was estimated on where it took one.
///
/// The model must have been prepared for the longest example.
pub(crate) fn start(
    model: &Model,
    sites: &[Site],
    config: &AdapterConfig,
    examples: &[Example],
    progress: &mut dyn FnMut(InitProgress),
) -> Result<(Box<dyn Adapter>, Option<InitReport>)> {
    check_rank(model, sites, config.rank)?;
    let kernels = model.kernels().as_ref();
    let (rank, scale) = (config.rank, config.scale());
    let index = numbering(model);
    let generator = |stream, site: Site| Generator::new(config.seed, stream, index[&site]);
    match config.method {
        Method::LoraSb => {
            let (mut states, mut unconverged) = (BTreeMap::new(), Vec::new());
            let mut each = |site, gradient| {
                let svd = &mut generator(Stream::Svd, site);
                let (state, converged) = sb::start(kernels, gradient, config.init.eta, rank, scale, svd)?;
                states.insert(site, state);
                unconverged.extend((!converged).then(|| model.module(site)));
                Ok(())
            };
            let estimate = stream_gradients(model, sites, examples, &config.init, progress, &mut each)?;
            Ok((Box::new(Latent::new(scale, states)), Some(InitReport { estimate, unconverged })))
        }
        Method::LoraXs => {
            let mut states = BTreeMap::new();
            for &site in sites {
                let Some(weight) = model.weight(Parameter::Weight(site)) else { continue };
                let (svd, draw) = (&mut generator(Stream::Svd, site), &mut generator(Stream::Adapter, site));
                states.insert(site, xs::start(kernels, weight, rank, svd, draw)?);
                progress(InitProgress::Factorised { sites: states.len(), of: sites.len() });
            }
            Ok((Box::new(Latent::new(scale, states)), None))
        }
        Method::Lora => {
            let drawn = |&site: &Site| {
                let draw = &mut generator(Stream::Adapter, site);
                Ok((site, lora::start(kernels, model.shape(site), rank, draw)?))
            };
            let states = sites.iter().map(drawn).collect::<Result<_>>()?;
            Ok((Box::new(Lora::new(scale, states)), None))
        }
        Method::Full => Err(Error::Config {
            name: "method".into(),
            expected: "a method with an adapter".into(),
            found: Method::Full.to_string(),
        }),
    }
}

/// The number of each site among all of the model's, whether it is a target or not.
fn numbering(model: &Model) -> BTreeMap<Site, u64> {
    model.sites().into_iter().zip(0..).collect()
}

/// A matrix has no more singular values than its smaller side.
pub(crate) fn check_rank(model: &Model, sites: &[Site], rank: usize) -> Result<()> {
    for &site in sites {
        let (out, input) = model.shape(site);
        if rank > out.min(input) {
            return Err(Error::RankTooLarge { rank, module: model.module(site), out, input });
        }
    }
    Ok(())
}
