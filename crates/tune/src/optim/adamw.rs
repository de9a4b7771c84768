//! AdamW over everything that is trained.

use std::collections::BTreeMap;

use lora_sb_kernels::{AdamWStep, Tensor};

use crate::adapter::Part;
use crate::{Error, Result, Role, TrainConfig, Tuned};

/// AdamW's moments of every trained tensor, in the order of [`Tuned::visit`], always f32.
#[derive(Debug)]
pub struct AdamW {
    moments: Vec<Moments>,
    step: u64,
}

#[derive(Debug)]
struct Moments {
    name: String,
    first: Tensor,
    second: Tensor,
    group: Group,
}

/// How a tensor is moved.
#[derive(Clone, Copy, Debug)]
struct Group {
    /// Matrices are decayed; tensors of one axis (norms, biases, magnitudes) are not, as in transformers' `Trainer`.
    decayed: bool,
    /// A B, whose learning rate LoRA+ raises (Hayou et al., arXiv 2402.12354).
    factor_b: bool,
}

impl Group {
    fn of(role: Option<Role>, value: &Tensor) -> Group {
        Group { decayed: value.shape().len() > 1, factor_b: role == Some(Role::Part(Part::B)) }
    }
}

/// What the moments are called in files, as in `torch.optim.AdamW`'s state.
const FIRST: &str = "exp_avg";
const SECOND: &str = "exp_avg_sq";

impl AdamW {
    /// Zero moments for everything that `tuned` trains.
    ///
    /// # Errors
    /// Where the device has no room.
    pub fn new(tuned: &mut Tuned) -> Result<AdamW> {
        let kernels = tuned.model.kernels().clone();
        let mut moments = Vec::new();
        let mut roles = tuned.trained_roles().into_iter();
        tuned.visit(&mut |name, value, _| {
            let (first, second) = (kernels.zeros(value.shape())?, kernels.zeros(value.shape())?);
            let group = Group::of(roles.next(), value);
            moments.push(Moments { name: name.to_owned(), first, second, group });
            Ok(())
        })?;
        Ok(AdamW { moments, step: 0 })
    }

    /// How many steps have been taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// One step: every trained tensor moves along its gradient, which is first multiplied by `gradient_scale`.
    /// `learning_rate` is A's; a B moves at `loraplus_lr_ratio` times it.
    ///
    /// # Errors
    /// Where `tuned` trains other tensors than the moments were made for.
    pub fn step(
        &mut self,
        tuned: &mut Tuned,
        config: &TrainConfig,
        learning_rate: f64,
        gradient_scale: f64,
    ) -> Result<()> {
        let kernels = tuned.model.kernels().clone();
        self.step += 1;
        let step = AdamWStep {
            learning_rate,
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
            gradient_scale,
            step: self.step,
        };
        let mut moments = self.moments.iter_mut();
        tuned.visit(&mut |name, value, gradient| {
            let Some(own) = moments.next().filter(|own| own.name == name) else {
                return Err(unexpected(name, "AdamW's moments for it", "none"));
            };
            let weight_decay = if own.group.decayed { step.weight_decay } else { 0.0 };
            let ratio = config.loraplus_lr_ratio.filter(|_| own.group.factor_b).unwrap_or(1.0);
            let step = AdamWStep { learning_rate: learning_rate * ratio, weight_decay, ..step };
            Ok(kernels.adamw(&step, gradient, value, &mut own.first, &mut own.second)?)
        })
    }

    /// The moments for a checkpoint: `<name>.exp_avg` and `<name>.exp_avg_sq` of each trained tensor.
    pub fn tensors(&self) -> Vec<(String, &Tensor)> {
        let mut all = Vec::new();
        for Moments { name, first, second, .. } in &self.moments {
            all.push((format!("{name}.{FIRST}"), first));
            all.push((format!("{name}.{SECOND}"), second));
        }
        all
    }

    /// The moments of a checkpoint after `step` steps.
    ///
    /// # Errors
    /// A tensor that is missing, too many, or of another shape.
    pub fn restore(tuned: &mut Tuned, step: u64, mut tensors: BTreeMap<String, Tensor>) -> Result<AdamW> {
        let mut moments = Vec::new();
        let mut roles = tuned.trained_roles().into_iter();
        tuned.visit(&mut |name, value, _| {
            let mut take = |moment: &str| take(&mut tensors, &format!("{name}.{moment}"), value.shape());
            let (first, second) = (take(FIRST)?, take(SECOND)?);
            let group = Group::of(roles.next(), value);
            moments.push(Moments { name: name.to_owned(), first, second, group });
            Ok(())
        })?;
        match tensors.into_keys().next() {
            None => Ok(AdamW { moments, step }),
            Some(extra) => Err(unexpected(&extra, "only moments of what is trained", "one that is not")),
        }
    }
}

fn take(tensors: &mut BTreeMap<String, Tensor>, name: &str, shape: &[usize]) -> Result<Tensor> {
    let expected = format!("shape {shape:?}");
    match tensors.remove(name) {
        Some(tensor) if tensor.shape() == shape => Ok(tensor),
        Some(tensor) => Err(unexpected(name, &expected, &format!("shape {:?}", tensor.shape()))),
        None => Err(unexpected(name, &expected, "no such tensor")),
    }
}

fn unexpected(tensor: &str, expected: &str, found: &str) -> Error {
    Error::Tensor {
        file: "optimizer state".into(),
        tensor: tensor.into(),
        expected: expected.into(),
        found: found.into(),
    }
}
