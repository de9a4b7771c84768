//! Which examples an optimizer step takes.

use lora_sb_data::{Order, Sampler};

use crate::{Result, TrainConfig};

/// Names the examples of any optimizer step from its number alone: nothing to save, nothing to lose.
#[derive(Debug)]
pub struct Cursor {
    sampler: Sampler,
    examples: usize,
    per_step: usize,
    steps_per_epoch: usize,
    /// The epoch that was asked for last, and its order.
    order: Option<(usize, Vec<usize>)>,
}

/// The examples of one optimizer step.
#[derive(Debug, PartialEq, Eq)]
pub struct StepExamples<'a> {
    /// The epoch, counted from 0.
    pub epoch: usize,
    /// Examples of the epoch before these.
    pub position: usize,
    /// Their indices, in the order they are taken.
    pub indices: &'a [usize],
}

impl Cursor {
    /// The order of `examples` under the settings' seed.
    ///
    /// # Errors
    /// Where there is no example.
    pub fn new(examples: usize, config: &TrainConfig) -> Result<Cursor> {
        let order = Order::Shuffled { seed: config.seed };
        Ok(Cursor {
            sampler: Sampler::new(examples, config.per_device_train_batch_size, order)?,
            examples,
            per_step: config.examples_per_step(),
            steps_per_epoch: config.steps_per_epoch(examples),
            order: None,
        })
    }

    /// The examples of a step, counted from 0. The last step of an epoch takes what is left.
    pub fn step(&mut self, step: usize) -> StepExamples<'_> {
        let (epoch, within) = (step / self.steps_per_epoch, step % self.steps_per_epoch);
        let start = within * self.per_step;
        let end = start.saturating_add(self.per_step).min(self.examples);
        if self.order.as_ref().is_none_or(|(kept, _)| *kept != epoch) {
            self.order = Some((epoch, self.sampler.permutation(epoch as u64)));
        }
        let order = self.order.as_ref().map_or(&[][..], |(_, order)| order);
        StepExamples { epoch, position: start, indices: &order[start..end] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Method;

    #[test]
    fn an_epoch_takes_every_example_once_and_any_step_can_be_asked_for() {
        let mut config = TrainConfig::defaults(Method::Lora);
        (config.per_device_train_batch_size, config.gradient_accumulation_steps) = (3, 2);
        for examples in [1, 5, 6, 7, 13] {
            let mut cursor = Cursor::new(examples, &config).unwrap();
            let steps = config.steps_per_epoch(examples);
            let mut orders = Vec::new();
            for epoch in 0..3 {
                let mut order = Vec::new();
                for step in 0..steps {
                    let found = cursor.step(epoch * steps + step);
                    assert_eq!((found.epoch, found.position), (epoch, order.len()));
                    order.extend_from_slice(found.indices);
                }
                let mut sorted = order.clone();
                sorted.sort_unstable();
                assert_eq!(sorted, (0..examples).collect::<Vec<_>>());
                orders.push(order);
            }
            let mut fresh = Cursor::new(examples, &config).unwrap();
            let last = fresh.step(3 * steps - 1);
            assert!(orders[2].ends_with(last.indices) && !last.indices.is_empty());
        }
        assert!(Cursor::new(0, &config).is_err());
    }
}
