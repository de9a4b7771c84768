//! A buffer with a shape.

use crate::buffer::Buffer;
use crate::{DType, Error, Result};

/// A contiguous, row-major array on a device.
///
/// Created through [`Memory`](crate::Memory); dropping it gives its memory back to the device at once, which
/// is what bounds a training step's memory.
#[derive(Debug)]
pub struct Tensor {
    pub(crate) buffer: Buffer,
    shape: Vec<usize>,
}

impl Tensor {
    pub(crate) fn new(buffer: Buffer, shape: &[usize]) -> Self {
        debug_assert_eq!(buffer.len(), shape.iter().product::<usize>());
        Tensor { buffer, shape: shape.to_vec() }
    }

    /// The size of every axis, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True where an axis has size 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.buffer.dtype()
    }

    /// Bytes of all elements.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype().size()
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// Where the number of elements differs.
    pub fn reshape(mut self, shape: &[usize]) -> Result<Self> {
        if shape.iter().product::<usize>() != self.len() {
            let expected = format!("{} elements for {shape:?}", shape.iter().product::<usize>());
            return Err(Error::Shape { op: "reshape", operand: "tensor", found: self.shape, expected });
        }
        self.shape = shape.to_vec();
        Ok(self)
    }
}
