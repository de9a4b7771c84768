//! The system's CUDA driver.

use super::Cuda;
use super::probe::{Problem, Products, Report};
use crate::{Error, Result};

impl Cuda {
    /// The GPU of a number, as the driver counts them.
    ///
    /// # Errors
    /// Where there is no driver, no such GPU, or the GPU cannot be used; the error's hint says what helps.
    pub fn open(ordinal: usize) -> Result<Cuda> {
        let Problem { message, hint } = no_driver();
        Err(Error::Gpu { ordinal, message, hint })
    }
}

pub(super) fn probe() -> Report {
    Report { driver: Err(no_driver()), gpus: Vec::new(), products: Products::default() }
}

fn no_driver() -> Problem {
    Problem { message: "no CUDA driver is installed".into(), hint: "install NVIDIA's driver".into() }
}

pub(super) fn no_gpus() -> Problem {
    Problem {
        message: "the CUDA driver knows no GPU".into(),
        hint: "check `CUDA_VISIBLE_DEVICES`, and that this process may use the GPU".into(),
    }
}
