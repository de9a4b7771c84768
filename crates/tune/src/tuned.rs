//! A model together with what is trained on it.

use std::collections::{BTreeMap, BTreeSet};

use lora_sb_data::Example;
use lora_sb_kernels::Tensor;
use lora_sb_model::{Batch, Frozen, LinearHook, Model, NoGradients, Parameter, Recompute, Site};

use crate::adapter::latent::{Latent, LatentSite};
use crate::adapter::lora::{Lora, LoraSite};
use crate::adapter::{Adapter, Part, full};
use crate::init::{self, InitProgress, InitReport};
use crate::{AdapterConfig, Error, Method, Result};

/// A model and what is trained on it: an adapter, or all of its own parameters.
#[derive(Debug)]
pub struct Tuned {
    /// The model. With an adapter its weights never change.
    pub model: Model,
    trained: Trained,
}

#[derive(Debug)]
enum Trained {
    /// Gradients of the model's own parameters, and the hook that adds nothing.
    Full { gradients: BTreeMap<Parameter, Tensor>, hook: Frozen },
    /// An adapter, with the settings it was made by and what its initialisation did.
    Adapter { adapter: Box<dyn Adapter>, config: AdapterConfig, report: Option<InitReport> },
}

/// What the optimizer sees of one tensor: its name, its value and its gradient.
pub type TensorVisitor<'a> = dyn FnMut(&str, &mut Tensor, &mut Tensor) -> Result<()> + 'a;

impl Tuned {
    /// Full fine-tuning of a model whose weights were loaded as
    /// [`Storage::Trainable`](lora_sb_model::Storage::Trainable).
    ///
    /// # Errors
    /// Where the device has no room for the gradients.
    pub fn full(model: Model) -> Result<Tuned> {
        let gradients = full::gradients(&model)?;
        Ok(Tuned { model, trained: Trained::Full { gradients, hook: Frozen } })
    }

    /// A new adapter. LoRA-SB takes its bases from the gradient on `examples`, all of which are used; the other
    /// methods do not read them. [`Method::Full`] gives [`Tuned::full`].
    ///
    /// # Errors
    /// A setting out of range, an unknown target, a rank larger than a target's smaller side; for LoRA-SB
    /// examples without a labelled token, or a gradient that is not finite.
    pub fn adapt(
        mut model: Model,
        config: &AdapterConfig,
        examples: &[Example],
        progress: &mut dyn FnMut(InitProgress),
    ) -> Result<Tuned> {
        if config.method == Method::Full {
            return Tuned::full(model);
        }
        config.validate()?;
        let sites = config.target_modules.resolve(&model)?;
        model.prepare(examples.iter().map(|example| example.ids.len()).max().unwrap_or(0))?;
        let (adapter, report) = init::start(&model, &sites, config, examples, progress)?;
        Ok(Tuned { model, trained: Trained::Adapter { adapter, config: config.clone(), report } })
    }

    /// The adapter (for [`Method::Full`], the parameters) of saved tensors, named as by
    /// [`trained_tensors`](Tuned::trained_tensors) and [`frozen_tensors`](Tuned::frozen_tensors).
    ///
    /// # Errors
    /// A tensor that is missing, too many, or of another shape; an unknown target; a rank out of range.
    pub fn restore(model: Model, config: &AdapterConfig, tensors: BTreeMap<String, Tensor>) -> Result<Tuned> {
        Restoring { origin: "saved state", tensors }.restore(model, config)
    }

    /// What is trained.
    pub fn method(&self) -> Method {
        self.config().map_or(Method::Full, |config| config.method)
    }

    /// The settings that the adapter was made by; `None` for full fine-tuning.
    pub fn config(&self) -> Option<&AdapterConfig> {
        match &self.trained {
            Trained::Full { .. } => None,
            Trained::Adapter { config, .. } => Some(config),
        }
    }

    /// The adapter; `None` for full fine-tuning.
    pub fn adapter(&self) -> Option<&dyn Adapter> {
        match &self.trained {
            Trained::Full { .. } => None,
            Trained::Adapter { adapter, .. } => Some(adapter.as_ref()),
        }
    }

    /// What LoRA-SB's initialisation did; `None` for other methods and for a restored adapter.
    pub fn init_report(&self) -> Option<&InitReport> {
        match &self.trained {
            Trained::Full { .. } => None,
            Trained::Adapter { report, .. } => report.as_ref(),
        }
    }

    /// How many values the optimizer changes.
    pub fn trained_parameters(&self) -> usize {
        self.trained_tensors().iter().map(|(_, tensor)| tensor.len()).sum()
    }

    /// How many values the optimizer would change with another method at the same rank on the same targets (on
    /// all linear layers where this is full fine-tuning).
    pub fn trained_parameters_of(&self, method: Method, rank: usize) -> usize {
        if method == Method::Full {
            let size = |parameter| self.model.weight(parameter).map_or(0, Tensor::len);
            return self.model.parameters().into_iter().map(size).sum();
        }
        let sites = self.adapter().map_or_else(|| self.model.sites(), Adapter::sites);
        sites.into_iter().map(|site| method.trained_values(rank, self.model.shape(site))).sum()
    }

    /// The mean loss of a batch (weighted as the batch says), without gradients.
    ///
    /// # Errors
    /// Where the model fails.
    pub fn loss(&self, batch: &Batch) -> Result<f64> {
        Ok(self.model.loss(batch, self.hook())?)
    }

    /// The loss of a batch; its gradients are added to those that stand.
    ///
    /// # Errors
    /// Where the model fails.
    pub fn loss_and_gradients(&mut self, batch: &Batch, recompute: Recompute) -> Result<f64> {
        let Tuned { model, trained } = self;
        Ok(match trained {
            Trained::Full { gradients, hook } => {
                model.loss_and_gradients(batch, hook, gradients, recompute)?
            }
            Trained::Adapter { adapter, .. } => {
                model.loss_and_gradients(batch, adapter.as_mut(), &mut NoGradients, recompute)?
            }
        })
    }

    /// Sets all gradients to zero.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn zero_gradients(&mut self) -> Result<()> {
        let kernels = self.model.kernels().clone();
        self.visit(&mut |_, _, gradient| Ok(kernels.fill(0.0, gradient)?))
    }

    /// Visits every trained tensor with its gradient, always in the order of the forward pass.
    ///
    /// # Errors
    /// What the visitor returns; a weight that the model maps from its file instead of owning it.
    pub fn visit(&mut self, visitor: &mut TensorVisitor<'_>) -> Result<()> {
        let Tuned { model, trained } = self;
        match trained {
            Trained::Adapter { adapter, .. } => adapter.visit(&mut |site, part, value, gradient| {
                visitor(&part_name(model, site, part), value, gradient)
            }),
            Trained::Full { gradients, .. } => {
                for parameter in model.parameters() {
                    let name = model.name(parameter);
                    let gradient = gradients.get_mut(&parameter);
                    if let (Some(value), Some(gradient)) = (model.weight_mut(parameter), gradient) {
                        visitor(&name, value, gradient)?;
                    }
                }
                Ok(())
            }
        }
    }

    /// The tensors that a checkpoint saves every time: R; or A and B; or all weights. In the order of
    /// [`visit`](Tuned::visit).
    pub fn trained_tensors(&self) -> Vec<(String, &Tensor)> {
        match &self.trained {
            Trained::Adapter { adapter, .. } => self.named(adapter.trained()),
            Trained::Full { .. } => {
                let named = |parameter| Some((self.model.name(parameter), self.model.weight(parameter)?));
                self.model.parameters().into_iter().filter_map(named).collect()
            }
        }
    }

    /// The tensors that are saved once: A and B of the r x r family.
    pub fn frozen_tensors(&self) -> Vec<(String, &Tensor)> {
        self.adapter().map_or_else(Vec::new, |adapter| self.named(adapter.frozen()))
    }

    /// What the model calls at each linear layer, for generation and evaluation.
    pub fn hook(&self) -> &dyn LinearHook {
        match &self.trained {
            Trained::Full { hook, .. } => hook,
            Trained::Adapter { adapter, .. } => adapter.as_ref(),
        }
    }

    fn named<'a>(&self, parts: Vec<(Site, Part, &'a Tensor)>) -> Vec<(String, &'a Tensor)> {
        let named = |(site, part, tensor)| (part_name(&self.model, site, part), tensor);
        parts.into_iter().map(named).collect()
    }
}

/// The name of an adapter's tensor in files and for the optimizer, as `model.layers.0.mlp.up_proj.lora_R`.
fn part_name(model: &Model, site: Site, part: Part) -> String {
    format!("{}.{}", model.module(site), part.name())
}

/// Saved tensors on their way into a [`Tuned`]; each is taken once, and none may be left.
pub(crate) struct Restoring<'a> {
    /// The file, for messages.
    pub(crate) origin: &'a str,
    /// The tensors by name.
    pub(crate) tensors: BTreeMap<String, Tensor>,
}

impl Restoring<'_> {
    /// See [`Tuned::restore`].
    pub(crate) fn restore(mut self, model: Model, config: &AdapterConfig) -> Result<Tuned> {
        if config.method == Method::Full {
            return self.full(model);
        }
        config.validate()?;
        let sites = config.target_modules.resolve(&model)?;
        init::check_rank(&model, &sites, config.rank)?;
        let adapter: Box<dyn Adapter> = match config.method {
            Method::Lora => {
                let site = |site: Site| {
                    let [a, b] = [Part::A, Part::B].map(|part| self.part(&model, site, part, config.rank));
                    Ok((site, LoraSite::new(model.kernels().as_ref(), a?, b?)?))
                };
                let states = sites.into_iter().map(site).collect::<Result<_>>()?;
                Box::new(Lora::new(config.scale(), states))
            }
            _ => {
                let site = |site: Site| {
                    let parts = [Part::A, Part::B, Part::R];
                    let [a, b, r] = parts.map(|part| self.part(&model, site, part, config.rank));
                    Ok((site, LatentSite::new(model.kernels().as_ref(), a?, b?, r?)?))
                };
                let states = sites.into_iter().map(site).collect::<Result<_>>()?;
                Box::new(Latent::new(config.scale(), states))
            }
        };
        self.finish()?;
        Ok(Tuned { model, trained: Trained::Adapter { adapter, config: config.clone(), report: None } })
    }

    fn full(mut self, mut model: Model) -> Result<Tuned> {
        let kernels = model.kernels().clone();
        for parameter in model.parameters() {
            let name = model.name(parameter);
            let Some(weight) = model.weight_mut(parameter) else { continue };
            let saved = self.take(&name, weight.shape())?;
            kernels.write_f32(weight, &kernels.to_f32(&saved)?)?;
        }
        self.finish()?;
        Tuned::full(model)
    }

    fn part(&mut self, model: &Model, site: Site, part: Part, rank: usize) -> Result<Tensor> {
        let saved = self.take(&part_name(model, site, part), &part.shape(rank, model.shape(site)))?;
        Ok(model.kernels().to_owned_f32(&saved)?)
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let expected = format!("shape {shape:?}");
        let wrong = |found: String| {
            Err(Error::Tensor { file: self.origin.into(), tensor: name.into(), expected, found })
        };
        match self.tensors.remove(name) {
            Some(tensor) if tensor.shape() == shape => Ok(tensor),
            Some(tensor) => wrong(format!("shape {:?}", tensor.shape())),
            None => wrong("no such tensor".into()),
        }
    }

    fn finish(self) -> Result<()> {
        let left: BTreeSet<String> = self.tensors.into_keys().collect();
        let Some(first) = left.first() else { return Ok(()) };
        Err(Error::Tensor {
            file: self.origin.into(),
            tensor: first.clone(),
            expected: "only the tensors of the adapter".into(),
            found: format!("{} that do not belong to it", left.len()),
        })
    }
}
