//! A GPU that has been taken: its context, its stream and its memory.

use std::ffi::{c_char, c_int};
use std::sync::Arc;

use super::api::{Api, number};
use super::library::Handle;
use crate::cuda::driver::{Gpu, Outcome};
use crate::cuda::probe::Problem;

/// The oldest GPUs that the kernels are compiled for.
pub(super) const OLDEST_CAPABILITY: (u32, u32) = (8, 0);

/// What the driver says of a GPU.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) handle: c_int,
    pub(super) gpu: Gpu,
    /// Why it cannot be used.
    pub(super) problem: Option<Problem>,
}

#[expect(unsafe_code, reason = "calls of the driver with places for their results")]
impl Device {
    /// The GPU of a number, which is less than [`Api::count`].
    pub(super) fn of(api: &Api, ordinal: usize) -> Outcome<Device> {
        let (mut handle, mut name, mut memory_bytes) = (0, [0 as c_char; 256], 0);
        // SAFETY: places for the results, the name's with its size.
        unsafe {
            api.device_get(&mut handle, ordinal as c_int)?;
            api.device_get_name(name.as_mut_ptr(), name.len() as c_int, handle)?;
            api.device_total_mem(&mut memory_bytes, handle)?;
        }
        let name: Vec<u8> = name.iter().map(|&byte| byte as u8).take_while(|&byte| byte != 0).collect();
        let attribute = |attribute| api.attribute(attribute, handle);
        let gpu = Gpu {
            ordinal,
            name: String::from_utf8_lossy(&name).into_owned(),
            capability: (attribute(number::CAPABILITY_MAJOR)?, attribute(number::CAPABILITY_MINOR)?),
            memory_bytes,
            multiprocessors: attribute(number::MULTIPROCESSORS)?,
            shared_bytes: attribute(number::SHARED_BYTES_OPTIN)? as usize,
        };
        let problem = problem(&gpu, attribute(number::MEMORY_POOLS)? != 0);
        Ok(Device { handle, gpu, problem })
    }
}

fn problem(gpu: &Gpu, has_pools: bool) -> Option<Problem> {
    let (major, minor) = gpu.capability;
    let (least_major, least_minor) = OLDEST_CAPABILITY;
    if gpu.capability < OLDEST_CAPABILITY {
        return Some(Problem {
            message: format!("{} has compute capability {major}.{minor}", gpu.name),
            hint: format!(
                "take a GPU of compute capability {least_major}.{least_minor} (Ampere, 2020) or later"
            ),
        });
    }
    (!has_pools).then(|| Problem {
        message: format!("{} has no stream-ordered memory here", gpu.name),
        hint: "take a GPU that is passed through whole, not a virtual one without memory pools".into(),
    })
}

/// A GPU's context, which the driver keeps one of for a process, and the stream that all work is asked for on.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) api: Arc<Api>,
    pub(super) stream: Handle,
    device: c_int,
    context: Handle,
    pool: Handle,
}

#[expect(unsafe_code, reason = "calls of the driver with places for their results")]
impl Context {
    pub(super) fn new(api: Arc<Api>, device: c_int) -> Outcome<Context> {
        let mut own = Context { api, device, stream: 0, context: 0, pool: 0 };
        // SAFETY: places for the results. What is made before a failure is given back when `own` is dropped.
        unsafe {
            own.api.primary_ctx_retain(&mut own.context, device)?;
            own.current()?;
            own.api.stream_create(&mut own.stream, number::STREAM_NON_BLOCKING)?;
            own.api.device_get_default_mem_pool(&mut own.pool, device)?;
            // Memory that is given back stays with the process: the next tensor takes it without asking the system.
            let mut everything = u64::MAX;
            own.api.mem_pool_set_attribute(own.pool, number::POOL_RELEASE_THRESHOLD, &mut everything)?;
        }
        Ok(own)
    }

    /// Makes it the calling thread's; every other call wants that.
    pub(super) fn current(&self) -> Outcome {
        // SAFETY: a context that is retained.
        unsafe { self.api.ctx_set_current(self.context) }
    }

    /// An address of so many bytes. Where there are none, once more when everything asked for is done and what the pool
    /// keeps has been given back: it may have been in pieces.
    pub(super) fn allocate(&self, bytes: usize) -> Outcome<u64> {
        self.current()?;
        let mut address = 0;
        // SAFETY: a place for the address.
        let outcome = unsafe { self.api.mem_alloc_async(&mut address, bytes, self.stream) };
        match outcome {
            Err(failure) if failure.out_of_memory => {
                self.synchronize()?;
                // SAFETY: the pool is the device's; a place for the address.
                unsafe {
                    self.api.mem_pool_trim_to(self.pool, 0)?;
                    self.api.mem_alloc_async(&mut address, bytes, self.stream)?;
                }
            }
            outcome => outcome?,
        }
        Ok(address)
    }

    /// # Safety
    /// `address` is one of [`Context::allocate`]'s that has not been given back.
    pub(super) unsafe fn free(&self, address: u64) {
        // A failure is of something earlier, and the next call tells it.
        // SAFETY: the caller's promise.
        let _ = self.current().and_then(|()| unsafe { self.api.mem_free_async(address, self.stream) });
    }

    pub(super) fn synchronize(&self) -> Outcome {
        self.current()?;
        // SAFETY: the stream is this context's.
        unsafe { self.api.stream_synchronize(self.stream) }
    }

    /// Bytes of the GPU that nobody has taken, among them those that the pool keeps for the next tensor.
    pub(super) fn free_bytes(&self) -> Outcome<usize> {
        self.current()?;
        let (mut free, mut total, mut reserved, mut used) = (0, 0, 0, 0);
        // SAFETY: places for the numbers.
        unsafe {
            self.api.mem_get_info(&mut free, &mut total)?;
            self.api.mem_pool_get_attribute(self.pool, number::POOL_RESERVED, &mut reserved)?;
            self.api.mem_pool_get_attribute(self.pool, number::POOL_USED, &mut used)?;
        }
        Ok(free + reserved.saturating_sub(used) as usize)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.context == 0 {
            return;
        }
        #[expect(unsafe_code, reason = "what the driver made is given back")]
        // SAFETY: the stream and the context are this one's, and nobody else has them. Failures have been told before.
        unsafe {
            let _ = self.current();
            if self.stream != 0 {
                let _ = self.api.stream_synchronize(self.stream);
                let _ = self.api.stream_destroy(self.stream);
            }
            let _ = self.api.ctx_set_current(0);
            let _ = self.api.primary_ctx_release(self.device);
        }
    }
}
