//! The order of training: shuffles that depend on nothing but (seed, epoch), and micro-batches.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::{Dataset, Error, Example, Result};

/// What a generator is for: the same seed gives unrelated numbers for each.
#[derive(Clone, Copy)]
enum Purpose {
    Epoch = 1,
    Validation = 2,
}

/// The generator of a purpose, a seed and a stream: written out, so that no library's way of stretching a seed
/// can change the order of a run.
fn generator(purpose: Purpose, seed: u64, stream: u64) -> ChaCha8Rng {
    let mut key = [0_u8; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8] = purpose as u8;
    let mut generator = ChaCha8Rng::from_seed(key);
    generator.set_stream(stream);
    generator
}

/// A uniform number below `bound`: draws from the incomplete last interval are thrown away.
fn below(generator: &mut ChaCha8Rng, bound: u64) -> u64 {
    let excess = (u64::MAX % bound + 1) % bound;
    loop {
        let draw = generator.next_u64();
        if draw <= u64::MAX - excess {
            return draw % bound;
        }
    }
}

/// Fisher and Yates's shuffle of `0..count`.
fn permutation(generator: &mut ChaCha8Rng, count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        order.swap(last, below(generator, last as u64 + 1) as usize);
    }
    order
}

/// In which order the examples are seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Another permutation each epoch.
    Shuffled {
        /// The run's seed.
        seed: u64,
    },
    /// As in the files, each epoch.
    AsGiven,
}

/// The micro-batches of every epoch. It keeps no state: (epoch, position) is all that a checkpoint needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampler {
    examples: usize,
    micro_batch_size: usize,
    order: Order,
}

impl Sampler {
    /// Batches of `micro_batch_size` out of `examples`.
    pub fn new(examples: usize, micro_batch_size: usize, order: Order) -> Result<Self> {
        for (option, value) in [("examples", examples), ("micro_batch_size", micro_batch_size)] {
            if value == 0 {
                return Err(Error::Option { option, expected: "at least 1".into(), found: "0".into() });
            }
        }
        Ok(Self { examples, micro_batch_size, order })
    }

    /// The indices of an epoch's examples in the order they are seen: each of `0..examples` once.
    pub fn permutation(&self, epoch: u64) -> Vec<usize> {
        match self.order {
            Order::Shuffled { seed } => {
                permutation(&mut generator(Purpose::Epoch, seed, epoch), self.examples)
            }
            Order::AsGiven => (0..self.examples).collect(),
        }
    }

    /// How many micro-batches an epoch has; the last may be short.
    pub fn batches_per_epoch(&self) -> usize {
        self.examples.div_ceil(self.micro_batch_size)
    }

    /// The micro-batches of an epoch, as indices of examples.
    pub fn batches(&self, epoch: u64) -> Vec<Vec<usize>> {
        self.permutation(epoch).chunks(self.micro_batch_size).map(<[usize]>::to_vec).collect()
    }
}

/// How much of a data set is held out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Holdout {
    /// A share of the examples, in [0, 1); at least one example if it is above 0.
    Fraction(f64),
    /// A number of examples.
    Count(usize),
}

/// Splits off a validation set: (training, validation), both in the order of the data set. The choice depends
/// only on the seed and the number of examples.
pub fn split_validation(
    dataset: Dataset,
    holdout: Holdout,
    seed: u64,
) -> Result<(Vec<Example>, Vec<Example>)> {
    split_examples(dataset.examples, holdout, seed)
}

/// As [`split_validation`], of examples wherever they come from.
///
/// # Errors
///
/// As there.
pub fn split_examples(
    whole: Vec<Example>,
    holdout: Holdout,
    seed: u64,
) -> Result<(Vec<Example>, Vec<Example>)> {
    let examples = whole.len();
    let refused = |option, found: String| {
        let expected = format!("fewer than the {examples} examples there are");
        Error::Option { option, expected, found }
    };
    let held_out = match holdout {
        Holdout::Fraction(share) if !(0.0..1.0).contains(&share) => {
            return Err(Error::Option {
                option: "val_set_size",
                expected: "a fraction from 0 to below 1".into(),
                found: share.to_string(),
            });
        }
        Holdout::Fraction(0.0) => 0,
        Holdout::Fraction(share) => ((examples as f64 * share).round() as usize).max(1),
        Holdout::Count(count) => count,
    };
    if held_out > 0 && held_out >= examples {
        return Err(refused("val_set_size", held_out.to_string()));
    }
    let mut chosen = vec![false; examples];
    let order = permutation(&mut generator(Purpose::Validation, seed, 0), examples);
    for &index in &order[..held_out] {
        chosen[index] = true;
    }
    let (mut training, mut validation) = (Vec::new(), Vec::new());
    for (example, held_out) in whole.into_iter().zip(chosen) {
        if held_out { validation.push(example) } else { training.push(example) }
    }
    Ok((training, validation))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [usize; 6] = [1, 2, 3, 7, 97, 1000];

    #[test]
    fn every_epoch_is_a_permutation_and_depends_on_seed_and_epoch_only() {
        for examples in SIZES {
            let sampler = Sampler::new(examples, 4, Order::Shuffled { seed: 11 }).unwrap();
            for epoch in 0..3 {
                let order = sampler.permutation(epoch);
                assert_eq!(order, sampler.permutation(epoch));
                let mut sorted = order;
                sorted.sort_unstable();
                assert_eq!(sorted, (0..examples).collect::<Vec<_>>());
            }
        }
        let of = |seed, epoch| Sampler::new(97, 4, Order::Shuffled { seed }).unwrap().permutation(epoch);
        assert_ne!(of(11, 0), of(11, 1));
        assert_ne!(of(11, 0), of(12, 0));
        assert_ne!(of(11, 0), (0..97).collect::<Vec<_>>());
    }

    #[test]
    fn the_order_of_a_seed_is_fixed_for_ever() {
        let sampler = Sampler::new(8, 3, Order::Shuffled { seed: 42 }).unwrap();
        // From a separate ChaCha8 (64-bit counter, 64-bit stream) in Python.
        assert_eq!(sampler.permutation(0), [0, 4, 5, 7, 2, 3, 6, 1]);
        assert_eq!(sampler.permutation(1), [4, 6, 3, 5, 7, 0, 1, 2]);
    }

    #[test]
    fn batches_are_the_permutation_in_pieces_and_the_short_one_is_kept() {
        for (examples, size) in [(7, 3), (1, 5), (6, 3), (97, 13)] {
            let sampler = Sampler::new(examples, size, Order::Shuffled { seed: 5 }).unwrap();
            let batches = sampler.batches(2);
            assert_eq!(batches.len(), sampler.batches_per_epoch());
            assert_eq!(batches.concat(), sampler.permutation(2));
            assert!(batches[..batches.len() - 1].iter().all(|batch| batch.len() == size));
        }
        assert_eq!(Sampler::new(3, 2, Order::AsGiven).unwrap().batches(9), [vec![0, 1], vec![2]]);
        assert!(Sampler::new(0, 2, Order::AsGiven).is_err());
        assert!(Sampler::new(2, 0, Order::AsGiven).is_err());
    }

    #[test]
    fn shuffles_are_uniform() {
        // Each example is first in a sixth of the epochs: 6,000 draws, deviation below 5 sigma = 5 * sqrt(833).
        let sampler = Sampler::new(6, 1, Order::Shuffled { seed: 3 }).unwrap();
        let mut first = [0_i32; 6];
        for epoch in 0..6000 {
            first[sampler.permutation(epoch)[0]] += 1;
        }
        assert!(first.iter().all(|&count| (count - 1000).abs() < 145), "{first:?}");
    }
}
