//! The CUDA driver's functions, by the names and with the numbers of its header `cuda.h`.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};

use super::library::{Absence, Handle, library};
use crate::cuda::driver::{Failure, Outcome};

library! {
    /// The CUDA driver.
    Api {
        status {
            fn init = "cuInit"(flags: c_uint);
            fn driver_get_version = "cuDriverGetVersion"(version: *mut c_int);
            fn device_get_count = "cuDeviceGetCount"(count: *mut c_int);
            fn device_get = "cuDeviceGet"(device: *mut c_int, ordinal: c_int);
            fn device_get_name = "cuDeviceGetName"(name: *mut c_char, bytes: c_int, device: c_int);
            fn device_get_attribute = "cuDeviceGetAttribute"(value: *mut c_int, attribute: c_int, device: c_int);
            fn device_total_mem = "cuDeviceTotalMem_v2"(bytes: *mut usize, device: c_int);
            fn device_get_default_mem_pool = "cuDeviceGetDefaultMemPool"(pool: *mut Handle, device: c_int);
            fn primary_ctx_retain = "cuDevicePrimaryCtxRetain"(context: *mut Handle, device: c_int);
            fn primary_ctx_release = "cuDevicePrimaryCtxRelease_v2"(device: c_int);
            fn ctx_set_current = "cuCtxSetCurrent"(context: Handle);
            fn stream_create = "cuStreamCreate"(stream: *mut Handle, flags: c_uint);
            fn stream_destroy = "cuStreamDestroy_v2"(stream: Handle);
            fn stream_synchronize = "cuStreamSynchronize"(stream: Handle);
            fn event_create = "cuEventCreate"(event: *mut Handle, flags: c_uint);
            fn event_destroy = "cuEventDestroy_v2"(event: Handle);
            fn event_record = "cuEventRecord"(event: Handle, stream: Handle);
            fn event_synchronize = "cuEventSynchronize"(event: Handle);
            fn mem_get_info = "cuMemGetInfo_v2"(free: *mut usize, total: *mut usize);
            fn mem_pool_set_attribute = "cuMemPoolSetAttribute"(pool: Handle, attribute: c_int, value: *mut u64);
            fn mem_pool_get_attribute = "cuMemPoolGetAttribute"(pool: Handle, attribute: c_int, value: *mut u64);
            fn mem_pool_trim_to = "cuMemPoolTrimTo"(pool: Handle, bytes: usize);
            fn mem_alloc_async = "cuMemAllocAsync"(address: *mut u64, bytes: usize, stream: Handle);
            fn mem_free_async = "cuMemFreeAsync"(address: u64, stream: Handle);
            fn mem_host_alloc = "cuMemHostAlloc"(start: *mut *mut c_void, bytes: usize, flags: c_uint);
            fn mem_free_host = "cuMemFreeHost"(start: *mut c_void);
            fn memcpy_to_device = "cuMemcpyHtoDAsync_v2"(to: u64, from: *const c_void, bytes: usize, stream: Handle);
            fn memcpy_to_host = "cuMemcpyDtoHAsync_v2"(to: *mut c_void, from: u64, bytes: usize, stream: Handle);
            fn memset_8 = "cuMemsetD8Async"(at: u64, value: u8, bytes: usize, stream: Handle);
            fn module_load_data = "cuModuleLoadDataEx"(
                module: *mut Handle,
                image: *const c_void,
                options: c_uint,
                names: *mut c_int,
                values: *mut *mut c_void,
            );
            fn module_unload = "cuModuleUnload"(module: Handle);
            fn module_get_function = "cuModuleGetFunction"(
                function: *mut Handle,
                module: Handle,
                name: *const c_char,
            );
            fn func_set_attribute = "cuFuncSetAttribute"(function: Handle, attribute: c_int, value: c_int);
            fn launch_kernel = "cuLaunchKernel"(
                function: Handle,
                blocks_x: c_uint,
                blocks_y: c_uint,
                blocks_z: c_uint,
                threads_x: c_uint,
                threads_y: c_uint,
                threads_z: c_uint,
                shared_bytes: c_uint,
                stream: Handle,
                arguments: *mut *mut c_void,
                extra: *mut *mut c_void,
            );
        }
        other {
            fn get_error_name = "cuGetErrorName"(c_int, *mut *const c_char) -> c_int;
            fn get_error_string = "cuGetErrorString"(c_int, *mut *const c_char) -> c_int;
        }
    }
}

/// Numbers of `cuda.h`.
pub(super) mod number {
    use std::ffi::{c_int, c_uint};

    pub(crate) const OUT_OF_MEMORY: c_int = 2;
    pub(crate) const MULTIPROCESSORS: c_int = 16;
    pub(crate) const CAPABILITY_MAJOR: c_int = 75;
    pub(crate) const CAPABILITY_MINOR: c_int = 76;
    pub(crate) const SHARED_BYTES_OPTIN: c_int = 97;
    pub(crate) const MEMORY_POOLS: c_int = 115;
    pub(crate) const STREAM_NON_BLOCKING: c_uint = 1;
    pub(crate) const EVENT_DISABLE_TIMING: c_uint = 2;
    pub(crate) const POOL_RELEASE_THRESHOLD: c_int = 4;
    pub(crate) const POOL_RESERVED: c_int = 5;
    pub(crate) const POOL_USED: c_int = 7;
    pub(crate) const FUNCTION_SHARED_BYTES: c_int = 8;
    pub(crate) const JIT_ERROR_LOG: c_int = 5;
    pub(crate) const JIT_ERROR_LOG_BYTES: c_int = 6;
}

/// Where the driver's library is: a name that the system looks for, then where some systems have it out of its sight.
pub(super) fn places() -> Vec<PathBuf> {
    let names: &[&str] = match cfg!(windows) {
        true => &["nvcuda.dll"],
        false => &[
            "libcuda.so.1",
            "/usr/lib/wsl/lib/libcuda.so.1",
            "/usr/local/nvidia/lib64/libcuda.so.1",
            "/run/opengl-driver/lib/libcuda.so.1",
        ],
    };
    names.iter().map(PathBuf::from).collect()
}

#[expect(unsafe_code, reason = "calls of the driver with places for their results")]
impl Api {
    /// The first of these libraries that is there.
    ///
    /// # Errors
    /// Why the first is not, or which function one lacks.
    pub(super) fn first_of(places: &[PathBuf]) -> Result<Api, Absence> {
        let mut first = None;
        for place in places {
            match Api::load(Path::new(place)) {
                Err(absence @ Absence::Library(_)) => first = first.or(Some(absence)),
                found => return found,
            }
        }
        Err(first.unwrap_or_else(|| Absence::Library("no place to look for it".into())))
    }

    pub(super) fn check(&self, call: &'static str, status: c_int) -> Outcome {
        if status == 0 {
            return Ok(());
        }
        let words = |of: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text: *const c_char = std::ptr::null();
            // SAFETY: the driver's texts are static, and null where it does not know the status.
            unsafe {
                of(status, &mut text);
                (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
            }
        };
        let name = words(self.get_error_name).unwrap_or_else(|| format!("error {status}"));
        let message = words(self.get_error_string).map_or(name.clone(), |text| format!("{name} ({text})"));
        Err(Failure { call, message, out_of_memory: status == number::OUT_OF_MEMORY })
    }

    /// The CUDA version that the driver supports, as (12, 4).
    pub(super) fn version(&self) -> Outcome<(u32, u32)> {
        let mut version = 0;
        // SAFETY: a place for the number.
        unsafe { self.driver_get_version(&mut version)? };
        Ok((version as u32 / 1000, version as u32 % 1000 / 10))
    }

    /// How many GPUs the driver knows, once it has been set up.
    pub(super) fn count(&self) -> Outcome<usize> {
        let mut count = 0;
        // SAFETY: a place for the number.
        unsafe { self.device_get_count(&mut count)? };
        Ok(count as usize)
    }

    pub(super) fn attribute(&self, attribute: c_int, device: c_int) -> Outcome<u32> {
        let mut value = 0;
        // SAFETY: a place for the number.
        unsafe { self.device_get_attribute(&mut value, attribute, device)? };
        Ok(value as u32)
    }
}
