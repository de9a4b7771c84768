//! The crate's error.

use crate::DType;

/// What can go wrong in an operation or on a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operand has another shape than the operation's other operands ask for.
    #[error("{op}: {operand} has shape {found:?}, expected {expected}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The operand's name in the operation's signature.
        operand: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// The expected shape with named axes, as `[T=3, D=8]`.
        expected: String,
    },
    /// An operand has an element type that the operation does not take.
    #[error("{op}: {operand} holds {found}, expected {expected}")]
    Type {
        /// The operation.
        op: &'static str,
        /// The operand's name in the operation's signature.
        operand: &'static str,
        /// Its type.
        found: DType,
        /// The types that are taken.
        expected: &'static str,
    },
    /// A value outside the range the operation is defined on.
    #[error("{op}: {message}")]
    Value {
        /// The operation.
        op: &'static str,
        /// The value, the expected range, and what was found.
        message: String,
    },
    /// An operand lies on another device than the one that is to compute with it.
    #[error("{op}: {operand} is not on {expected}, the device that computes")]
    Place {
        /// The operation.
        op: &'static str,
        /// The operand's name in the operation's signature.
        operand: &'static str,
        /// The device that was asked.
        expected: String,
    },
    /// The device has no room for a tensor.
    #[error(
        "{op}: {device} has no room for {requested} bytes more: {live} bytes of {total} are this process's tensors"
    )]
    OutOfMemory {
        /// The operation.
        op: &'static str,
        /// The device's name.
        device: String,
        /// Bytes that were asked for.
        requested: usize,
        /// Bytes of this process's tensors.
        live: usize,
        /// Bytes of the device.
        total: usize,
    },
    /// The device's driver refused a call, or something that was asked for earlier has failed.
    #[error("{op}: {message}")]
    Driver {
        /// The operation that met it.
        op: &'static str,
        /// The driver's words.
        message: String,
    },
    /// The device cannot be set up.
    #[error("{device}: {message}")]
    Device {
        /// The device's name.
        device: &'static str,
        /// What failed.
        message: String,
    },
    /// A GPU cannot be used.
    #[error("cuda:{ordinal}: {message}")]
    Gpu {
        /// The number that it was asked for by.
        ordinal: usize,
        /// What is wrong.
        message: String,
        /// What helps.
        hint: String,
    },
}

impl Error {
    /// What the user can do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Gpu { hint, .. } => Some(hint.clone()),
            Error::Device { .. } => Some("check the number of threads that was asked for".into()),
            Error::Place { .. } => Some("make all of an operation's tensors on the device that computes it".into()),
            Error::OutOfMemory { .. } => Some(
                "take fewer tokens at a time, or keep less of them for the backward pass; programs beside this one take \
                 of the same memory"
                    .into(),
            ),
            Error::Driver { .. } => Some(
                "begin again; where it comes back, update the GPU's driver, or compute on the CPU".into(),
            ),
            _ => None,
        }
    }
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
