//! The system's CUDA driver and the vendor's products.

mod api;
mod blas;
mod context;
mod functions;
mod library;
mod probe;
mod staging;
#[cfg(test)]
mod tests;

use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use self::blas::{CublasLt, Search};
use self::context::{Context, Device};
use self::functions::Functions;
pub(super) use self::probe::{no_gpus, probe, probe_memory};
use self::staging::Staging;
use super::Cuda;
use super::blas::Blas;
use super::driver::{Driver, Gpu, Outcome, Start};
use super::module::{Kernel, MODULES, Module};
use super::probe::Problem;
use crate::{Error, Result};

/// Where the libraries are looked for, and the kernels.
#[derive(Clone, Debug)]
struct Places {
    driver: Vec<PathBuf>,
    products: Search,
    modules: &'static [Module],
    /// A folder whose PTX files are loaded instead of those that are embedded: for work on kernels where the program cannot be
    /// built.
    ptx: Option<PathBuf>,
}

/// Names that folder.
const PTX: &str = "LORA_SB_PTX";

impl Places {
    fn of_the_process() -> Places {
        let ptx = std::env::var_os(PTX).filter(|folder| !folder.is_empty()).map(PathBuf::from);
        Places { driver: api::places(), products: Search::of_the_process(), modules: MODULES, ptx }
    }
}

impl Cuda {
    /// The GPU of a number, as the driver counts them.
    ///
    /// # Errors
    /// Where there is no driver, no such GPU, or the GPU cannot be used; the error's hint says what helps.
    pub fn open(ordinal: usize) -> Result<Cuda> {
        open(&Places::of_the_process(), ordinal)
    }
}

fn open(places: &Places, ordinal: usize) -> Result<Cuda> {
    let driver = Nvidia::open(places, ordinal);
    let refused = |Problem { message, hint }| Error::Gpu { ordinal, message, hint };
    driver.map(|driver| Cuda::with(Arc::new(driver))).map_err(refused)
}

/// A GPU by the CUDA driver. Its parts are dropped in this order, the context last.
#[derive(Debug)]
struct Nvidia {
    blas: Result<CublasLt, String>,
    /// Made when something is uploaded first.
    staging: Mutex<Option<Staging>>,
    functions: Functions,
    gpu: Gpu,
    context: Arc<Context>,
}

impl Nvidia {
    fn open(places: &Places, ordinal: usize) -> Result<Nvidia, Problem> {
        let (api, version) = probe::set_up(&places.driver)?;
        let count = api.count().map_err(probe::refused)?;
        if ordinal >= count {
            return Err(probe::no_such(&api, count));
        }
        let Device { handle, gpu, problem } = Device::of(&api, ordinal).map_err(probe::refused)?;
        if let Some(problem) = problem {
            return Err(problem);
        }
        let context = Arc::new(Context::new(Arc::new(api), handle).map_err(probe::refused)?);
        Ok(Nvidia {
            blas: CublasLt::new(Arc::clone(&context), &places.products, version),
            staging: Mutex::new(None),
            functions: Functions::new(Arc::clone(&context), places.modules, places.ptx.clone()),
            gpu,
            context,
        })
    }
}

#[expect(unsafe_code, reason = "memory and calls of the driver")]
impl Driver for Nvidia {
    fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    fn allocate(&self, bytes: usize) -> Outcome<u64> {
        self.context.allocate(bytes)
    }

    unsafe fn free(&self, address: u64, _bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.context.free(address) };
    }

    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Outcome {
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let staging = match &mut *staging {
            Some(staging) => staging,
            none => none.insert(Staging::new(Arc::clone(&self.context))?),
        };
        // SAFETY: the caller's promise.
        unsafe { staging.upload(to, bytes) }
    }

    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Outcome {
        self.context.current()?;
        // SAFETY: the caller's promise; the bytes are borrowed until they have been written.
        unsafe {
            let to = bytes.as_mut_ptr().cast();
            self.context.api.memcpy_to_host(to, from, bytes.len(), self.context.stream)?;
        }
        self.context.synchronize()
    }

    unsafe fn clear(&self, at: u64, bytes: usize) -> Outcome {
        self.context.current()?;
        // SAFETY: the caller's promise.
        unsafe { self.context.api.memset_8(at, 0, bytes, self.context.stream) }
    }

    unsafe fn launch(&self, start: Start<'_>) -> Outcome {
        self.context.current()?;
        let function = self.functions.get(start.kernel, start.shared_bytes)?;
        let ([x, y, z], stream) = (start.grid, self.context.stream);
        let (arguments, extra) = (start.arguments.as_mut_ptr(), std::ptr::null_mut::<*mut c_void>());
        // SAFETY: the caller's promise; the driver reads the arguments before it returns.
        unsafe {
            let (threads, shared) = (start.threads, start.shared_bytes);
            let function = function.handle;
            self.context.api.launch_kernel(function, x, y, z, threads, 1, 1, shared, stream, arguments, extra)
        }
    }

    fn prepare(&self, kernel: &'static Kernel) -> Outcome {
        self.context.current()?;
        self.functions.get(kernel, 0).map(drop)
    }

    fn synchronize(&self) -> Outcome {
        self.context.synchronize()
    }

    fn free_bytes(&self) -> Outcome<usize> {
        self.context.free_bytes()
    }

    fn blas(&self) -> Option<&dyn Blas> {
        self.blas.as_ref().ok().map(|blas| blas as &dyn Blas)
    }

    fn without_blas(&self) -> Option<&str> {
        self.blas.as_ref().err().map(String::as_str)
    }
}
