//! The memory that there is for a run.

use lora_sb_kernels::Kernels;
use lora_sb_tune::plan::{PROCESS_OVERHEAD, system};

use crate::failure::Result;

/// The memory that a run will compute in, before it is read.
pub(crate) struct Room {
    /// Bytes that are taken: by this process, or by a GPU's driver.
    pub(crate) taken: usize,
    /// Bytes that the run may come to, those included; `None` where nobody says.
    pub(crate) free: Option<usize>,
}

impl Room {
    /// Of the device's own memory, or the process's.
    pub(crate) fn of(kernels: &dyn Kernels) -> Result<Room> {
        if let Some(taken) = kernels.place().overhead_bytes() {
            // The driver's own part is counted on both sides: what it really takes is no longer free.
            return Ok(Room { taken, free: kernels.available_bytes()?.map(|free| free + taken) });
        }
        Ok(Room { taken: memory_in_use(), free: system::available_memory() })
    }
}

/// What this process takes at the moment, with everything that reading the data left behind given back.
fn memory_in_use() -> usize {
    lora_sb_kernels::heap::trim();
    system::memory_in_use().unwrap_or(PROCESS_OVERHEAD)
}
