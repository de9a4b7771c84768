//! Copies to the device by way of memory that the GPU can read by itself.
//!
//! The driver copies other memory as well, but may wait for all earlier work first. Here a copy of a few indices
//! never waits, and a model's file is read into one half by several threads while the other half is on its way.

use std::ffi::c_void;
use std::sync::Arc;

use super::api::number;
use super::context::Context;
use super::library::Handle;
use crate::cuda::driver::Outcome;

/// Bytes of a half: a millisecond of the bus, so that starting threads costs little of it.
const HALF: usize = 32 << 20;

/// Pieces from this size on are copied by several threads.
const SEVERAL_THREADS: usize = 2 << 20;

/// Threads are enough when they read memory as fast as the bus takes it.
const MOST_THREADS: usize = 8;

/// What is put behind each other in a half starts at multiples of this.
const ALIGNMENT: usize = 64;

/// Two halves of pinned memory: one is filled while the GPU reads the other.
#[derive(Debug)]
pub(super) struct Staging {
    context: Arc<Context>,
    /// The address of both halves.
    start: usize,
    /// Tells when the GPU has read a half.
    read: [Handle; 2],
    /// The half that is being filled, and how much of it is.
    half: usize,
    filled: usize,
}

#[expect(unsafe_code, reason = "calls of the driver, and memory that it gives")]
impl Staging {
    pub(super) fn new(context: Arc<Context>) -> Outcome<Staging> {
        let mut own = Staging { context, start: 0, read: [0; 2], half: 0, filled: 0 };
        own.context.current()?;
        let mut start: *mut c_void = std::ptr::null_mut();
        // SAFETY: places for the results. What is made before a failure is given back when `own` is dropped.
        unsafe {
            own.context.api.mem_host_alloc(&mut start, 2 * HALF, 0)?;
            own.start = start as usize;
            for event in &mut own.read {
                own.context.api.event_create(event, number::EVENT_DISABLE_TIMING)?;
            }
        }
        Ok(own)
    }

    /// Copies to the device; `bytes` has been read when the call returns.
    ///
    /// # Safety
    /// So many bytes from `to` on are memory of the device.
    pub(super) unsafe fn upload(&mut self, mut to: u64, mut bytes: &[u8]) -> Outcome {
        self.context.current()?;
        while !bytes.is_empty() {
            if self.filled >= HALF {
                self.turn()?;
            }
            let (piece, rest) = bytes.split_at(bytes.len().min(HALF - self.filled));
            let place = (self.start + self.half * HALF + self.filled) as *mut u8;
            // SAFETY: the piece ends within the half, which the GPU has read: `turn` waited for that.
            unsafe {
                copy(std::slice::from_raw_parts_mut(place, piece.len()), piece);
                let stream = self.context.stream;
                self.context.api.memcpy_to_device(to, place.cast(), piece.len(), stream)?;
            }
            self.filled = (self.filled + piece.len()).next_multiple_of(ALIGNMENT);
            to += piece.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// Goes on with the other half, once the GPU has read it.
    fn turn(&mut self) -> Outcome {
        let api = &self.context.api;
        // SAFETY: the events are this one's; one that was never recorded is not waited for.
        unsafe {
            api.event_record(self.read[self.half], self.context.stream)?;
            self.half = 1 - self.half;
            api.event_synchronize(self.read[self.half])?;
        }
        self.filled = 0;
        Ok(())
    }
}

/// Copies; large pieces by several threads, which also wait for a mapped file's pages side by side.
fn copy(to: &mut [u8], from: &[u8]) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    if from.len() < SEVERAL_THREADS || threads == 1 {
        return to.copy_from_slice(from);
    }
    let part = from.len().div_ceil(threads);
    std::thread::scope(|scope| {
        for (to, from) in to.chunks_mut(part).zip(from.chunks(part)) {
            scope.spawn(move || to.copy_from_slice(from));
        }
    });
}

impl Drop for Staging {
    fn drop(&mut self) {
        let _ = self.context.synchronize();
        #[expect(unsafe_code, reason = "what the driver made is given back")]
        // SAFETY: nothing runs any more, and nobody else has the events and the memory.
        unsafe {
            for event in self.read.into_iter().filter(|&event| event != 0) {
                let _ = self.context.api.event_destroy(event);
            }
            if self.start != 0 {
                let _ = self.context.api.mem_free_host(self.start as *mut c_void);
            }
        }
    }
}
