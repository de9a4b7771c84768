//! Seeded random numbers, handed to whoever draws.

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// What a generator's numbers are for. Each purpose has its own stream of the run's seed, so that drawing
/// more for one never shifts another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Stream {
    /// Random base weights.
    Weights = 1,
    /// An adapter's random initial values.
    Adapter = 2,
    /// The range finder of the truncated SVD.
    Svd = 3,
    /// Which examples the initialisation is estimated on.
    InitSamples = 4,
    /// The order of the training examples.
    Order = 5,
    /// The validation split.
    Validation = 6,
    /// Sampling of generated tokens.
    Sampling = 7,
    /// The seeds of dropout's masks.
    Dropout = 8,
}

/// A seeded generator: the same seed, stream and index give the same numbers on every machine.
#[derive(Clone, Debug)]
pub struct Generator(ChaCha8Rng);

impl Generator {
    /// The generator of one purpose; `index` separates its uses (a site, an epoch).
    pub fn new(seed: u64, stream: Stream, index: u64) -> Self {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&(stream as u64).to_le_bytes());
        key[16..24].copy_from_slice(&index.to_le_bytes());
        Generator(ChaCha8Rng::from_seed(key))
    }

    /// Independent draws from the normal distribution N(0, deviation^2).
    pub fn normal(&mut self, deviation: f32, out: &mut [f32]) {
        for value in out {
            let draw: f32 = StandardNormal.sample(&mut self.0);
            *value = draw * deviation;
        }
    }

    /// Independent draws from the uniform distribution on `[-bound, bound)`.
    pub fn uniform(&mut self, bound: f32, out: &mut [f32]) {
        for value in out {
            *value = (self.unit() as f32 * 2.0 - 1.0) * bound;
        }
    }

    /// A draw from `[0, 1)`.
    pub fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A draw of 64 bits: a seed for what draws by itself.
    pub fn seed(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A draw from `0..bound`; `bound` must be positive.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0.random_range(0..bound)
    }

    /// A random order of `0..count` (Fisher-Yates).
    pub fn permutation(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for last in (1..count).rev() {
            order.swap(last, self.below(last + 1));
        }
        order
    }
}
