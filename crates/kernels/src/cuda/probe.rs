//! What this machine has for a GPU as a device, found without failing.

use super::driver::Gpu;
use super::nvidia;

/// Why something cannot be used, and what helps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong.
    pub message: String,
    /// What the user can do about it.
    pub hint: String,
}

/// A GPU that the driver knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// What it is.
    pub gpu: Gpu,
    /// Bytes of its memory that nobody has taken, where they were asked for and the driver says.
    pub free_bytes: Option<usize>,
    /// Why it cannot be used; none where it can.
    pub problem: Option<Problem>,
}

/// The vendor's matrix products: what was found, and where it was looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Products {
    /// The library's file and its version, as `12.4.5`.
    pub found: Option<(String, String)>,
    /// Every place that was tried, with what was there.
    pub searched: Vec<String>,
}

/// What this machine has for a GPU as a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The CUDA version that the driver supports, as (12, 4), or why there is no driver.
    pub driver: Result<(u32, u32), Problem>,
    /// The GPUs in the driver's order, which `CUDA_VISIBLE_DEVICES` may change.
    pub gpus: Vec<Candidate>,
    /// cuBLASLt.
    pub products: Products,
}

impl Report {
    /// The GPU that is taken where none was named: the first that can be used, or why none can.
    ///
    /// # Errors
    /// The driver's problem, or that of the first GPU.
    pub fn first_usable(&self) -> Result<&Gpu, Problem> {
        if let Err(problem) = &self.driver {
            return Err(problem.clone());
        }
        if let Some(candidate) = self.gpus.iter().find(|candidate| candidate.problem.is_none()) {
            return Ok(&candidate.gpu);
        }
        Err(self.gpus.first().and_then(|candidate| candidate.problem.clone()).unwrap_or_else(nvidia::no_gpus))
    }
}

/// Looks for the driver, its GPUs and the libraries that make them faster. No GPU is taken for that.
pub fn probe() -> Report {
    nvidia::probe()
}

/// The same with the GPUs' free memory, for which each is taken for a moment: one that cannot be has a problem.
pub fn probe_memory() -> Report {
    nvidia::probe_memory()
}
