//! Ctrl-C: the first finishes the step and saves, the second ends the program at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::failure::{Failure, Result};

/// The exit code of a run that was interrupted, as shells have it for SIGINT.
pub(crate) const INTERRUPTED: u8 = 130;

/// Installs the handler; the flag becomes true at the first interrupt (SIGINT, and SIGTERM and SIGHUP where
/// there are such).
pub(crate) fn stop_flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let handler = move || {
        if flag.swap(true, Ordering::SeqCst) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        anstream::eprintln!("\ninterrupted: finishing the step, then saving (once more stops at once)");
    };
    ctrlc::set_handler(handler).map_err(|error| Failure::new(format!("no handler for Ctrl-C: {error}")))?;
    Ok(stop)
}
