//! Learning rates by step.

use std::f64::consts::PI;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The course of the learning rate after the warm-up, as `transformers`' `lr_scheduler_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scheduler {
    /// The peak to the end (`constant_with_warmup` in transformers, whose `constant` has no warm-up).
    Constant,
    /// Down to 0 in a straight line.
    Linear,
    /// Down to 0 in half a cosine.
    Cosine,
}

impl Scheduler {
    /// All of them.
    pub const ALL: [Scheduler; 3] = [Scheduler::Constant, Scheduler::Linear, Scheduler::Cosine];

    /// The name in options and files.
    pub fn name(self) -> &'static str {
        match self {
            Scheduler::Constant => "constant",
            Scheduler::Linear => "linear",
            Scheduler::Cosine => "cosine",
        }
    }
}

impl fmt::Display for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Scheduler {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Scheduler::ALL.into_iter().find(|scheduler| scheduler.name() == text).ok_or_else(|| Error::Config {
            name: "lr_scheduler_type".into(),
            expected: "one of constant, linear, cosine".into(),
            found: format!("{text:?}"),
        })
    }
}

/// The learning rate of every optimizer step of a run.
///
/// With `w` warm-up steps of `n` in all, counting steps from 0:
///
/// ```text
/// warm-up, step < w     peak (step + 1) / w
/// constant              peak
/// linear                peak (n - step) / (n - w)
/// cosine                peak (1 + cos(pi (step - w) / (n - w))) / 2
/// ```
///
/// The decays are those of transformers' `get_linear_schedule_with_warmup` and
/// `get_cosine_schedule_with_warmup`. The warm-up differs by one: there it is `peak step / w`, so that the first
/// optimizer step has a learning rate of 0 and does nothing. LoRA-SB starts from a simulated first step of
/// exactly that size and needs it to be positive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The course after the warm-up.
    pub scheduler: Scheduler,
    /// The highest learning rate.
    pub peak: f64,
    /// Steps of the warm-up, at most `total_steps`.
    pub warmup_steps: usize,
    /// Steps of the run.
    pub total_steps: usize,
}

impl Schedule {
    /// The learning rate of an optimizer step, counted from 0; at `total_steps`, behind the last one, linear and
    /// cosine have reached 0.
    pub fn learning_rate(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return self.peak * ((step + 1) as f64 / self.warmup_steps as f64);
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / decay_steps as f64).min(1.0);
        match self.scheduler {
            Scheduler::Constant => self.peak,
            Scheduler::Linear => self.peak * (1.0 - progress),
            Scheduler::Cosine => self.peak * 0.5 * (1.0 + (PI * progress).cos()),
        }
    }

    /// The learning rate of the first optimizer step: the eta of LoRA-SB's initialisation.
    pub fn first(&self) -> f64 {
        self.learning_rate(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEAK: f64 = 3e-4;

    fn all_schedules() -> impl Iterator<Item = Schedule> {
        let totals = [1usize, 2, 3, 7, 50, 331];
        totals.into_iter().flat_map(|total_steps| {
            let warmups = (0..=total_steps).filter(move |w| total_steps < 51 || w % 10 < 2);
            warmups.flat_map(move |warmup_steps| {
                Scheduler::ALL.map(|scheduler| Schedule { scheduler, peak: PEAK, warmup_steps, total_steps })
            })
        })
    }

    #[test]
    fn every_schedule_stays_between_zero_and_the_peak_and_reaches_the_peak() {
        for schedule in all_schedules() {
            let rates: Vec<f64> =
                (0..schedule.total_steps).map(|step| schedule.learning_rate(step)).collect();
            assert!(rates.iter().all(|&rate| rate > 0.0 && rate <= PEAK), "{schedule:?}: {rates:?}");
            assert!(rates.contains(&PEAK), "{schedule:?}");
            assert_eq!(schedule.first(), rates[0]);
        }
    }

    #[test]
    fn every_schedule_is_continuous() {
        for schedule in all_schedules() {
            let warmup = PEAK / schedule.warmup_steps.max(1) as f64;
            let decay = PEAK / schedule.total_steps.saturating_sub(schedule.warmup_steps).max(1) as f64;
            for step in 1..schedule.total_steps {
                let jump = schedule.learning_rate(step) - schedule.learning_rate(step - 1);
                let (least, most) = match (step < schedule.warmup_steps, schedule.scheduler) {
                    (true, _) => (0.0, warmup),
                    (false, Scheduler::Constant) => (0.0, 0.0),
                    (false, Scheduler::Linear) => (-decay, 0.0),
                    // The steepest slope of (1 + cos(pi x)) / 2 is pi / 2.
                    (false, Scheduler::Cosine) => (-decay * PI / 2.0, 0.0),
                };
                let rounding = 4.0 * f64::EPSILON * PEAK;
                assert!(
                    (least - rounding..=most + rounding).contains(&jump),
                    "{schedule:?} step {step}: {jump}"
                );
            }
        }
    }

    #[test]
    fn linear_and_cosine_end_at_zero() {
        for schedule in all_schedules().filter(|schedule| schedule.scheduler != Scheduler::Constant) {
            for step in [schedule.total_steps, schedule.total_steps + 1, 10 * schedule.total_steps] {
                // Where all steps are warm-up, the decay is one step long and begins behind the end.
                if step > schedule.warmup_steps {
                    assert!(schedule.learning_rate(step).abs() < 1e-16 * PEAK, "{schedule:?} at {step}");
                }
            }
        }
    }

    /// The lambdas of transformers' `optimization.py` for 3 warm-up steps of 10, from step 3 on, where the warm-up
    /// is over: `(10 - step) / 7` and `0.5 (1 + cos(pi (step - 3) / 7))`.
    #[test]
    fn the_decay_is_that_of_transformers() {
        let linear = [1.0, 6.0 / 7.0, 5.0 / 7.0, 4.0 / 7.0, 3.0 / 7.0, 2.0 / 7.0, 1.0 / 7.0];
        let cosine = [
            1.0,
            0.9504844339512095,
            0.8117449009293668,
            0.6112604669781572,
            0.3887395330218429,
            0.1882550990706333,
            0.04951556604879043,
        ];
        for (scheduler, expected) in [(Scheduler::Linear, linear), (Scheduler::Cosine, cosine)] {
            let schedule = Schedule { scheduler, peak: 1.0, warmup_steps: 3, total_steps: 10 };
            for (step, expected) in expected.into_iter().enumerate() {
                assert!((schedule.learning_rate(3 + step) - expected).abs() < 1e-15);
            }
        }
    }

    #[test]
    fn names_are_read_back() {
        for scheduler in Scheduler::ALL {
            assert_eq!(scheduler.name().parse::<Scheduler>().unwrap(), scheduler);
        }
        let message = "polynomial".parse::<Scheduler>().unwrap_err().to_string();
        assert!(message.contains("constant, linear, cosine") && message.contains("polynomial"), "{message}");
    }
}
