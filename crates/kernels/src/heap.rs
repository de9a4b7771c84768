//! The C library's heap, told to give memory back.
//!
//! glibc keeps what is freed, and whenever a block that it had mapped by itself is freed, it takes later blocks up
//! to that size from the heap instead (mallopt(3), "Dynamic adjustment of the mmap threshold"). Tensors that come
//! and go would then leave holes that nothing gives back, and a process would grow to more than its tensors ever
//! took. Elsewhere these functions do nothing.

/// Makes every block of at least 256 KiB a mapping of its own for the rest of the process, given back when it is
/// freed. To be called before the first tensor is made.
pub fn map_large_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    glibc::set_thresholds();
}

/// Gives the pages of everything freed so far back to the system.
pub fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    glibc::trim();
}

/// Asks for pages of 2 MiB behind a block that has not been written yet: a step that takes it anew then waits for
/// one page where it would wait for 512.
pub(crate) fn prefer_huge_pages(block: &mut [f32]) {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    glibc::prefer_huge_pages(block);
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    let _ = block;
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "calls into the C library")]
mod glibc {
    use std::ffi::{c_int, c_void};

    // <sys/mman.h>
    const MADV_HUGEPAGE: c_int = 14;

    // <malloc.h>
    const M_TRIM_THRESHOLD: c_int = -1;
    const M_MMAP_THRESHOLD: c_int = -3;

    unsafe extern "C" {
        fn mallopt(parameter: c_int, value: c_int) -> c_int;
        fn malloc_trim(pad: usize) -> c_int;
        fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int;
    }

    pub(super) fn prefer_huge_pages(block: &mut [f32]) {
        const PAGE: usize = 4 << 10;
        let start = (block.as_mut_ptr() as usize).next_multiple_of(PAGE);
        let end = (block.as_ptr_range().end as usize) / PAGE * PAGE;
        if start < end {
            // SAFETY: whole pages inside a block that is borrowed alone. The advice changes no contents; a system
            // that refuses it uses small pages (madvise(2)).
            unsafe { madvise(start as *mut c_void, end - start, MADV_HUGEPAGE) };
        }
    }

    pub(super) fn set_thresholds() {
        // SAFETY: mallopt takes any numbers and may be called at any time (mallopt(3)). A refused value leaves
        // the default in place, which costs memory and nothing else.
        unsafe {
            mallopt(M_MMAP_THRESHOLD, 256 << 10);
            // Fixing the first fixes this one too, at 128 KiB: every small tensor at the heap's end would go to the
            // system and come back.
            mallopt(M_TRIM_THRESHOLD, 2 << 20);
        }
    }

    pub(super) fn trim() {
        // SAFETY: malloc_trim only returns free pages and is safe beside other threads (malloc_trim(3)).
        unsafe { malloc_trim(0) };
    }
}
