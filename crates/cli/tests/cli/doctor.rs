//! `doctor` on a machine without a GPU, and with a driver that answers and computes nothing.

use std::path::Path;
use std::process::Command;

use crate::common::{Run, Workshop, json};

/// Runs it where the system's libraries are first looked for in the workshop's directory, and cuBLASLt nowhere.
fn doctor(shop: &Workshop, arguments: &[&str]) -> Run {
    let mut command = shop.command(&["doctor"]);
    let command =
        command.args(arguments).env("LD_LIBRARY_PATH", shop.path("")).env("LORA_SB_CUBLASLT", "/none");
    Run::of(command.output().unwrap())
}

/// A workshop in whose directory a CUDA driver cannot be loaded.
fn without_driver() -> Workshop {
    let shop = Workshop::new();
    shop.write(
        "libcuda.so.1",
        "no library, though it is long enough to have been one: that is told by its first bytes",
    );
    shop
}

/// A workshop with the driver that the kernels' own tests compile; none where there is no compiler.
fn with_driver(definition: &str) -> Option<Workshop> {
    let shop = Workshop::new();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels/src/cuda/nvidia/fake/cuda.cpp");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let mut command = Command::new(compiler);
    command
        .args(["-std=c++17", "-shared", "-fPIC", definition, "-o"])
        .arg(shop.path("libcuda.so.1"))
        .arg(source);
    match command.status() {
        Ok(status) => assert!(status.success()),
        Err(_) => return None,
    }
    Some(shop)
}

#[test]
#[cfg(target_os = "linux")]
fn without_a_gpu_it_says_why_and_checks_the_processor() {
    let shop = without_driver();
    let run = doctor(&shop, &[]).ok();
    for part in
        ["Processor", "threads", "fast in", "no CUDA driver: ", "--gpus all", "device   cpu", "are exact"]
    {
        assert!(run.out.contains(part), "{part:?} is not in {}", run.out);
    }
    let found = json(&doctor(&shop, &["--json"]).ok().out);
    assert_eq!(found["auto"]["device"], "cpu");
    assert_eq!(found["auto"]["works"], true);
    let message = found["cuda"]["problem"]["message"].as_str().unwrap();
    assert!(message.starts_with("no CUDA driver: ") && message.contains("invalid ELF header"), "{found}");
    assert!(found["auto"]["reason"].as_str().unwrap().starts_with("no GPU: no CUDA driver"), "{found}");
    assert_eq!(found["cuda"]["gpus"], json("[]"));
    let dtype = found["processor"]["dtype"].as_str().unwrap();
    assert!(["f32", "bf16"].contains(&dtype) && found["processor"]["threads"].as_u64().unwrap() > 0);
}

#[test]
#[cfg(target_os = "linux")]
fn a_gpu_that_computes_wrong_is_found_out() {
    let Some(shop) = with_driver("-DMEMORY=4294967296ull") else { return };
    let run = doctor(&shop, &[])
        .failed(1, &["the device that would be taken does not work", "is wrong", "--device cpu"]);
    let gpu = "cuda:0, Fake GPU, compute capability 9.0, 132 multiprocessors, 4.00 GiB free of 4.00 GiB";
    for part in [
        "CUDA 12.4",
        gpu,
        "LORA_SB_CUBLASLT=/none: ",
        "the first GPU",
        "ready in",
        "own: cuBLASLt is not found",
    ] {
        assert!(run.out.contains(part), "{part:?} is not in {}", run.out);
    }
    let run = doctor(&shop, &["--json"]).failed(1, &[]);
    let found = json(&run.out);
    assert_eq!((&found["auto"]["device"], &found["auto"]["works"]), (&"cuda:0".into(), &false.into()));
    assert_eq!(found["cuda"]["gpus"][0]["capability"], "9.0");
    assert!(found["auto"]["kernels"].as_u64().unwrap() > 10, "{found}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_gpu_that_is_too_old_is_named_and_not_taken() {
    let Some(shop) = with_driver("-DCAPABILITY=75") else { return };
    let run = doctor(&shop, &[]).ok();
    for part in ["Fake GPU, compute capability 7.5", "not usable: ", "8.0 (Ampere", "device   cpu"] {
        assert!(run.out.contains(part), "{part:?} is not in {}", run.out);
    }
    assert!(run.err.contains("warning: the processor computes"), "{}", run.err);
}
