//! The embedded kernels in the driver: a module is compiled for the GPU when its first kernel is launched.

use std::ffi::{CStr, CString, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::api::number;
use super::context::Context;
use super::library::Handle;
use crate::cuda::driver::{Failure, Outcome};
use crate::cuda::module::{Kernel, Module, kernels_of};

/// Bytes for the words of the driver's compiler.
const LOG_BYTES: usize = 8 << 10;

/// A kernel in the driver.
#[derive(Debug)]
pub(super) struct Function {
    pub(super) handle: Handle,
    /// The most dynamic shared memory that the driver has been told of. It must be where that and the kernel's own are more
    /// than 48 KiB together.
    shared_bytes: AtomicU32,
}

#[derive(Debug)]
struct Loaded {
    source: &'static Module,
    handle: Mutex<Option<Handle>>,
    /// By the kernels' places in the module.
    functions: Vec<OnceLock<Function>>,
}

/// All kernels, each found by two indices once it has been launched.
#[derive(Debug)]
pub(super) struct Functions {
    context: Arc<Context>,
    modules: Vec<Loaded>,
    /// A folder of PTX files to load instead.
    ptx: Option<PathBuf>,
}

impl Functions {
    pub(super) fn new(context: Arc<Context>, modules: &'static [Module], ptx: Option<PathBuf>) -> Self {
        let loaded = |(index, source): (usize, &'static Module)| {
            let functions = kernels_of(index, source.ptx).map(|_| OnceLock::new()).collect();
            Loaded { source, handle: Mutex::new(None), functions }
        };
        Functions { context, modules: modules.iter().enumerate().map(loaded).collect(), ptx }
    }

    /// A kernel, ready for so much dynamic shared memory. The context is current.
    pub(super) fn get(&self, kernel: &Kernel, shared_bytes: u32) -> Outcome<&Function> {
        let module = &self.modules[kernel.module];
        let place = &module.functions[kernel.index];
        let function = match place.get() {
            Some(function) => function,
            None => {
                let handle = module.function(&self.context, self.ptx.as_deref(), kernel.name)?;
                place.get_or_init(|| Function { handle, shared_bytes: 0.into() })
            }
        };
        if shared_bytes > function.shared_bytes.load(Ordering::Relaxed) {
            #[expect(unsafe_code, reason = "a call of the driver")]
            // SAFETY: the function is of a module that is loaded.
            unsafe {
                let (attribute, value) = (number::FUNCTION_SHARED_BYTES, shared_bytes as c_int);
                self.context.api.func_set_attribute(function.handle, attribute, value)?;
            }
            function.shared_bytes.fetch_max(shared_bytes, Ordering::Relaxed);
        }
        Ok(function)
    }
}

#[expect(unsafe_code, reason = "calls of the driver with places for their results")]
impl Loaded {
    fn function(&self, context: &Context, ptx: Option<&Path>, name: &str) -> Outcome<Handle> {
        let call = "cuModuleGetFunction";
        let text = CString::new(name).map_err(|_| failure(call, "a name with a zero byte"))?;
        let mut module = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let handle = match *module {
            Some(handle) => handle,
            None => *module.insert(load(context, ptx, self.source)?),
        };
        let mut function = 0;
        // SAFETY: a place for the handle; the module is loaded.
        unsafe { context.api.module_get_function(&mut function, handle, text.as_ptr())? };
        Ok(function)
    }
}

/// Compiles a module; a failure has the compiler's words.
#[expect(unsafe_code, reason = "calls of the driver with places for their results")]
fn load(context: &Context, ptx: Option<&Path>, source: &Module) -> Outcome<Handle> {
    let call = "cuModuleLoadDataEx";
    let text = match ptx.map(|folder| folder.join(format!("{}.ptx", source.name))) {
        None => source.ptx.to_owned(),
        Some(path) => std::fs::read_to_string(&path)
            .map_err(|error| failure(call, &format!("{}: {error}", path.display())))?,
    };
    let text = CString::new(text).map_err(|_| failure(call, "PTX with a zero byte"))?;
    let mut log = vec![0_u8; LOG_BYTES];
    // The size of the log is passed as the value itself, as `cuda.h` says of options of an integer type.
    let mut names = [number::JIT_ERROR_LOG, number::JIT_ERROR_LOG_BYTES];
    let mut values = [log.as_mut_ptr().cast::<c_void>(), std::ptr::without_provenance_mut(LOG_BYTES - 1)];
    let mut module = 0;
    // SAFETY: the text ends with a zero byte; the log is as large as is said, and the last byte stays zero.
    let outcome = unsafe {
        let (names, values) = (names.as_mut_ptr(), values.as_mut_ptr());
        context.api.module_load_data(&mut module, text.as_ptr().cast(), 2, names, values)
    };
    outcome.map_err(|mut failure| {
        failure.message += &format!(", in {}.ptx", source.name);
        let words = CStr::from_bytes_until_nul(&log).map(CStr::to_string_lossy).unwrap_or_default();
        if !words.trim().is_empty() {
            failure.message += &format!(":\n{}", words.trim());
        }
        failure
    })?;
    Ok(module)
}

fn failure(call: &'static str, message: &str) -> Failure {
    Failure { call, message: message.into(), out_of_memory: false }
}

impl Drop for Functions {
    fn drop(&mut self) {
        let _ = self.context.synchronize();
        for module in &mut self.modules {
            if let Some(handle) = *module.handle.get_mut().unwrap_or_else(PoisonError::into_inner) {
                #[expect(unsafe_code, reason = "what the driver made is given back")]
                // SAFETY: nothing runs any more, and nobody else has the module.
                let _ = unsafe { self.context.api.module_unload(handle) };
            }
        }
    }
}
