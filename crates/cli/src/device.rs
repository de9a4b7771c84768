//! The device that computes: as it is asked for, and as it was found.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use lora_sb_kernels::cuda::{Candidate, Problem, Report, probe};
use lora_sb_kernels::{Cpu, Cuda, DType, Kernels};
use lora_sb_tune::config::Precision;

use crate::display::{self, bytes};
use crate::failure::{Failure, Result};

/// `--device` as it is typed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum DeviceChoice {
    /// The first GPU that can be used, else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A GPU by its number.
    Cuda(usize),
    /// What stands for a GPU in the tests of this program.
    StandIn,
}

const CPU: &str = "cpu";
const STAND_IN: &str = "cuda:emulated";

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "auto" => Ok(DeviceChoice::Auto),
            None if text == CPU => Ok(DeviceChoice::Cpu),
            None if text == "cuda" => Ok(DeviceChoice::Cuda(0)),
            Some(("cuda", number)) if number.parse::<usize>().is_ok() => {
                Ok(DeviceChoice::Cuda(number.parse().unwrap_or_default()))
            }
            _ if text == STAND_IN && has_stand_in() => Ok(DeviceChoice::StandIn),
            _ => Err("expected auto, cpu, or cuda:N, the number of a GPU".into()),
        }
    }
}

fn has_stand_in() -> bool {
    matches!(Cuda::stand_in(), Ok(Some(_)))
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str(CPU),
            DeviceChoice::Cuda(number) => write!(f, "cuda:{number}"),
            DeviceChoice::StandIn => f.write_str(STAND_IN),
        }
    }
}

/// A device that computes.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub(crate) kernels: Arc<dyn Kernels>,
    /// What it is asked for by: never `auto`.
    pub(crate) choice: DeviceChoice,
    /// Why it was taken, where nobody named it.
    pub(crate) reason: Option<String>,
}

impl Device {
    /// Opens what was asked for; the processor with so many threads, all of its cores where none are given.
    ///
    /// # Errors
    /// A GPU that was named and cannot be used, with those that can.
    pub(crate) fn open(choice: DeviceChoice, threads: Option<usize>) -> Result<Device> {
        let kernels: Arc<dyn Kernels> = match choice {
            DeviceChoice::Auto => return Device::found(threads),
            DeviceChoice::Cpu => processor(threads)?,
            DeviceChoice::Cuda(number) => Arc::new(named(number, &probe())?),
            DeviceChoice::StandIn => match Cuda::stand_in()? {
                Some(gpu) => Arc::new(gpu),
                None => return Err(Failure::new("no emulated GPU").hint("install a C++ compiler")),
            },
        };
        Ok(Device { kernels, choice, reason: None })
    }

    /// The first GPU that can be used. Where there is one that cannot, that is worth a warning: on other machines the
    /// processor is what one expects.
    fn found(threads: Option<usize>) -> Result<Device> {
        let report = probe();
        let problem = match report.first_usable() {
            Ok(gpu) => match Cuda::open(gpu.ordinal) {
                Ok(cuda) => {
                    let choice = DeviceChoice::Cuda(gpu.ordinal);
                    return Ok(Device {
                        kernels: Arc::new(cuda),
                        choice,
                        reason: Some("the first GPU".into()),
                    });
                }
                Err(error) => Problem { message: error.to_string(), hint: error.hint().unwrap_or_default() },
            },
            Err(problem) => problem,
        };
        if !report.gpus.is_empty() {
            display::warn(&format!("the processor computes: {}; {}", problem.message, problem.hint));
        }
        // Where the driver was looked for is told to those who ask for a GPU by its number.
        let message = match problem.message.split_once(": ") {
            Some((missing @ "no CUDA driver", _)) => missing,
            _ => &problem.message,
        };
        let reason = Some(format!("no GPU: {message}"));
        Ok(Device { kernels: processor(threads)?, choice: DeviceChoice::Cpu, reason })
    }

    /// The device's own name, and why it was taken.
    pub(crate) fn described(&self) -> String {
        match &self.reason {
            Some(reason) => format!("{}; {reason}", self.kernels.name()),
            None => self.kernels.name(),
        }
    }

    /// What is computed in where nobody says: on a GPU what it is made for, on the processor f32.
    pub(crate) fn precision(&self) -> Precision {
        match self.kernels.place().is_host() {
            false if self.kernels.prefers() == DType::Bf16 => Precision::Bf16,
            _ => Precision::F32,
        }
    }
}

/// The processor, for what is read and not computed, too.
pub(crate) fn processor(threads: Option<usize>) -> Result<Arc<dyn Kernels>> {
    Ok(Arc::new(Cpu::new(threads.unwrap_or_else(all_cores))?))
}

/// The cores of this machine that this process may use.
pub(crate) fn all_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The GPU of a number.
fn named(number: usize, report: &Report) -> Result<Cuda> {
    let refused = |Problem { message, hint }: &Problem| {
        let message = format!("--device cuda:{number}: {message}");
        Failure::new(message).hint(format!("{hint}; --device cpu computes on the processor"))
    };
    if let Err(problem) = &report.driver {
        return Err(refused(problem));
    }
    match report.gpus.get(number).map(|candidate| &candidate.problem) {
        Some(None) => Ok(Cuda::open(number)?),
        Some(Some(problem)) => Err(refused(problem)),
        None => {
            Err(refused(&Problem { message: "there is no such GPU".into(), hint: there_are(&report.gpus) }))
        }
    }
}

/// The GPUs that are there, in words.
fn there_are(gpus: &[Candidate]) -> String {
    let one = |Candidate { gpu, problem, .. }: &Candidate| {
        let unusable = problem.as_ref().map_or(String::new(), |problem| format!(", {}", problem.message));
        format!("cuda:{} ({}, {}{unusable})", gpu.ordinal, gpu.name, bytes(gpu.memory_bytes))
    };
    match gpus.len() {
        0 => "there is no GPU".into(),
        1 => format!("there is {}", one(&gpus[0])),
        _ => format!("there are {}", gpus.iter().map(one).collect::<Vec<_>>().join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use lora_sb_kernels::cuda::{Gpu, Products};

    use super::*;

    #[test]
    fn a_device_is_read_and_shown() {
        for (text, choice) in [
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Cpu),
            ("cuda", DeviceChoice::Cuda(0)),
            ("cuda:3", DeviceChoice::Cuda(3)),
        ] {
            assert_eq!(text.parse(), Ok(choice));
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CUDA"] {
            let error = text.parse::<DeviceChoice>().unwrap_err();
            assert!(error.contains("auto") && error.contains("cuda:N"), "{text:?}: {error}");
        }
    }

    fn candidate(ordinal: usize, problem: Option<&str>) -> Candidate {
        let gpu = Gpu {
            ordinal,
            name: format!("Model {ordinal}"),
            capability: (9, 0),
            memory_bytes: 80 << 30,
            multiprocessors: 1,
            shared_bytes: 1,
        };
        let problem = problem.map(|message| Problem { message: message.into(), hint: "take another".into() });
        Candidate { gpu, free_bytes: None, problem }
    }

    /// The failure of asking for a number, as it is shown.
    fn refusal(number: usize, report: &Report) -> String {
        format!("{:?}", named(number, report).unwrap_err())
    }

    #[test]
    fn a_gpu_that_is_not_there_is_refused_with_those_that_are() {
        let driver = Problem { message: "no driver".into(), hint: "install one".into() };
        let mut report = Report { driver: Err(driver), gpus: Vec::new(), products: Products::default() };
        let without_driver = refusal(0, &report);
        for part in ["cuda:0: no driver", "install one; --device cpu"] {
            assert!(without_driver.contains(part), "{part:?} is not in {without_driver}");
        }
        report.driver = Ok((12, 4));
        report.gpus = vec![candidate(0, None), candidate(1, Some("too old"))];
        let (missing, old) = (refusal(2, &report), refusal(1, &report));
        for part in ["cuda:2", "there are cuda:0 (Model 0, 80.0 GiB), cuda:1 (Model 1, 80.0 GiB, too old)"] {
            assert!(missing.contains(part), "{part:?} is not in {missing}");
        }
        assert!(old.contains("cuda:1: too old") && old.contains("take another"), "{old}");
        report.gpus.truncate(1);
        assert!(refusal(1, &report).contains("there is cuda:0 (Model 0"));
    }
}
