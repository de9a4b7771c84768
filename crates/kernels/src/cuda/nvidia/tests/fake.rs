//! The libraries of `fake/`, compiled for one test each, so that tests do not share their state.

use std::ffi::c_int;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::process::Command;

use libloading::Library;
use tempfile::TempDir;

use super::super::{Nvidia, Places, Search};
use crate::cuda::module::MODULES;
use crate::cuda::probe::Problem;

/// A driver and the vendor's products, of which the driver may be that of another machine.
pub(super) struct Fake {
    dir: TempDir,
    pub(super) places: Places,
}

impl Fake {
    /// With definitions for the driver's source; `None` where no C++ compiler is found.
    pub(super) fn new(definitions: &[&str]) -> Option<Fake> {
        let dir = tempfile::tempdir().unwrap();
        let driver = dir.path().join("libcuda.so.1");
        if !compiled("cuda.cpp", definitions, &driver) {
            eprintln!("no C++ compiler: the driver's bindings are not tested");
            return None;
        }
        let products = Search::only(dir.path().join("none.so"));
        Some(Fake { places: Places { driver: vec![driver], products, modules: MODULES, ptx: None }, dir })
    }

    /// With products, too.
    pub(super) fn with_products(definitions: &[&str]) -> Option<Fake> {
        let mut fake = Fake::new(&[])?;
        let library = fake.products();
        assert!(compiled("cublaslt.cpp", definitions, &library));
        fake.places.products = Search::only(library);
        Some(fake)
    }

    fn products(&self) -> PathBuf {
        self.dir.path().join("libcublasLt.so.12")
    }

    pub(super) fn open(&self) -> Result<Nvidia, Problem> {
        Nvidia::open(&self.places, 0)
    }

    /// A number that the fake driver or the fake products tell.
    pub(super) fn count(&self, name: &str) -> c_int {
        let path = if name == "fake_asked" { self.products() } else { self.places.driver[0].clone() };
        #[expect(unsafe_code, reason = "a function of the fake")]
        // SAFETY: the fakes export it with this signature.
        unsafe {
            let library = Library::new(path).unwrap();
            library.get::<unsafe extern "C" fn() -> c_int>(name.as_bytes()).unwrap()()
        }
    }

    /// Lets launches run something. The library stays, and knows it when it is loaded again.
    pub(super) fn hook(&self, run: Hook) {
        #[expect(unsafe_code, reason = "a function of the fake")]
        // SAFETY: the fake exports it with this signature.
        unsafe {
            let library = ManuallyDrop::new(Library::new(&self.places.driver[0]).unwrap());
            library.get::<unsafe extern "C" fn(Hook)>(b"fake_hook").unwrap()(run);
        }
    }
}

/// A launch: name, grid, threads, shared bytes, order, arguments.
pub(super) type Hook = unsafe extern "C" fn(
    *const std::ffi::c_char,
    *const u32,
    u32,
    u32,
    c_int,
    *mut *mut std::ffi::c_void,
) -> c_int;

/// Whether a source of `fake/` could be compiled: it always can where there is a compiler.
fn compiled(source: &str, definitions: &[&str], library: &Path) -> bool {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/nvidia/fake").join(source);
    let mut command = Command::new(compiler);
    command
        .args(["-std=c++17", "-shared", "-fPIC", "-fvisibility-inlines-hidden", "-o"])
        .arg(library)
        .arg(source);
    command.args(definitions.iter().map(|definition| format!("-D{definition}")));
    match command.output() {
        Err(_) => false,
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            true
        }
    }
}
