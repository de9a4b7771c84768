//! The device that a test runs on, and the folder that its fixtures lie in: chosen here and nowhere else.
//!
//! | variable | what it does |
//! |---|---|
//! | `LORA_SB_TEST_DEVICE` | `cuda:N`: all tests run on that GPU; `emulated`: on the emulated one; `cpu`: none on that |
//! | `LORA_SB_ROOT` | the repository's folder, where the tests run on another machine than the one that built them |

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::sync::Arc;

use lora_sb_kernels::cuda::ThreadOrder;
use lora_sb_kernels::{Cpu, Cuda, Kernels};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Choice {
    Cpu,
    /// The GPU's kernels on the processor.
    Emulated,
    /// `cuda:N`.
    Gpu(usize),
}

// A test has a thread of its own.
thread_local! {
    static CHOSEN: Cell<Choice> = Cell::new(named().unwrap_or(Choice::Cpu));
    /// The GPU of this test: its tensors are no other device's.
    static GPU: RefCell<Option<(Choice, Arc<dyn Kernels>)>> = const { RefCell::new(None) };
}

/// What the environment asks for.
fn named() -> Option<Choice> {
    let name = std::env::var("LORA_SB_TEST_DEVICE").ok()?;
    let choice = match name.split_once(':') {
        None if name == "cpu" => Some(Choice::Cpu),
        None if name == "emulated" => Some(Choice::Emulated),
        Some(("cuda", ordinal)) => ordinal.parse().ok().map(Choice::Gpu),
        _ => None,
    };
    Some(choice.unwrap_or_else(|| panic!("LORA_SB_TEST_DEVICE={name}: expected cpu, emulated or cuda:N")))
}

/// The device of this test: the processor with two threads, where neither the environment nor [`on_each_device`] says
/// otherwise.
pub(crate) fn device() -> Arc<dyn Kernels> {
    let chosen = CHOSEN.get();
    if chosen == Choice::Cpu {
        return fresh_device();
    }
    GPU.with_borrow_mut(|kept| match kept {
        Some((choice, gpu)) if *choice == chosen => Arc::clone(gpu),
        _ => Arc::clone(&kept.insert((chosen, fresh_device())).1),
    })
}

/// Such a device that has counted nothing yet.
pub(crate) fn fresh_device() -> Arc<dyn Kernels> {
    match CHOSEN.get() {
        Choice::Cpu => Arc::new(Cpu::new(2).unwrap()),
        Choice::Emulated => Arc::new(Cuda::emulated(ThreadOrder::Forward).unwrap().unwrap()),
        Choice::Gpu(ordinal) => Arc::new(Cuda::open(ordinal).unwrap()),
    }
}

/// Runs a test on the processor and on the emulated GPU, as far as there is a C++ compiler to build it; where the
/// environment names a device, on that alone.
pub(crate) fn on_each_device(test: impl Fn()) {
    let choices = match named() {
        Some(choice) => vec![choice],
        None if Cuda::emulated(ThreadOrder::Forward).unwrap().is_none() => {
            eprintln!("SKIPPED on the emulated GPU: no C++ compiler");
            vec![Choice::Cpu]
        }
        None => vec![Choice::Cpu, Choice::Emulated],
    };
    for choice in choices {
        CHOSEN.set(choice);
        eprintln!("on {}", device().name());
        test();
    }
    CHOSEN.set(named().unwrap_or(Choice::Cpu));
}

/// The repository's folder.
pub(crate) fn root() -> PathBuf {
    let built_at = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    std::env::var_os("LORA_SB_ROOT").map_or_else(built_at, PathBuf::from)
}

/// The folder of fixtures from transformers; `LORA_SB_GOLDEN` names another of the same format.
pub(crate) fn golden_root() -> PathBuf {
    std::env::var_os("LORA_SB_GOLDEN").map_or_else(|| root().join("golden"), PathBuf::from)
}
