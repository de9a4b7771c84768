//! Memory, copies and launches.

use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier};

use super::super::Nvidia;
use super::fake::Fake;
use crate::Error;
use crate::cuda::driver::{Driver, Failure, Start};
use crate::cuda::module::{self, Kernel, Module, kernel};
use crate::cuda::{Cuda, Storage};

/// Bytes that no shift of theirs is.
fn bytes(count: usize, case: usize) -> Vec<u8> {
    (0..count).map(|index| (((index + case) * 0x9e37_79b9) >> 13) as u8).collect()
}

#[expect(unsafe_code, reason = "calls of the driver, within the memory that was taken")]
fn uploaded(driver: &Nvidia, to: u64, bytes: &[u8]) {
    // SAFETY: the tests take as much.
    unsafe { driver.upload(to, bytes).unwrap() };
}

#[expect(unsafe_code, reason = "calls of the driver, within the memory that was taken")]
fn downloaded(driver: &Nvidia, from: u64, count: usize) -> Vec<u8> {
    let mut found = vec![0; count];
    // SAFETY: the tests take as much.
    unsafe { driver.download(from, &mut found).unwrap() };
    found
}

#[expect(unsafe_code, reason = "a launch of the fake")]
fn launched(driver: &Nvidia, kernel: &'static Kernel, shared_bytes: u32) -> Result<(), Failure> {
    let arguments = &mut [std::ptr::null_mut(); 8];
    // SAFETY: the fake does not look at the arguments.
    unsafe { driver.launch(Start { kernel, grid: [1, 2, 3], threads: 64, shared_bytes, arguments }) }
}

#[test]
fn what_is_uploaded_arrives_though_the_source_is_gone() {
    let Some(fake) = Fake::new(&[]) else { return };
    let driver = fake.open().unwrap();
    let sizes = [1, 3, 64, 65, 1 << 20, (32 << 20) - 1, 70_000_001, 7, 40 << 20];
    let start = driver.allocate(sizes.iter().sum()).unwrap();
    let mut at = start;
    for (case, &size) in sizes.iter().enumerate() {
        let mut source = bytes(size, case);
        uploaded(&driver, at, &source);
        source.fill(0xee);
        at += size as u64;
    }
    let found = downloaded(&driver, start, sizes.iter().sum());
    let expected: Vec<u8> = sizes.iter().enumerate().flat_map(|(case, &size)| bytes(size, case)).collect();
    assert!(found == expected);
    #[expect(unsafe_code, reason = "calls of the driver, within the memory that was taken")]
    // SAFETY: so many bytes were taken.
    unsafe {
        driver.clear(start + 1, 2).unwrap()
    };
    assert_eq!(downloaded(&driver, start, 4), [expected[0], 0, 0, expected[3]]);
}

#[test]
fn every_thread_may_ask() {
    let Some(fake) = Fake::new(&[]) else { return };
    let (driver, together) = (fake.open().unwrap(), Barrier::new(4));
    std::thread::scope(|scope| {
        for case in 0..4 {
            let (driver, together) = (&driver, &together);
            scope.spawn(move || {
                together.wait();
                let at = driver.allocate(100_000).unwrap();
                uploaded(driver, at, &bytes(100_000, case));
                driver.synchronize().unwrap();
                assert!(driver.free_bytes().unwrap() > 0);
                launched(driver, kernel("cast").unwrap(), 0).unwrap();
                assert_eq!(downloaded(driver, at, 100_000), bytes(100_000, case));
            });
        }
    });
    assert_eq!(fake.count("fake_loads"), 1);
}

#[test]
fn kernels_can_come_from_files() {
    let Some(mut fake) = Fake::new(&[]) else { return };
    let folder = tempfile::tempdir().unwrap();
    fake.places.ptx = Some(folder.path().into());
    let (driver, cast) = (fake.open().unwrap(), kernel("cast").unwrap());
    let failure = launched(&driver, cast, 0).unwrap_err().to_string();
    assert!(failure.contains("elementwise.ptx"), "{failure}");
    std::fs::write(folder.path().join("elementwise.ptx"), module::MODULES[cast.module].ptx).unwrap();
    launched(&driver, cast, 0).unwrap();
    assert_eq!(fake.count("fake_loads"), 1);
}

#[test]
fn memory_in_pieces_is_given_back_before_there_is_none() {
    let Some(fake) = Fake::new(&[]) else { return };
    let cuda = Cuda::with(Arc::new(fake.open().unwrap()));
    let free = || cuda.free_bytes().unwrap();
    let whole = free();
    let take = |bytes: usize| cuda.scratch("test", bytes);
    let pieces: Vec<Storage> = (0..3).map(|_| take(80 << 20).unwrap()).collect();
    assert_eq!(free(), whole - (240 << 20));
    let error = take(80 << 20).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    let expected = "test: Fake GPU has no room for 83886080 bytes more: 251658240 bytes of 268435456 are";
    assert!(error.to_string().starts_with(expected), "{error}");
    drop(pieces);
    assert_eq!(free(), whole, "what the pool keeps is free");
    assert!(take(200 << 20).is_ok());
}

#[test]
fn everything_is_given_back() {
    let Some(fake) = Fake::with_products(&[]) else { return };
    let driver = fake.open().unwrap();
    let at = driver.allocate(8).unwrap();
    uploaded(&driver, at, &[1; 8]);
    launched(&driver, kernel("cast").unwrap(), 0).unwrap();
    // The tensor, the products' workspace and the staging memory.
    let counts = || ["fake_retained", "fake_live", "fake_loads"].map(|name| fake.count(name));
    assert_eq!(counts(), [1, 3, 1]);
    #[expect(unsafe_code, reason = "memory is given back")]
    // SAFETY: it was taken above and is not used again.
    unsafe {
        driver.free(at, 8)
    };
    drop(driver);
    assert_eq!(counts(), [0, 0, 0]);
}

static SHARED: AtomicU32 = AtomicU32::new(0);

#[expect(unsafe_code, reason = "called by the fake")]
unsafe extern "C" fn note(
    name: *const c_char,
    grid: *const u32,
    threads: u32,
    shared: u32,
    _: c_int,
    _: *mut *mut c_void,
) -> c_int {
    // SAFETY: the fake's pointers are a text's and three numbers'.
    let (name, grid) = unsafe { (std::ffi::CStr::from_ptr(name), std::slice::from_raw_parts(grid, 3)) };
    SHARED.store(shared, Ordering::Relaxed);
    c_int::from(name != c"cast" || grid != [1, 2, 3] || threads != 64)
}

#[test]
fn a_launch_announces_the_shared_memory_that_it_takes() {
    let Some(fake) = Fake::new(&[]) else { return };
    fake.hook(note);
    let (driver, cast) = (fake.open().unwrap(), kernel("cast").unwrap());
    for shared in [0, 48 << 10, 100 << 10, 60 << 10, 227 << 10] {
        launched(&driver, cast, shared).unwrap();
        assert_eq!(SHARED.load(Ordering::Relaxed), shared);
    }
    let failure = launched(&driver, cast, 300 << 10).unwrap_err();
    assert_eq!((failure.call, failure.out_of_memory), ("cuFuncSetAttribute", false));
}

static MODULES: [Module; 2] = [
    Module { name: "broken", source: "", ptx: ".entry broken(\n)\n{ BROKEN }" },
    Module { name: "other", source: "", ptx: ".entry other(\n)\n{}" },
];

fn of_test(name: &'static str, module: usize) -> &'static Kernel {
    Box::leak(Box::new(Kernel { name, module, index: 0, parameters: Vec::new() }))
}

#[test]
fn a_module_that_does_not_compile_says_why() {
    let Some(mut fake) = Fake::new(&[]) else { return };
    fake.places.modules = &MODULES;
    let driver = fake.open().unwrap();
    for _ in 0..2 {
        let failure = launched(&driver, of_test("broken", 0), 0).unwrap_err();
        assert_eq!(
            failure.to_string(),
            "cuModuleLoadDataEx: CUDA_ERROR_INVALID_PTX, in broken.ptx:\nptxas fatal : line 3: BROKEN is no instruction"
        );
    }
    launched(&driver, of_test("other", 1), 0).unwrap();
    let failure = launched(&fake.open().unwrap(), of_test("none", 1), 0).unwrap_err();
    assert_eq!(failure.to_string(), "cuModuleGetFunction: error 500");
}
