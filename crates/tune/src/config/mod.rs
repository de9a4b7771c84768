//! The settings of a training run, resolved: every value is what will be used.
//!
//! Names are those of `transformers.TrainingArguments` and TRL's `SFTConfig`. A run's total is counted in
//! optimizer steps: one is `gradient_accumulation_steps` micro-batches of `per_device_train_batch_size`
//! examples, and the last, shorter one of an epoch counts too.

mod byte_size;
mod checkpointing;
mod precision;

use lora_sb_model::{Recompute, Task};
use serde::{Deserialize, Serialize};

pub use self::byte_size::ByteSize;
pub use self::checkpointing::GradientCheckpointing;
pub use self::precision::Precision;
use crate::eval::{Metric, metrics_of};
use crate::method::Kind;
use crate::optim::{Schedule, Scheduler};
use crate::{Error, Method, Result};

/// The keys of a plan that may change between a run and its resumption: no result depends on them, but for the device,
/// whose kind decides the order of sums and is a machine's matter nevertheless.
pub const CHANGEABLE_ON_RESUME: [&str; 8] = [
    "device",
    "gradient_checkpointing",
    "logging_steps",
    "memory_limit",
    "output_dir",
    "save_steps",
    "save_total_limit",
    "threads",
];

/// How a model is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// LoRA+ (Hayou et al., arXiv 2402.12354): the learning rate of every B is that of A times this; left out, it
    /// is the same.
    pub loraplus_lr_ratio: Option<f64>,
    /// The course of the learning rate after the warm-up.
    pub lr_scheduler_type: Scheduler,
    /// Warm-up as a share of all optimizer steps, rounded up; read where `warmup_steps` is 0.
    pub warmup_ratio: f64,
    /// Warm-up in optimizer steps; 0 leaves it to `warmup_ratio`.
    pub warmup_steps: usize,
    /// Decoupled weight decay of matrices; biases and norms (one axis) are never decayed.
    pub weight_decay: f64,
    /// Decay of AdamW's first moment.
    pub adam_beta1: f64,
    /// Decay of AdamW's second moment.
    pub adam_beta2: f64,
    /// Added to the root of AdamW's second moment.
    pub adam_epsilon: f64,
    /// Gradients are scaled down to this global norm; 0 leaves them as they are.
    pub max_grad_norm: f64,
    /// Examples of one micro-batch, packed into one sequence of tokens.
    pub per_device_train_batch_size: usize,
    /// Examples of one batch of the evaluation.
    pub per_device_eval_batch_size: usize,
    /// Micro-batches of one optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Passes over the training examples; read where `max_steps` is not set.
    pub num_train_epochs: f64,
    /// The number of optimizer steps, over as many epochs as they take.
    pub max_steps: Option<usize>,
    /// The longest example in tokens.
    pub max_length: usize,
    /// Steps between two evaluations; 0 evaluates at the start and at the end alone.
    pub eval_steps: usize,
    /// Steps between two checkpoints; 0 saves at the start, at the end and at each new best alone.
    pub save_steps: usize,
    /// How many of the newest checkpoints are kept, the best not counted; `None` keeps all.
    pub save_total_limit: Option<usize>,
    /// The metric of the held-out examples by which the best checkpoint is chosen; left out, their loss.
    pub metric_for_best_model: Option<Metric>,
    /// Steps between two lines of a display; `metrics.jsonl` holds every step.
    pub logging_steps: usize,
    /// The run's seed: the order of the examples, and whatever else is drawn.
    pub seed: u64,
    /// What the model computes in.
    pub dtype: Precision,
    /// Which blocks keep their input alone and are computed again in the backward pass.
    pub gradient_checkpointing: GradientCheckpointing,
    /// Tokens whose loss is computed together; left out, as many as take 32 MiB, or as a plan decides
    /// ([`fit`](crate::plan::fit)).
    pub loss_chunk: Option<usize>,
    /// The most memory that the process may take; left out, what the system has. A plan is held to it, and a run
    /// that would take more is not begun.
    pub memory_limit: Option<ByteSize>,
}

impl TrainConfig {
    /// The values used where none are given, for a decoder.
    ///
    /// | what | value | source |
    /// |---|---|---|
    /// | learning rate, LoRA-SB | 2e-3, linear, warm-up 0.02 | the paper's Llama recipe, arXiv 2411.19557, commonsense |
    /// | examples a step | 32 | its mathematics recipe |
    /// | learning rate, LoRA-XS | 4e-3 | arXiv 2405.17604 |
    /// | learning rate, LoRA and all that train A and B | 2e-4 | QLoRA, arXiv 2305.14314 |
    /// | learning rate, full fine-tuning | 2e-5 | TRL |
    pub fn defaults(method: Method) -> Self {
        let learning_rate = match (method, method.kind()) {
            (Method::LoraXs, _) => 4e-3,
            (_, Kind::Latent) => 2e-3,
            (_, Kind::Product | Kind::Magnitude) => 2e-4,
            (_, Kind::Weights) => 2e-5,
        };
        TrainConfig {
            learning_rate,
            loraplus_lr_ratio: None,
            lr_scheduler_type: Scheduler::Linear,
            warmup_ratio: 0.02,
            warmup_steps: 0,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            per_device_train_batch_size: 4,
            per_device_eval_batch_size: 4,
            gradient_accumulation_steps: 8,
            num_train_epochs: 1.0,
            max_steps: None,
            max_length: 512,
            eval_steps: 100,
            save_steps: 100,
            save_total_limit: Some(2),
            metric_for_best_model: None,
            logging_steps: 10,
            seed: 42,
            dtype: Precision::F32,
            gradient_checkpointing: GradientCheckpointing::Auto,
            loss_chunk: None,
            memory_limit: None,
        }
    }

    /// The values used where none are given, for an encoder with a classification head.
    ///
    /// | what | value | source |
    /// |---|---|---|
    /// | schedule | linear, warm-up 0.06 | the GLUE recipe of arXiv 2411.19557; RoBERTa's and LoRA's too |
    /// | learning rate, LoRA-SB and LoRA-XS | 1e-3 | the same |
    /// | learning rate, all that train A and B | 4e-4 | LoRA, arXiv 2106.09685, its GLUE table |
    /// | learning rate, full fine-tuning | 2e-5 | BERT, arXiv 1810.04805 |
    /// | examples a step, epochs | 32, 3 | BERT |
    /// | longest example | 128 tokens | the code of arXiv 2411.19557 |
    pub fn encoder_defaults(method: Method) -> Self {
        let learning_rate = match method.kind() {
            Kind::Latent => 1e-3,
            Kind::Product | Kind::Magnitude => 4e-4,
            Kind::Weights => 2e-5,
        };
        TrainConfig {
            learning_rate,
            lr_scheduler_type: Scheduler::Linear,
            warmup_ratio: 0.06,
            per_device_train_batch_size: 32,
            per_device_eval_batch_size: 32,
            gradient_accumulation_steps: 1,
            num_train_epochs: 3.0,
            max_length: 128,
            ..TrainConfig::defaults(method)
        }
    }

    /// [`defaults`](TrainConfig::defaults) or [`encoder_defaults`](TrainConfig::encoder_defaults), as a model's task
    /// asks for.
    pub fn defaults_for(method: Method, task: Task) -> Self {
        match task {
            Task::LanguageModel => TrainConfig::defaults(method),
            Task::Classification { .. } | Task::Regression => TrainConfig::encoder_defaults(method),
        }
    }

    /// Checks every value against its range.
    ///
    /// # Errors
    /// The first value outside its range, with its name and the range.
    pub fn validate(&self) -> Result<()> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let not_negative = |value: f64| value.is_finite() && value >= 0.0;
        let share = |value: f64| (0.0..1.0).contains(&value);
        let number = |name, value: f64, valid: bool, expected| (name, value.to_string(), valid, expected);
        let count =
            |name, value: usize, least: usize, expected| (name, value.to_string(), value >= least, expected);
        let optional = |name, value: Option<usize>| {
            (name, value.unwrap_or(1).to_string(), value != Some(0), "at least 1, or left out")
        };
        let rules = [
            number("learning_rate", self.learning_rate, positive(self.learning_rate), "a positive number"),
            number(
                "loraplus_lr_ratio",
                self.loraplus_lr_ratio.unwrap_or(1.0),
                positive(self.loraplus_lr_ratio.unwrap_or(1.0)),
                "a positive number, or left out",
            ),
            number("warmup_ratio", self.warmup_ratio, share(self.warmup_ratio), "at least 0 and below 1"),
            number(
                "weight_decay",
                self.weight_decay,
                not_negative(self.weight_decay),
                "a number of at least 0",
            ),
            number("adam_beta1", self.adam_beta1, share(self.adam_beta1), "at least 0 and below 1"),
            number("adam_beta2", self.adam_beta2, share(self.adam_beta2), "at least 0 and below 1"),
            number("adam_epsilon", self.adam_epsilon, positive(self.adam_epsilon), "a positive number"),
            number(
                "max_grad_norm",
                self.max_grad_norm,
                not_negative(self.max_grad_norm),
                "a number of at least 0 (0 switches clipping off)",
            ),
            count("per_device_train_batch_size", self.per_device_train_batch_size, 1, "at least 1"),
            count("per_device_eval_batch_size", self.per_device_eval_batch_size, 1, "at least 1"),
            count("gradient_accumulation_steps", self.gradient_accumulation_steps, 1, "at least 1"),
            number(
                "num_train_epochs",
                self.num_train_epochs,
                positive(self.num_train_epochs),
                "a positive number",
            ),
            optional("max_steps", self.max_steps),
            count("max_length", self.max_length, 2, "at least 2 (nothing predicts the first token)"),
            optional("loss_chunk", self.loss_chunk),
            optional("save_total_limit", self.save_total_limit),
            count("logging_steps", self.logging_steps, 1, "at least 1"),
        ];
        match rules.into_iter().find(|(_, _, valid, _)| !valid) {
            None => Ok(()),
            Some((name, found, _, expected)) => {
                Err(Error::Config { name: name.into(), expected: expected.into(), found })
            }
        }
    }

    /// Checks what depends on what is trained: the ratio of LoRA+ needs a B, and a metric the task that it is of.
    ///
    /// # Errors
    /// A setting that the method or the task has no use for.
    pub fn check_for(&self, method: Method, task: Task) -> Result<()> {
        if let (Some(_), Kind::Weights | Kind::Latent) = (self.loraplus_lr_ratio, method.kind()) {
            let trains_b = |method: &Method| matches!(method.kind(), Kind::Product | Kind::Magnitude);
            let with_b: Vec<&str> = Method::ALL.into_iter().filter(trains_b).map(Method::name).collect();
            return Err(Error::Config {
                name: "loraplus_lr_ratio".into(),
                expected: format!("nothing, or a method that trains B: {}", with_b.join(", ")),
                found: method.to_string(),
            });
        }
        let known = metrics_of(task);
        match self.metric_for_best_model {
            Some(metric) if !known.contains(&metric) => {
                let known: Vec<&str> = known.into_iter().map(Metric::name).collect();
                Err(Error::Config {
                    name: "metric_for_best_model".into(),
                    expected: match known.is_empty() {
                        true => "nothing: a language model is measured by its loss".into(),
                        false => format!("nothing, or one of {}", known.join(", ")),
                    },
                    found: metric.to_string(),
                })
            }
            _ => Ok(()),
        }
    }

    /// Examples of one optimizer step.
    pub fn examples_per_step(&self) -> usize {
        self.per_device_train_batch_size.saturating_mul(self.gradient_accumulation_steps)
    }

    /// Optimizer steps of one pass over `examples`, the last shorter one counted.
    pub fn steps_per_epoch(&self, examples: usize) -> usize {
        examples.div_ceil(self.examples_per_step())
    }

    /// Optimizer steps of the whole run over `examples`.
    pub fn total_steps(&self, examples: usize) -> usize {
        self.max_steps.unwrap_or_else(|| {
            let steps = self.num_train_epochs * self.steps_per_epoch(examples) as f64;
            // 0.1 epochs of 30 steps are 3 steps, though 0.1 * 30 is a rounding error above 3.
            (steps * (1.0 - f64::EPSILON)).ceil() as usize
        })
    }

    /// The learning rate of each optimizer step of a run over `examples`.
    ///
    /// # Errors
    /// A value outside its range; a warm-up longer than the run.
    pub fn schedule(&self, examples: usize) -> Result<Schedule> {
        self.validate()?;
        let total_steps = self.total_steps(examples);
        let warmup_steps = match self.warmup_steps {
            0 => (total_steps as f64 * self.warmup_ratio).ceil() as usize,
            steps => steps,
        };
        if warmup_steps > total_steps {
            return Err(Error::Config {
                name: "warmup_steps".into(),
                expected: format!("at most the run's {total_steps} optimizer steps"),
                found: warmup_steps.to_string(),
            });
        }
        Ok(Schedule {
            scheduler: self.lr_scheduler_type,
            peak: self.learning_rate,
            warmup_steps,
            total_steps,
        })
    }

    /// What the model keeps for its backward pass.
    pub fn recompute(&self) -> Recompute {
        self.gradient_checkpointing.recompute()
    }
}

/// A value that is none of those with a name.
fn named(name: &str, expected: &str, found: &str) -> Error {
    Error::Config { name: name.into(), expected: expected.into(), found: format!("{found:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_survive_json() {
        for method in Method::ALL {
            for task in [Task::LanguageModel, Task::Regression] {
                let config = TrainConfig::defaults_for(method, task);
                config.validate().unwrap();
                config.check_for(method, task).unwrap();
                let json = serde_json::to_string(&config).unwrap();
                assert_eq!(serde_json::from_str::<TrainConfig>(&json).unwrap(), config);
            }
        }
    }

    #[test]
    fn a_setting_without_use_is_refused() {
        let config = TrainConfig { loraplus_lr_ratio: Some(16.0), ..TrainConfig::defaults(Method::Lora) };
        config.check_for(Method::Dora, Task::LanguageModel).unwrap();
        for method in [Method::LoraSb, Method::LoraXs, Method::Full] {
            let message = config.check_for(method, Task::LanguageModel).unwrap_err().to_string();
            assert!(message.starts_with("loraplus_lr_ratio") && message.contains("lora-pro"), "{message}");
            assert!(message.ends_with(&format!("found {method}")), "{message}");
        }
    }

    #[test]
    fn an_invalid_value_is_named_with_its_range() {
        type Break = fn(&mut TrainConfig);
        let cases: [(&str, Break); 20] = [
            ("learning_rate: expected a positive number, found 0", |c| c.learning_rate = 0.0),
            ("learning_rate: expected a positive number, found NaN", |c| c.learning_rate = f64::NAN),
            ("learning_rate: expected a positive number, found inf", |c| c.learning_rate = f64::INFINITY),
            ("loraplus_lr_ratio: expected a positive number, or left out, found 0", |c| {
                c.loraplus_lr_ratio = Some(0.0);
            }),
            ("loraplus_lr_ratio: expected a positive number, or left out, found inf", |c| {
                c.loraplus_lr_ratio = Some(f64::INFINITY);
            }),
            ("warmup_ratio: expected at least 0 and below 1, found 1", |c| c.warmup_ratio = 1.0),
            ("weight_decay: expected a number of at least 0, found -0.1", |c| c.weight_decay = -0.1),
            ("adam_beta1: expected at least 0 and below 1, found 1", |c| c.adam_beta1 = 1.0),
            ("adam_beta2: expected at least 0 and below 1, found -1", |c| c.adam_beta2 = -1.0),
            ("adam_epsilon: expected a positive number, found 0", |c| c.adam_epsilon = 0.0),
            ("max_grad_norm: expected a number of at least 0", |c| c.max_grad_norm = -1.0),
            ("per_device_train_batch_size: expected at least 1, found 0", |c| {
                c.per_device_train_batch_size = 0
            }),
            ("per_device_eval_batch_size: expected at least 1, found 0", |c| {
                c.per_device_eval_batch_size = 0
            }),
            ("gradient_accumulation_steps: expected at least 1, found 0", |c| {
                c.gradient_accumulation_steps = 0
            }),
            ("num_train_epochs: expected a positive number, found 0", |c| c.num_train_epochs = 0.0),
            ("max_steps: expected at least 1, or left out, found 0", |c| c.max_steps = Some(0)),
            ("max_length: expected at least 2", |c| c.max_length = 1),
            ("save_total_limit: expected at least 1, or left out, found 0", |c| c.save_total_limit = Some(0)),
            ("loss_chunk: expected at least 1, or left out, found 0", |c| c.loss_chunk = Some(0)),
            ("logging_steps: expected at least 1, found 0", |c| c.logging_steps = 0),
        ];
        for (expected, change) in cases {
            let mut config = TrainConfig::defaults(Method::LoraSb);
            change(&mut config);
            let message = config.validate().unwrap_err().to_string();
            assert!(message.starts_with(expected), "{message:?} does not start with {expected:?}");
        }
    }

    #[test]
    fn steps_are_counted_with_the_last_shorter_one() {
        let mut config = TrainConfig::defaults(Method::Lora);
        (config.per_device_train_batch_size, config.gradient_accumulation_steps) = (3, 2);
        assert_eq!([1, 6, 7, 13].map(|examples| config.steps_per_epoch(examples)), [1, 1, 2, 3]);
        config.num_train_epochs = 2.5;
        assert_eq!(config.total_steps(13), 8);
        config.num_train_epochs = 0.1;
        assert_eq!(config.total_steps(180), 3);
        config.max_steps = Some(5);
        assert_eq!(config.total_steps(13), 5);
    }

    #[test]
    fn a_warm_up_longer_than_the_run_is_refused() {
        let mut config = TrainConfig::defaults(Method::Lora);
        (config.max_steps, config.warmup_steps) = (Some(5), 6);
        let message = config.schedule(100).unwrap_err().to_string();
        assert_eq!(message, "warmup_steps: expected at most the run's 5 optimizer steps, found 6");
    }
}
