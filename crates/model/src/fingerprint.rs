//! A short name for what a model is, by which an adapter recognises its base.

use lora_sb_kernels::{Kernels, Tensor};

use crate::config::Positions;
use crate::{Config, Model, Parameter, Result};

/// Rows of a table that are read; all of a large model would take longer than loading it.
const SAMPLED_ROWS: usize = 8;

impl Model {
    /// 16 hexadecimal digits over the architecture, every tensor's name and shape, and some rows of each.
    ///
    /// A classification head is not among them, since it is trained with the adapter.
    /// Values count, not their type: a model written again as f32 keeps its fingerprint, and so does one whose weights
    /// are rounded because it computes in `bf16`.
    ///
    /// # Errors
    /// Where the device fails to read a tensor.
    pub fn fingerprint(&self) -> Result<String> {
        if let Some(known) = &self.fingerprint {
            return Ok(known.clone());
        }
        let mut fingerprint = Fingerprint::of(&self.config);
        for parameter in self.config.parameters() {
            fingerprint.add(&*self.kernels, &self.config, parameter, self.weights.required(parameter)?)?;
        }
        Ok(fingerprint.finish())
    }
}

/// A fingerprint as it is made, one tensor after another in the order of [`Config::parameters`]: weights can be read and
/// rounded one by one.
pub(crate) struct Fingerprint(Fnv);

impl Fingerprint {
    /// Of the architecture, without a tensor.
    pub(crate) fn of(config: &Config) -> Self {
        let mut hash = Fnv::new();
        hash.add(config.family.model_type().as_bytes());
        for size in [config.num_attention_heads, config.num_key_value_heads, config.head_dim] {
            hash.add(&(size as u64).to_le_bytes());
        }
        let mut numbers = vec![config.norm_eps];
        if let Positions::Rotary { rotations, .. } = &config.positions {
            numbers.extend(rotations.iter().map(|rotation| rotation.theta));
        }
        // What most families do not have counts where it is there: a Llama has the fingerprint it always had.
        let usual = (config.head_dim as f64).sqrt().recip();
        numbers.extend(Some(config.attention_scale).filter(|&scale| scale != usual));
        numbers.extend(Some(config.embedding_scale).filter(|&scale| scale != 1.0));
        numbers.extend(config.attention_soft_cap.into_iter().chain(config.logit_soft_cap));
        numbers.iter().for_each(|number| hash.add(&number.to_le_bytes()));
        Fingerprint(hash)
    }

    /// Adds the next tensor, as it was read.
    pub(crate) fn add(
        &mut self,
        kernels: &dyn Kernels,
        config: &Config,
        parameter: Parameter,
        tensor: &Tensor,
    ) -> Result<()> {
        if parameter.of_classification() {
            return Ok(());
        }
        self.0.add(config.name(parameter).as_bytes());
        tensor.shape().iter().for_each(|&size| self.0.add(&(size as u64).to_le_bytes()));
        sample(kernels, tensor)?.into_iter().for_each(|value| self.0.add(&value.to_le_bytes()));
        Ok(())
    }

    /// Its 16 digits.
    pub(crate) fn finish(self) -> String {
        let Fingerprint(Fnv(sum)) = self;
        format!("{sum:016x}")
    }
}

/// All of a vector `[N]`; evenly spaced rows of a table `[N, K]`.
fn sample(kernels: &dyn Kernels, tensor: &Tensor) -> Result<Vec<f32>> {
    let [n, k] = *tensor.shape() else { return Ok(kernels.to_f32(tensor)?) };
    let count = n.min(SAMPLED_ROWS);
    let rows: Vec<u32> = (0..count).map(|i| (i * n / count) as u32).collect();
    let mut values = kernels.empty(&[count, k])?;
    // A lookup reads rows of a table in any type without widening the rest.
    kernels.embedding(&kernels.from_u32(&rows, &[count])?, tensor, &mut values)?;
    Ok(kernels.to_f32(&values)?)
}

/// FNV-1a of 64 bits: <http://www.isthe.com/chongo/tech/comp/fnv/>. Against mix-ups, not against forgers.
struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Fnv(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}
