//! Launching a kernel with arguments that are checked against the parameters its PTX declares.

use std::ffi::c_void;

use super::Cuda;
use super::driver::Start;
use super::module;
use crate::{DType, Error, Result};

/// Elements on the device and their type: `Floats` and `FloatsMut` of the kernels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceFloats {
    pub(crate) address: u64,
    pub(crate) dtype: DType,
}

/// The value of a parameter.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Argument {
    /// `Floats` or `FloatsMut`.
    Floats(DeviceFloats),
    /// A pointer, or an unsigned 64-bit number.
    Word(u64),
    /// An unsigned 32-bit number.
    U32(u32),
    F32(f32),
}

impl From<DeviceFloats> for Argument {
    fn from(floats: DeviceFloats) -> Self {
        Argument::Floats(floats)
    }
}

impl From<u64> for Argument {
    fn from(word: u64) -> Self {
        Argument::Word(word)
    }
}

impl From<u32> for Argument {
    fn from(number: u32) -> Self {
        Argument::U32(number)
    }
}

impl From<f32> for Argument {
    fn from(number: f32) -> Self {
        Argument::F32(number)
    }
}

impl Argument {
    /// Its bytes as the kernel reads them, and how many.
    fn bytes(self) -> ([u64; 2], usize) {
        match self {
            Argument::Floats(floats) => ([floats.address, code(floats.dtype)], 16),
            Argument::Word(word) => ([word, 0], 8),
            Argument::U32(number) => ([u64::from(number), 0], 4),
            Argument::F32(number) => ([u64::from(number.to_bits()), 0], 4),
        }
    }
}

/// The kernels' number for a type: `F32`, `BF16`, `F16` of the prelude.
pub(crate) fn code(dtype: DType) -> u64 {
    match dtype {
        DType::F32 | DType::U32 => 0,
        DType::Bf16 => 1,
        DType::F16 => 2,
    }
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch {
    /// Blocks along x, y and z; nothing is launched where one is 0.
    pub(crate) grid: [usize; 3],
    /// Threads of a block; a multiple of 32.
    pub(crate) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(crate) shared_bytes: usize,
}

impl Launch {
    /// Blocks in a row, without dynamic shared memory.
    pub(crate) fn blocks(blocks: usize, threads: u32) -> Self {
        Launch { grid: [blocks, 1, 1], threads, shared_bytes: 0 }
    }
}

/// The most blocks along y and z; along x there may be 2^31 - 1.
const MOST_BLOCKS: usize = 65_535;

/// The most parameters that a kernel has.
const MOST_ARGUMENTS: usize = 32;

/// Threads of a block where a kernel has no reason for another number.
pub(crate) const THREADS: u32 = 256;

impl Cuda {
    /// Runs a kernel whose threads have eight elements each (`elements.cuh`), over `count` elements.
    ///
    /// # Errors
    /// As [`Cuda::launch`].
    pub(crate) fn apply(
        &self,
        op: &'static str,
        kernel: &'static str,
        count: usize,
        arguments: &[Argument],
    ) -> Result<()> {
        let blocks = count.div_ceil(8 * THREADS as usize);
        self.launch(op, kernel, Launch::blocks(blocks, THREADS), arguments)
    }

    /// Runs a kernel for an operation.
    ///
    /// What the arguments point at must be as large as the kernel expects: the operations check their operands' shapes
    /// before they come here.
    ///
    /// # Errors
    /// Where the arguments are not the kernel's, the launch is larger than GPUs take, or the driver refuses it.
    pub(crate) fn launch(
        &self,
        op: &'static str,
        kernel: &'static str,
        launch: Launch,
        arguments: &[Argument],
    ) -> Result<()> {
        let failed = |message: String| Error::Driver { op, message: format!("kernel `{kernel}`: {message}") };
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let found = module::kernel(kernel).ok_or_else(|| failed("is in no embedded module".into()))?;
        let sizes = || arguments.iter().map(|argument| argument.bytes().1);
        if !sizes().eq(found.parameters.iter().copied()) || arguments.len() > MOST_ARGUMENTS {
            let (sizes, parameters) = (sizes().collect::<Vec<_>>(), &found.parameters);
            return Err(failed(format!("arguments of {sizes:?} bytes for parameters of {parameters:?}")));
        }
        // On the stack: thousands of kernels are launched in a second.
        let (mut values, mut pointers) = ([[0; 2]; MOST_ARGUMENTS], [std::ptr::null_mut(); MOST_ARGUMENTS]);
        for ((argument, value), pointer) in arguments.iter().zip(&mut values).zip(&mut pointers) {
            *value = argument.bytes().0;
            *pointer = value.as_mut_ptr().cast::<c_void>();
        }
        let [x, y, z] = launch.grid;
        if x > i32::MAX as usize || y > MOST_BLOCKS || z > MOST_BLOCKS {
            return Err(failed(format!("{:?} blocks are more than a GPU takes at once", launch.grid)));
        }
        let start = Start {
            kernel: found,
            grid: [x as u32, y as u32, z as u32],
            threads: launch.threads,
            shared_bytes: launch.shared_bytes as u32,
            arguments: &mut pointers[..arguments.len()],
        };
        #[expect(unsafe_code, reason = "a kernel reads and writes what it is given the address of")]
        // SAFETY: each argument points at a value of its parameter's size; the operation has checked that its tensors are
        // as large as their shapes say, which is what the kernel is told.
        let outcome = unsafe { self.driver.launch(start) };
        outcome.map_err(|failure| failed(format!("{failure} ({launch:?})")))
    }
}
