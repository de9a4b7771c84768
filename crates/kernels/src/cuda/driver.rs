//! What the device asks of a driver: memory, copies and launches, in order, on one stream.
//!
//! Two things are drivers: the system's CUDA driver (`nvidia`), and in tests the emulator, which runs the same kernels on
//! the processor.

use std::ffi::c_void;
use std::fmt;

use super::blas::Blas;
use super::module::Kernel;

/// A call of the driver that failed.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    /// The driver's function, as `cuMemAllocAsync`.
    pub(crate) call: &'static str,
    /// The driver's name and words for it, as `CUDA_ERROR_OUT_OF_MEMORY (out of memory)`.
    pub(crate) message: String,
    /// Whether memory was lacking.
    pub(crate) out_of_memory: bool,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.call, self.message)
    }
}

/// A driver's result.
pub(crate) type Outcome<T = ()> = std::result::Result<T, Failure>;

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// The number it is asked for by, `cuda:N`.
    pub ordinal: usize,
    /// As `NVIDIA H200`.
    pub name: String,
    /// Compute capability, as (9, 0).
    pub capability: (u32, u32),
    /// Bytes of its memory.
    pub memory_bytes: usize,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory that one block may take.
    pub shared_bytes: usize,
}

/// A kernel's launch; the arguments are in the order of its parameters and each points at a value of the parameter's size.
pub(crate) struct Start<'a> {
    pub(crate) kernel: &'static Kernel,
    /// Blocks along x, y and z.
    pub(crate) grid: [u32; 3],
    /// Threads of a block, along x.
    pub(crate) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(crate) shared_bytes: u32,
    pub(crate) arguments: &'a mut [*mut c_void],
}

/// Memory, copies and launches of one GPU. All calls return before their work is done, except where they say otherwise,
/// and are done in order.
pub(crate) trait Driver: Send + Sync + fmt::Debug {
    /// The GPU.
    fn gpu(&self) -> &Gpu;

    /// An address of `bytes` bytes, at least 1, aligned to 256; their contents are unspecified.
    fn allocate(&self, bytes: usize) -> Outcome<u64>;

    /// Gives memory back, behind everything that was asked for before.
    ///
    /// # Safety
    /// `address` is one of [`Driver::allocate`]'s that has not been given back, of so many bytes.
    #[expect(unsafe_code, reason = "a contract that the compiler cannot check")]
    unsafe fn free(&self, address: u64, bytes: usize);

    /// Copies to the device; `bytes` has been read when the call returns.
    ///
    /// # Safety
    /// So many bytes from `to` on are memory of this driver's.
    #[expect(unsafe_code, reason = "a contract that the compiler cannot check")]
    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Outcome;

    /// Copies to the host, and waits for it.
    ///
    /// # Safety
    /// So many bytes from `from` on are memory of this driver's.
    #[expect(unsafe_code, reason = "a contract that the compiler cannot check")]
    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Outcome;

    /// Makes all `bytes` bytes from `at` on 0.
    ///
    /// # Safety
    /// They are memory of this driver's.
    #[expect(unsafe_code, reason = "a contract that the compiler cannot check")]
    unsafe fn clear(&self, at: u64, bytes: usize) -> Outcome;

    /// Runs a kernel.
    ///
    /// # Safety
    /// The arguments are as [`Start`] says, and what they point at on the device is as large as the kernel expects.
    #[expect(unsafe_code, reason = "a contract that the compiler cannot check")]
    unsafe fn launch(&self, start: Start<'_>) -> Outcome;

    /// Makes a kernel ready to be launched, which its first launch does where nobody asked.
    fn prepare(&self, _kernel: &'static Kernel) -> Outcome {
        Ok(())
    }

    /// Waits until everything is done.
    fn synchronize(&self) -> Outcome;

    /// Bytes of the GPU's memory that nobody has taken.
    fn free_bytes(&self) -> Outcome<usize>;

    /// The vendor's matrix products, where they were found.
    fn blas(&self) -> Option<&dyn Blas>;

    /// Why there are none, where something is known.
    fn without_blas(&self) -> Option<&str> {
        None
    }
}
