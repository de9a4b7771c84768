//! A driver that runs the kernels on the processor: what they mean can be tested where there is no GPU.
//!
//! The `.cu` files are compiled as C++ by the system's compiler, once for each state of the sources, beside the test
//! program. See `emulator.hpp` for what is emulated. Memory is fenced: a kernel that writes outside its tensors is found
//! when they are dropped, and memory that nobody has written holds NaN.

mod build;

use std::alloc::{Layout, alloc, dealloc};
use std::ffi::{CString, c_char, c_int, c_void};

use libloading::Library;

#[cfg(test)]
pub(super) use self::build::library;
use super::Cuda;
use super::blas::Blas;
use super::driver::{Driver, Failure, Gpu, Outcome, Start};
use crate::{Error, Result};

/// In which order the threads of a block run from one meeting point to the next. What a kernel computes must not depend on
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadOrder {
    /// The first first.
    Forward,
    /// The last first.
    Backward,
}

/// Bytes before and behind a piece of memory, and its alignment.
const FENCE: usize = 256;
/// What they hold.
const FENCE_BYTE: u8 = 0xa5;
/// What memory holds that nobody has written: NaN in every floating type.
const UNWRITTEN: u8 = 0xff;

type Emulate =
    unsafe extern "C" fn(*const c_char, *const u32, u32, u32, c_int, *mut *mut c_void) -> c_int;

#[derive(Debug)]
struct Emulator {
    library: Library,
    order: ThreadOrder,
    gpu: Gpu,
}

impl Cuda {
    /// The device on the emulator; `None` where no C++ compiler is found.
    ///
    /// # Errors
    /// Where the kernels do not compile.
    pub fn emulated(order: ThreadOrder) -> Result<Option<Cuda>> {
        let failed = |message| Error::Device { device: "cuda emulator", message };
        let Some(path) = build::library().map_err(failed)? else { return Ok(None) };
        #[expect(unsafe_code, reason = "a library that was built from this crate's sources")]
        // SAFETY: its initialisation registers kernels and does nothing else.
        let library = unsafe { Library::new(&path) }.map_err(|error| failed(error.to_string()))?;
        let gpu = Gpu {
            ordinal: 0,
            name: "emulator".into(),
            capability: (8, 0),
            memory_bytes: 1 << 34,
            multiprocessors: 4,
            shared_bytes: 160 << 10,
        };
        Ok(Some(Cuda::with(std::sync::Arc::new(Emulator { library, order, gpu }))))
    }
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes + 2 * FENCE, FENCE).expect("a size that the device has asked for before")
}

#[expect(unsafe_code, reason = "memory and calls as a driver has them")]
impl Driver for Emulator {
    fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    fn allocate(&self, bytes: usize) -> Outcome<u64> {
        if bytes > self.gpu.memory_bytes {
            let message = "out of memory".into();
            return Err(Failure { call: "allocate", message, out_of_memory: true });
        }
        // SAFETY: the layout is not empty; all of it is written before it is read.
        let start = unsafe {
            let start = alloc(layout(bytes));
            start.write_bytes(FENCE_BYTE, bytes + 2 * FENCE);
            start.add(FENCE).write_bytes(UNWRITTEN, bytes);
            start.add(FENCE)
        };
        Ok(start as u64)
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        // SAFETY: `allocate` made it with the same layout, a fence before the address.
        let intact = unsafe {
            let start = (address as *mut u8).sub(FENCE);
            let fence = |at: usize| std::slice::from_raw_parts(start.add(at), FENCE);
            let intact = [fence(0), fence(FENCE + bytes)].concat().iter().all(|&byte| byte == FENCE_BYTE);
            dealloc(start, layout(bytes));
            intact
        };
        assert!(intact || std::thread::panicking(), "a kernel wrote outside a tensor of {bytes} bytes");
    }

    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Outcome {
        // SAFETY: the caller's promise.
        unsafe { (to as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Outcome {
        // SAFETY: the caller's promise.
        unsafe { (from as *const u8).copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn clear(&self, at: u64, bytes: usize) -> Outcome {
        // SAFETY: the caller's promise.
        unsafe { (at as *mut u8).write_bytes(0, bytes) };
        Ok(())
    }

    unsafe fn launch(&self, start: Start<'_>) -> Outcome {
        let failed = |message: &str| Failure {
            call: "emulate",
            message: message.into(),
            out_of_memory: false,
        };
        if start.shared_bytes as usize > self.gpu.shared_bytes {
            return Err(failed("more shared memory than a block may take"));
        }
        let name = CString::new(start.kernel.name).map_err(|_| failed("a name with a zero byte"))?;
        // SAFETY: the library exports it with this signature; the arguments are the caller's promise.
        let code = unsafe {
            let emulate = self.library.get::<Emulate>(b"emulate").map_err(|error| failed(&error.to_string()))?;
            let backward = c_int::from(self.order == ThreadOrder::Backward);
            let (grid, arguments) = (start.grid.as_ptr(), start.arguments.as_mut_ptr());
            emulate(name.as_ptr(), grid, start.threads, start.shared_bytes, backward, arguments)
        };
        match code {
            0 => Ok(()),
            1 => Err(failed("no such kernel in the emulator")),
            2 => Err(failed("a block must be a whole number of warps, at most 1024 threads")),
            _ => Err(failed("threads wait for each other at different places")),
        }
    }

    fn synchronize(&self) -> Outcome {
        Ok(())
    }

    fn free_bytes(&self) -> Outcome<usize> {
        Ok(self.gpu.memory_bytes)
    }

    fn blas(&self) -> Option<&dyn Blas> {
        None
    }
}
