//! A driver that runs the kernels on the processor: what they mean can be tested where there is no GPU.
//!
//! The `.cu` files are compiled as C++ by the system's compiler, once for each state of the sources, beside the test
//! program. See `emulator.hpp` for what is emulated. Memory is fenced: a kernel that reads or writes behind a tensor ends the
//! program, and memory that nobody has written holds NaN.

mod build;

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

type Emulate = unsafe extern "C" fn(*const c_char, *const u32, u32, u32, c_int, *mut *mut c_void) -> c_int;
type Allocate = unsafe extern "C" fn(usize) -> *mut c_void;
type Free = unsafe extern "C" fn(*mut c_void, usize);

/// What memory is aligned to, as on a GPU.
const ALIGNMENT: usize = 256;

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

fn missing(error: &libloading::Error) -> Failure {
    Failure { call: "emulator", message: error.to_string(), out_of_memory: false }
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
        // SAFETY: the library exports it with this signature.
        let address = unsafe {
            let allocate =
                self.library.get::<Allocate>(b"emulator_allocate").map_err(|error| missing(&error))?;
            allocate(bytes.next_multiple_of(ALIGNMENT))
        };
        match address.is_null() {
            true => Err(Failure { call: "mmap", message: "out of memory".into(), out_of_memory: true }),
            false => Ok(address as u64),
        }
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        // SAFETY: the library exports it with this signature, and the address is `emulator_allocate`'s.
        unsafe {
            let Ok(free) = self.library.get::<Free>(b"emulator_free") else { return };
            free(address as *mut c_void, bytes.next_multiple_of(ALIGNMENT));
        }
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
        let failed =
            |message: &str| Failure { call: "emulate", message: message.into(), out_of_memory: false };
        if start.shared_bytes as usize > self.gpu.shared_bytes {
            return Err(failed("more shared memory than a block may take"));
        }
        let name = CString::new(start.kernel.name).map_err(|_| failed("a name with a zero byte"))?;
        // SAFETY: the library exports it with this signature; the arguments are the caller's promise.
        let code = unsafe {
            let emulate = self.library.get::<Emulate>(b"emulate").map_err(|error| missing(&error))?;
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
