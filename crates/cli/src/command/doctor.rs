//! `doctor`: what this machine has to compute with, what is taken of it, and whether that computes right.

use std::process::ExitCode;
use std::time::Instant;

use lora_sb_kernels::cuda::{Candidate, Problem, Report, probe_memory};
use lora_sb_kernels::{Accum, Cuda, DType, Kernels};
use lora_sb_tune::plan::system::available_memory;
use serde_json::{Map, Value, json};

use crate::args::DoctorArgs;
use crate::bench::Processor;
use crate::device::{Device, DeviceChoice, processor};
use crate::display::{self, bytes, count, duration};
use crate::failure::{Failure, Result};

/// Runs the command.
pub(crate) fn run(arguments: &DoctorArgs) -> Result<ExitCode> {
    let (here, report) = (Processor::this(), probe_memory());
    let device = Device::open(DeviceChoice::Auto, None)?;
    if arguments.json {
        let checked = Checked::of(&device);
        display::output(&as_json(&here, &report, &device, &checked)?.to_string())?;
        return outcome(&device, checked);
    }
    display::output(&format!("{}Processor{:#}", display::HEADING, display::HEADING))?;
    display::output(&display::table(&processor_rows(&here)?))?;
    display::heading("GPUs");
    display::output(&display::table(&gpu_rows(&report)))?;
    display::heading("What --device auto takes");
    display::output(&display::table(&[("device ", device.described())]))?;
    let checked = Checked::of(&device);
    display::output(&display::table(&checked.rows()))?;
    outcome(&device, checked)
}

fn outcome(device: &Device, checked: Checked) -> Result<ExitCode> {
    let Some(problem) = checked.problem else { return Ok(ExitCode::SUCCESS) };
    let hint = match device.choice {
        DeviceChoice::Cpu => "this build is not for this processor: build the program anew on it",
        _ => "update the GPU's driver; --device cpu computes on the processor",
    };
    Err(Failure::new(format!("the device that would be taken does not work: {problem}")).hint(hint))
}

fn processor_rows(here: &Processor) -> Result<Vec<(&'static str, String)>> {
    let cpu = processor(None)?;
    let instructions = match here.instructions.is_empty() {
        true => "no vector instructions that are known".into(),
        false => here.instructions.join(", "),
    };
    let fast = match cpu.prefers() {
        DType::Bf16 => "bf16, which it has instructions for: --dtype bf16",
        _ => "f32",
    };
    let memory = match (here.memory, available_memory()) {
        (Some(all), Some(free)) => format!("{} free of {}", bytes(free), bytes(all)),
        (Some(all), None) => bytes(all),
        (None, _) => "this system does not tell".into(),
    };
    Ok(vec![
        ("name", here.name.clone()),
        ("threads", here.cores.to_string()),
        ("has", instructions),
        ("fast in", fast.into()),
        ("memory", memory),
    ])
}

fn gpu_rows(report: &Report) -> Vec<(&str, String)> {
    let (major, minor) = match &report.driver {
        Err(problem) => return vec![("driver", shown(problem))],
        Ok(version) => *version,
    };
    let mut rows = vec![("driver", format!("CUDA {major}.{minor}"))];
    if report.gpus.is_empty() {
        rows.extend(report.first_usable().err().map(|problem| ("GPUs", shown(&problem))));
    }
    rows.extend(report.gpus.iter().map(|candidate| ("GPU", described(candidate))));
    rows.push(("products", products(report)));
    rows
}

fn shown(Problem { message, hint }: &Problem) -> String {
    format!("{message}\n{hint}")
}

fn described(Candidate { gpu, free_bytes, problem }: &Candidate) -> String {
    let (major, minor) = gpu.capability;
    let free = free_bytes.map_or(String::new(), |free| format!("{} free of ", bytes(free)));
    let text = format!(
        "cuda:{}, {}, compute capability {major}.{minor}, {}, {free}{}",
        gpu.ordinal,
        gpu.name,
        count(gpu.multiprocessors as usize, "multiprocessor"),
        bytes(gpu.memory_bytes)
    );
    match problem {
        None => text,
        Some(problem) => format!("{text}\nnot usable: {}", shown(problem)),
    }
}

/// Who computes products, and where the vendor's library was looked for if it was not found.
fn products(report: &Report) -> String {
    match &report.products.found {
        Some((path, version)) => format!("cuBLASLt {version}, {path}"),
        None => format!(
            "the program's own; cuBLASLt, which may be faster, was not found:\n{}",
            report.products.searched.join("\n")
        ),
    }
}

/// What was found out about a device by using it.
struct Checked {
    /// Kernels that are ready, and the time that it took; a GPU's alone.
    kernels: Option<(usize, f64)>,
    /// Who computes the GPU's products.
    products: Option<String>,
    /// What does not work.
    problem: Option<String>,
}

impl Checked {
    fn of(device: &Device) -> Checked {
        let mut checked = Checked { kernels: None, products: None, problem: None };
        let outcome = checked.compile(device).and_then(|()| multiply(&*device.kernels));
        checked.problem = outcome.err();
        checked
    }

    /// A GPU's kernels: the driver compiles them once and keeps them.
    fn compile(&mut self, device: &Device) -> Result<(), String> {
        let DeviceChoice::Cuda(number) = device.choice else { return Ok(()) };
        let words = |error: lora_sb_kernels::Error| error.to_string();
        let (start, gpu) = (Instant::now(), Cuda::open(number).map_err(words)?);
        self.products = Some(gpu.products().unwrap_or_else(|reason| format!("the program's own: {reason}")));
        self.kernels = Some((gpu.prepare().map_err(words)?, start.elapsed().as_secs_f64()));
        Ok(())
    }

    fn rows(&self) -> Vec<(&str, String)> {
        let mut rows = Vec::new();
        if let Some((number, seconds)) = self.kernels {
            rows.push((
                "kernels",
                format!("{number}, ready in {}; the driver keeps them", duration(seconds)),
            ));
        }
        rows.extend(self.products.clone().map(|products| ("uses   ", products)));
        let works = self.problem.is_none().then(|| "products of f32 and bf16 are exact".to_owned());
        rows.extend(works.map(|works| ("works  ", works)));
        rows
    }
}

/// Small products of whole numbers, which are exact in every type and order of adding up.
fn multiply(kernels: &dyn Kernels) -> Result<(), String> {
    let [tokens, out, width] = [33, 72, 160];
    let whole = |index: usize| ((index * 7 + index / 11) % 9) as f32 - 4.0;
    let [x, w] = [tokens * width, out * width].map(|elements| (0..elements).map(whole).collect::<Vec<f32>>());
    let sum = |t: usize, n: usize| -> f32 { (0..width).map(|k| x[t * width + k] * w[n * width + k]).sum() };
    let expected: Vec<f32> = (0..tokens * out).map(|index| sum(index / out, index % out)).collect();
    for dtype in [DType::F32, DType::Bf16] {
        let product = || -> lora_sb_kernels::Result<Vec<f32>> {
            let mut input = kernels.empty_of(dtype, &[tokens, width])?;
            kernels.write_f32(&mut input, &x)?;
            let weight = kernels.from_f32(&w, &[out, width])?;
            let mut y = kernels.zeros(&[tokens, out])?;
            kernels.linear(&input, &weight, 1.0, Accum::Replace, &mut y)?;
            kernels.to_f32(&y)
        };
        if product().map_err(|error| error.to_string())? != expected {
            return Err(format!("a product of {dtype} is wrong"));
        }
    }
    Ok(())
}

fn as_json(here: &Processor, report: &Report, device: &Device, checked: &Checked) -> Result<Value> {
    let mut gpu = Map::new();
    match &report.driver {
        Ok((major, minor)) => gpu.insert("driver".into(), json!(format!("CUDA {major}.{minor}"))),
        Err(problem) => gpu.insert("problem".into(), problem_json(problem)),
    };
    gpu.insert("gpus".into(), report.gpus.iter().map(gpu_json).collect());
    let (path, version) = report.products.found.clone().unzip();
    gpu.insert(
        "products".into(),
        json!({ "path": path, "version": version, "searched": report.products.searched }),
    );
    let (kernels, seconds) = checked.kernels.unzip();
    Ok(json!({
        "processor": {
            "name": here.name,
            "threads": here.cores,
            "instructions": here.instructions,
            "dtype": processor(None)?.prefers().to_string(),
            "memory_bytes": here.memory,
            "free_bytes": available_memory(),
        },
        "cuda": gpu,
        "auto": {
            "device": device.choice.to_string(),
            "reason": device.reason,
            "kernels": kernels,
            "kernels_s": seconds,
            "products": checked.products,
            "works": checked.problem.is_none(),
            "problem": checked.problem,
        },
    }))
}

fn gpu_json(Candidate { gpu, free_bytes, problem }: &Candidate) -> Value {
    json!({
        "device": format!("cuda:{}", gpu.ordinal),
        "name": gpu.name,
        "capability": format!("{}.{}", gpu.capability.0, gpu.capability.1),
        "multiprocessors": gpu.multiprocessors,
        "memory_bytes": gpu.memory_bytes,
        "free_bytes": free_bytes,
        "usable": problem.is_none(),
        "problem": problem.as_ref().map(problem_json),
    })
}

fn problem_json(Problem { message, hint }: &Problem) -> Value {
    json!({ "message": message, "hint": hint })
}
