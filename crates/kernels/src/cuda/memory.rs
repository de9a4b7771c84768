//! Memory of the device: stream-ordered, counted, and given back when dropped.

use std::sync::{Arc, Mutex, MutexGuard};

use super::driver::Driver;
use crate::{Error, Result, Usage};

/// Tensors take whole multiples of this many bytes; the driver's pool gives nothing smaller.
const GRANULE: usize = 512;

/// Bytes that a tensor of so many bytes takes on the device.
pub(crate) fn granules(bytes: usize) -> usize {
    bytes.next_multiple_of(GRANULE)
}

/// The device's memory and how much of it is in use.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    driver: Arc<dyn Driver>,
    usage: Mutex<Usage>,
}

impl DeviceMemory {
    pub(crate) fn new(driver: Arc<dyn Driver>) -> Arc<Self> {
        Arc::new(DeviceMemory { driver, usage: Mutex::new(Usage { live_bytes: 0, peak_bytes: 0 }) })
    }

    /// Storage for `bytes` bytes whose contents are unspecified.
    ///
    /// # Errors
    /// Where the GPU has no room.
    pub(crate) fn take(self: &Arc<Self>, op: &'static str, bytes: usize) -> Result<Storage> {
        let bytes = granules(bytes);
        if bytes == 0 {
            return Ok(Storage { address: 0, bytes, memory: Arc::clone(self) });
        }
        let address = self.driver.allocate(bytes).map_err(|failure| match failure.out_of_memory {
            true => Error::OutOfMemory {
                op,
                device: self.driver.gpu().name.clone(),
                requested: bytes,
                live: self.usage().live_bytes,
                total: self.driver.gpu().memory_bytes,
            },
            false => Error::Driver { op, message: failure.to_string() },
        })?;
        let mut usage = self.lock();
        usage.live_bytes += bytes;
        usage.peak_bytes = usage.peak_bytes.max(usage.live_bytes);
        Ok(Storage { address, bytes, memory: Arc::clone(self) })
    }

    pub(crate) fn usage(&self) -> Usage {
        *self.lock()
    }

    pub(crate) fn reset_peak(&self) {
        let mut usage = self.lock();
        usage.peak_bytes = usage.live_bytes;
    }

    fn lock(&self) -> MutexGuard<'_, Usage> {
        self.usage.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A piece of the device's memory.
#[derive(Debug)]
pub(crate) struct Storage {
    address: u64,
    bytes: usize,
    memory: Arc<DeviceMemory>,
}

impl Storage {
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether it is a piece of this memory.
    pub(crate) fn of(&self, memory: &Arc<DeviceMemory>) -> bool {
        Arc::ptr_eq(&self.memory, memory)
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        #[expect(unsafe_code, reason = "the driver's memory is given back by its address")]
        // SAFETY: the address came from `allocate` for so many bytes, and this is its only owner.
        unsafe {
            self.memory.driver.free(self.address, self.bytes);
        }
        self.memory.lock().live_bytes -= self.bytes;
    }
}
