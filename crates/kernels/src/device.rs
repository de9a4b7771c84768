//! What a device is: memory and every operation.

use crate::{
    Activate, AdamW, Attention, Bias, Channel, Columns, CrossEntropy, DType, Dropout, Elementwise, Embedding,
    GatedActivation, LayerNorm, Linear, LinearGroup, Place, Reduce, Result, RmsNorm, Rope, Rows, SharedBytes,
    SquaredError, Tensor,
};

/// Memory of a device's tensors.
#[expect(
    clippy::wrong_self_convention,
    reason = "tensors are made from values, on the device that is `self`"
)]
pub trait Memory {
    /// An `f32` tensor whose elements are unspecified until they are written.
    fn empty(&self, shape: &[usize]) -> Result<Tensor> {
        self.empty_of(DType::F32, shape)
    }

    /// The same of either type that devices compute in, `f32` or `bf16`.
    fn empty_of(&self, dtype: DType, shape: &[usize]) -> Result<Tensor>;

    /// An `f32` tensor of zeros.
    fn zeros(&self, shape: &[usize]) -> Result<Tensor>;

    /// An `f32` tensor with the given elements.
    fn from_f32(&self, values: &[f32], shape: &[usize]) -> Result<Tensor>;

    /// A tensor of indices.
    fn from_u32(&self, values: &[u32], shape: &[usize]) -> Result<Tensor>;

    /// A read-only tensor over little-endian elements that somebody else owns, such as a mapped file.
    ///
    /// The CPU reads them in place where they are aligned for their type and copies them where they are not.
    fn from_bytes(&self, bytes: SharedBytes, dtype: DType, shape: &[usize]) -> Result<Tensor>;

    /// The elements of a floating tensor, widened to `f32`.
    fn to_f32(&self, tensor: &Tensor) -> Result<Vec<f32>>;

    /// Overwrites an owned tensor with values of the same number, rounded where it is `bf16`.
    fn write_f32(&self, tensor: &mut Tensor, values: &[f32]) -> Result<()>;

    /// A trainable copy: `f32`, owned by the device.
    fn to_owned_f32(&self, tensor: &Tensor) -> Result<Tensor> {
        self.from_f32(&self.to_f32(tensor)?, tensor.shape())
    }

    /// What memory that is.
    fn place(&self) -> Place;

    /// Bytes that nobody has taken, of a memory that is not the process's own; `None` of that, of which the system tells.
    ///
    /// # Errors
    /// Where the device does not say.
    fn available_bytes(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    /// Bytes that owned tensors take; shared bytes are not counted.
    fn usage(&self) -> Usage;

    /// Starts counting the peak anew from what is live.
    fn reset_peak(&self);
}

/// What a device's owned tensors take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Bytes in use at this moment.
    pub live_bytes: usize,
    /// The largest value of `live_bytes` since the start or the last reset.
    pub peak_bytes: usize,
}

/// A device: memory and every operation. The compiler refuses one that lacks an operation.
pub trait Kernels:
    Memory
    + Activate
    + AdamW
    + Attention
    + Bias
    + Channel
    + Columns
    + CrossEntropy
    + Dropout
    + Elementwise
    + Embedding
    + GatedActivation
    + LayerNorm
    + Linear
    + LinearGroup
    + Reduce
    + RmsNorm
    + Rope
    + Rows
    + SquaredError
    + Send
    + Sync
    + std::fmt::Debug
{
    /// The device's name for reports, as `cpu (2 threads, avx512)`.
    fn name(&self) -> String;

    /// The type of activations that products are fastest in: `bf16` where the device has instructions for them.
    fn prefers(&self) -> DType;

    /// Waits until everything that was asked for is done; operations of some devices return before.
    ///
    /// # Errors
    /// Where something that was asked for has failed since.
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
