//! What is said where a GPU cannot be used.

use super::super::probe::Asked;
use super::super::{Places, Search, open, probe};
use super::fake::Fake;
use crate::Error;
use crate::cuda::module::MODULES;

/// The message and the hint of a GPU that cannot be opened.
fn refusal(places: &Places, ordinal: usize) -> (String, String) {
    let error = open(places, ordinal).unwrap_err();
    assert!(matches!(error, Error::Gpu { .. }), "{error}");
    (error.to_string(), error.hint().unwrap())
}

#[track_caller]
fn holds(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

#[test]
fn without_a_driver() {
    let places = Places {
        driver: vec!["/none/libcuda.so.1".into()],
        products: Search::default(),
        modules: MODULES,
        ptx: None,
    };
    let (message, hint) = refusal(&places, 2);
    holds(&message, &["cuda:2: no CUDA driver", "/none/libcuda.so.1"]);
    holds(&hint, &["install NVIDIA's driver", "530", "--gpus all"]);
    let report = probe::report(&places, Asked::Memory);
    assert_eq!(report.first_usable().unwrap_err(), report.driver.clone().unwrap_err());
    assert!(report.gpus.is_empty() && report.products.searched.is_empty());
}

#[test]
fn of_an_old_driver() {
    let Some(fake) = Fake::new(&["VERSION=11080"]) else { return };
    let (message, hint) = refusal(&fake.places, 0);
    holds(&message, &["cuda:0: the driver supports CUDA 11.8"]);
    holds(&hint, &["530", "CUDA 12.1"]);
    let fake = Fake::new(&["LACKS_MEM_ALLOC_ASYNC"]).unwrap();
    let (message, hint) = refusal(&fake.places, 0);
    holds(&message, &["no function cuMemAllocAsync"]);
    holds(&hint, &["530"]);
}

#[test]
fn of_a_gpu_that_is_not_there_or_does_not_do() {
    let Some(fake) = Fake::new(&["DEVICES=2"]) else { return };
    let (message, hint) = refusal(&fake.places, 2);
    holds(&message, &["cuda:2: there is no such GPU"]);
    holds(&hint, &["cuda:0 (Fake GPU)", "cuda:1 (Second fake GPU)"]);
    let fake = Fake::new(&["DEVICES=0"]).unwrap();
    holds(&refusal(&fake.places, 0).1, &["CUDA_VISIBLE_DEVICES"]);
    holds(&probe::report(&fake.places, Asked::Memory).first_usable().unwrap_err().message, &["knows no GPU"]);
    let fake = Fake::new(&["CAPABILITY=75"]).unwrap();
    let (message, hint) = refusal(&fake.places, 0);
    holds(&message, &["Fake GPU has compute capability 7.5"]);
    holds(&hint, &["8.0"]);
    assert_eq!(fake.count("fake_retained"), 0);
    let fake = Fake::new(&["POOLS=0"]).unwrap();
    holds(&refusal(&fake.places, 0).0, &["no stream-ordered memory"]);
    holds(
        &probe::report(&fake.places, Asked::Memory).first_usable().unwrap_err().message,
        &["no stream-ordered memory"],
    );
}

#[test]
fn a_report_tells_all_there_is() {
    let Some(fake) = Fake::with_products(&[]) else { return };
    let report = probe::report(&fake.places, Asked::Memory);
    assert_eq!(report.driver, Ok((12, 4)));
    let [candidate] = &report.gpus[..] else { panic!("{report:?}") };
    assert_eq!(candidate.free_bytes, Some(256 << 20));
    let quick = probe::report(&fake.places, Asked::What);
    assert_eq!((quick.gpus[0].free_bytes, &quick.gpus[0].gpu), (None, &candidate.gpu));
    assert_eq!(report.first_usable(), Ok(&candidate.gpu));
    let gpu = &candidate.gpu;
    assert_eq!((gpu.name.as_str(), gpu.capability, gpu.memory_bytes), ("Fake GPU", (9, 0), 256 << 20));
    assert_eq!((gpu.ordinal, gpu.multiprocessors, gpu.shared_bytes), (0, 132, 227 << 10));
    let (path, version) = report.products.found.unwrap();
    assert!(path.ends_with("libcublasLt.so.12") && version == "12.4.5", "{path} {version}");
    assert_eq!(fake.count("fake_retained"), 0);
}

/// PTX 8.1 is that of CUDA 12.1, and so on (the release notes in the PTX manual).
#[test]
fn the_least_driver_is_that_of_the_embedded_ptx() {
    let (major, minor) = probe::LEAST_VERSION;
    assert_eq!(major, 12);
    for module in MODULES {
        let version = module.ptx.lines().find_map(|line| line.strip_prefix(".version "));
        assert_eq!(version, Some(format!("8.{minor}").as_str()), "{}", module.name);
    }
}
