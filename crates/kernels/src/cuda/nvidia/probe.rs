//! What the driver says of this machine, and the words for what is wrong.

use std::ffi::c_int;
use std::path::PathBuf;

use super::Places;
use super::api::Api;
use super::blas;
use super::context::Device;
use super::library::Absence;
use crate::cuda::driver::{Failure, Outcome};
use crate::cuda::probe::{Candidate, Problem, Products, Report};

/// The least CUDA version of a driver that compiles the embedded PTX, whose version is 8.1.
pub(super) const LEAST_VERSION: (u32, u32) = (12, 1);

/// The same as the vendor numbers the driver itself.
const LEAST_DRIVER: &str = "530";

pub(in crate::cuda) fn probe() -> Report {
    report(&Places::of_the_process(), Asked::What)
}

pub(in crate::cuda) fn probe_memory() -> Report {
    report(&Places::of_the_process(), Asked::Memory)
}

/// What is asked of each GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// What it is.
    What,
    /// And what is free of its memory.
    Memory,
}

pub(super) fn report(places: &Places, asked: Asked) -> Report {
    let none = |problem, products| Report { driver: Err(problem), gpus: Vec::new(), products };
    let (api, version) = match set_up(&places.driver) {
        Ok(found) => found,
        Err(problem) => return none(problem, Products::default()),
    };
    let products = blas::find(&places.products, version);
    let all = |count| (0..count).map(|ordinal| candidate(&api, ordinal, asked)).collect();
    match api.count().and_then(all) {
        Ok(gpus) => Report { driver: Ok(version), gpus, products },
        Err(failure) => none(refused(failure), products),
    }
}

fn candidate(api: &Api, ordinal: usize, asked: Asked) -> Outcome<Candidate> {
    let Device { handle, gpu, problem } = Device::of(api, ordinal)?;
    if problem.is_some() || asked == Asked::What {
        return Ok(Candidate { gpu, free_bytes: None, problem });
    }
    Ok(match free_bytes(api, handle) {
        Ok(free) => Candidate { gpu, free_bytes: Some(free), problem: None },
        Err(failure) => Candidate { gpu, free_bytes: None, problem: Some(refused(failure)) },
    })
}

/// Bytes of a GPU's memory that nobody has taken. Its context is made for that and given back.
#[expect(unsafe_code, reason = "calls of the driver with places for their results")]
fn free_bytes(api: &Api, device: c_int) -> Outcome<usize> {
    let (mut context, mut free, mut total) = (0, 0, 0);
    // SAFETY: places for the results; the context is given back as often as it is retained.
    unsafe {
        api.primary_ctx_retain(&mut context, device)?;
        let outcome = api.ctx_set_current(context).and_then(|()| api.mem_get_info(&mut free, &mut total));
        let _ = api.ctx_set_current(0);
        let _ = api.primary_ctx_release(device);
        outcome.map(|()| free)
    }
}

/// The driver, ready to be asked, and the CUDA version that it supports.
#[expect(unsafe_code, reason = "a call of the driver")]
pub(super) fn set_up(places: &[PathBuf]) -> Result<(Api, (u32, u32)), Problem> {
    let api = Api::first_of(places).map_err(|absence| absent(&absence))?;
    let version = api.version().map_err(refused)?;
    if version < LEAST_VERSION {
        let (major, minor) = version;
        return Err(too_old(&format!("the driver supports CUDA {major}.{minor}")));
    }
    // SAFETY: it takes no pointers and may be called more than once.
    unsafe { api.init(0) }.map_err(refused)?;
    Ok((api, version))
}

fn absent(absence: &Absence) -> Problem {
    match absence {
        Absence::Library(message) => Problem {
            message: format!("no CUDA driver: {message}"),
            hint: format!(
                "install NVIDIA's driver, version {LEAST_DRIVER} or later; in a container, start it with the GPU \
                 (docker: --gpus all)"
            ),
        },
        Absence::Function(name) => too_old(&format!("the driver has no function {name}")),
    }
}

fn too_old(message: &str) -> Problem {
    let (major, minor) = LEAST_VERSION;
    Problem {
        message: message.into(),
        hint: format!("install driver version {LEAST_DRIVER} or later, which supports CUDA {major}.{minor}"),
    }
}

/// A driver that does not do what it is asked.
pub(super) fn refused(failure: Failure) -> Problem {
    let hint = match failure.out_of_memory {
        true => "end what fills the GPU's memory; `nvidia-smi` lists the processes",
        false => {
            "check that `nvidia-smi` lists the GPU in the same place, and that no other process has it for itself"
        }
    };
    Problem { message: failure.to_string(), hint: hint.into() }
}

pub(in crate::cuda) fn no_gpus() -> Problem {
    Problem {
        message: "the CUDA driver knows no GPU".into(),
        hint: "check `CUDA_VISIBLE_DEVICES`, and that this process may use the GPU".into(),
    }
}

/// A number that no GPU has.
pub(super) fn no_such(api: &Api, count: usize) -> Problem {
    if count == 0 {
        return no_gpus();
    }
    let named = |ordinal| Device::of(api, ordinal).map_or("unknown".into(), |device| device.gpu.name);
    let all: Vec<String> = (0..count).map(|ordinal| format!("cuda:{ordinal} ({})", named(ordinal))).collect();
    Problem { message: "there is no such GPU".into(), hint: format!("take one of {}", all.join(", ")) }
}
