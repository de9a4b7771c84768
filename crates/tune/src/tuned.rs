//! A model together with what is trained on it.

use std::collections::{BTreeMap, BTreeSet};

use lora_sb_data::Example;
use lora_sb_kernels::Tensor;
use lora_sb_model::{Batch, Frozen, LinearHook, Model, NoGradients, Parameter, Recompute, Site};

use crate::adapter::{Adapter, Part, Pass, full};
use crate::init::{self, InitProgress, InitReport};
use crate::{AdapterConfig, Error, Method, Result, head};

/// A model and what is trained on it: an adapter, perhaps with a classification head, or all of its own parameters.
#[derive(Debug)]
pub struct Tuned {
    /// The model. With an adapter its weights never change, but for those of a head that is trained.
    pub model: Model,
    trained: Trained,
}

#[derive(Debug)]
enum Trained {
    /// Gradients of the model's own parameters, and the hook that adds nothing.
    Full { gradients: BTreeMap<Parameter, Tensor>, hook: Frozen },
    /// An adapter, with the gradients of the head's trained parameters, the settings it was made by and what its
    /// initialisation did.
    Adapter {
        adapter: Box<dyn Adapter>,
        head: BTreeMap<Parameter, Tensor>,
        config: Box<AdapterConfig>,
        report: Option<InitReport>,
    },
}

/// What a trained tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A part of an adapter.
    Part(Part),
    /// The model's own.
    Parameter(Parameter),
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

    /// A new adapter. LoRA-SB and LoRA-GA take their start from the gradient on `examples`, all of which are used;
    /// the other methods do not read them. [`Method::Full`] gives [`Tuned::full`].
    ///
    /// # Errors
    /// A setting out of range, an unknown target or module of the head, a rank larger than a target's smaller side;
    /// where a gradient is taken, examples without a labelled token, or a gradient that is not finite.
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
        let sites = config.target_modules.resolve(model.config())?;
        let head = head::resolve(&config.modules_to_save, model.config())?;
        model.prepare(examples.iter().map(|example| example.ids.len()).max().unwrap_or(0))?;
        let (adapter, report) = init::start(&model, &sites, config, examples, progress)?;
        let (head, config) = (own(&mut model, head)?, Box::new(config.clone()));
        Ok(Tuned { model, trained: Trained::Adapter { adapter, head, config, report } })
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

    /// What an initialisation from a gradient did; `None` for other methods and for a restored adapter.
    pub fn init_report(&self) -> Option<&InitReport> {
        match &self.trained {
            Trained::Full { .. } => None,
            Trained::Adapter { report, .. } => report.as_ref(),
        }
    }

    /// How many values the optimizer changes, those of a head included.
    pub fn trained_parameters(&self) -> usize {
        self.trained_tensors().iter().map(|(_, tensor)| tensor.len()).sum()
    }

    /// How many of them are the classification head's.
    pub fn head_parameters(&self) -> usize {
        let size = |parameter| self.model.weight(parameter).map_or(0, Tensor::len);
        self.trained_own().into_iter().filter(|parameter| parameter.of_classification()).map(size).sum()
    }

    /// How many values the optimizer would change with another method at the same rank on the same targets (on
    /// all linear layers where this is full fine-tuning), a head not counted but for full fine-tuning.
    pub fn trained_parameters_of(&self, method: Method, rank: usize) -> usize {
        if method == Method::Full {
            let size = |parameter| self.model.weight(parameter).map_or(0, Tensor::len);
            return self.model.parameters().into_iter().map(size).sum();
        }
        let sites = self.adapter().map_or_else(|| self.model.sites(), Adapter::sites);
        sites.into_iter().map(|site| method.trained_values(rank, self.model.shape(site))).sum()
    }

    /// Says what the passes that follow are for. A new or restored model is in [`Pass::Evaluation`].
    pub fn begin(&mut self, pass: Pass) {
        if let Trained::Adapter { adapter, .. } = &mut self.trained {
            adapter.begin(pass);
        }
    }

    /// Changes the gradients of a whole optimizer step where the method wants that, before their norm is taken;
    /// once a step.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn adjust_gradients(&mut self) -> Result<()> {
        let Tuned { model, trained } = self;
        match trained {
            Trained::Full { .. } => Ok(()),
            Trained::Adapter { adapter, .. } => Ok(adapter.adjust_gradients(model.kernels().as_ref())?),
        }
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
            Trained::Adapter { adapter, head, .. } if head.is_empty() => {
                model.loss_and_gradients(batch, adapter.as_mut(), &mut NoGradients, recompute)?
            }
            Trained::Adapter { adapter, head, .. } => {
                model.loss_and_gradients(batch, adapter.as_mut(), head, recompute)?
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

    /// Visits every trained tensor with its gradient, always in the order of the forward pass: an adapter's, then
    /// the head's; or the model's own.
    ///
    /// # Errors
    /// What the visitor returns; a weight that the model maps from its file instead of owning it.
    pub fn visit(&mut self, visitor: &mut TensorVisitor<'_>) -> Result<()> {
        let Tuned { model, trained } = self;
        let own = match trained {
            Trained::Full { gradients, .. } => gradients,
            Trained::Adapter { adapter, head, .. } => {
                adapter.visit(&mut |site, part, value, gradient| {
                    visitor(&part_name(model, site, part), value, gradient)
                })?;
                head
            }
        };
        for parameter in model.parameters() {
            let Some(gradient) = own.get_mut(&parameter) else { continue };
            let name = model.name(parameter);
            if let Some(value) = model.weight_mut(parameter) {
                visitor(&name, value, gradient)?;
            }
        }
        Ok(())
    }

    /// What each tensor is, in the order of [`visit`](Tuned::visit).
    pub fn trained_roles(&self) -> Vec<Role> {
        let parts = self.adapter().map_or_else(Vec::new, Adapter::trained);
        let mut roles: Vec<Role> = parts.into_iter().map(|(_, part, _)| Role::Part(part)).collect();
        roles.extend(self.trained_own().into_iter().map(Role::Parameter));
        roles
    }

    /// The tensors that a checkpoint saves every time: R, or A and B, and a head's; or all weights. In the order of
    /// [`visit`](Tuned::visit).
    pub fn trained_tensors(&self) -> Vec<(String, &Tensor)> {
        let mut tensors = self.adapter().map_or_else(Vec::new, |adapter| self.named(adapter.trained()));
        let named = |parameter| Some((self.model.name(parameter), self.model.weight(parameter)?));
        tensors.extend(self.trained_own().into_iter().filter_map(named));
        tensors
    }

    /// The gradients of what is trained, in the order of [`visit`](Tuned::visit).
    pub fn gradients(&self) -> Vec<&Tensor> {
        let mut gradients = self.adapter().map_or_else(Vec::new, Adapter::gradients);
        let own = self.own_gradients();
        gradients.extend(self.trained_own().into_iter().filter_map(|parameter| own.get(&parameter)));
        gradients
    }

    /// The tensors that are saved once: A and B of the r x r family, and what an update is taken relative to.
    pub fn frozen_tensors(&self) -> Vec<(String, &Tensor)> {
        self.adapter().map_or_else(Vec::new, |adapter| self.named(adapter.frozen()))
    }

    /// The gradients of the model's own parameters that are trained.
    fn own_gradients(&self) -> &BTreeMap<Parameter, Tensor> {
        match &self.trained {
            Trained::Full { gradients, .. } => gradients,
            Trained::Adapter { head, .. } => head,
        }
    }

    /// The model's own parameters that are trained, in order.
    fn trained_own(&self) -> Vec<Parameter> {
        let own = self.own_gradients();
        self.model.parameters().into_iter().filter(|parameter| own.contains_key(parameter)).collect()
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

/// Makes parameters trainable, which a model may map from its file, and gives each a gradient of zero.
pub(crate) fn own(model: &mut Model, parameters: Vec<Parameter>) -> Result<BTreeMap<Parameter, Tensor>> {
    let kernels = model.kernels().clone();
    let mut gradients = BTreeMap::new();
    for parameter in parameters {
        let Some(weight) = model.weight_mut(parameter) else { continue };
        *weight = kernels.to_owned_f32(weight)?;
        gradients.insert(parameter, kernels.zeros(weight.shape())?);
    }
    Ok(gradients)
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
    pub(crate) fn restore(mut self, mut model: Model, config: &AdapterConfig) -> Result<Tuned> {
        if config.method == Method::Full {
            return self.full(model);
        }
        config.validate()?;
        let sites = config.target_modules.resolve(model.config())?;
        let head = head::resolve(&config.modules_to_save, model.config())?;
        let mut take = |site, part| self.part(&model, site, part, config.rank);
        let adapter = init::restore(&model, &sites, config, &mut take)?;
        let head = own(&mut model, head)?;
        self.overwrite(&mut model, head.keys().copied())?;
        self.finish()?;
        let config = Box::new(config.clone());
        Ok(Tuned { model, trained: Trained::Adapter { adapter, head, config, report: None } })
    }

    fn full(mut self, mut model: Model) -> Result<Tuned> {
        let parameters = model.parameters();
        self.overwrite(&mut model, parameters)?;
        self.finish()?;
        Tuned::full(model)
    }

    /// Gives the model's own parameters their saved values.
    fn overwrite(
        &mut self,
        model: &mut Model,
        parameters: impl IntoIterator<Item = Parameter>,
    ) -> Result<()> {
        let kernels = model.kernels().clone();
        for parameter in parameters {
            let name = model.name(parameter);
            let Some(weight) = model.weight_mut(parameter) else { continue };
            let saved = self.take(&name, weight.shape())?;
            kernels.write_f32(weight, &kernels.to_f32(&saved)?)?;
        }
        Ok(())
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
