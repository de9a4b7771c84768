//! cuBLASLt's functions, by the names and with the numbers of its header `cublasLt.h`.

use std::ffi::{CStr, c_char, c_int, c_void};

use super::super::library::{Absence, Handle, library};
use crate::cuda::driver::{Failure, Outcome};

library! {
    /// cuBLASLt, of version 12 or 13.
    Api {
        status {
            fn create = "cublasLtCreate"(library: *mut Handle);
            fn destroy = "cublasLtDestroy"(library: Handle);
            fn description_create = "cublasLtMatmulDescCreate"(description: *mut Handle, compute: c_int, scale: c_int);
            fn description_destroy = "cublasLtMatmulDescDestroy"(description: Handle);
            fn description_set = "cublasLtMatmulDescSetAttribute"(
                description: Handle,
                attribute: c_int,
                value: *const c_void,
                bytes: usize,
            );
            fn layout_create = "cublasLtMatrixLayoutCreate"(
                layout: *mut Handle,
                dtype: c_int,
                rows: u64,
                columns: u64,
                stride: i64,
            );
            fn layout_destroy = "cublasLtMatrixLayoutDestroy"(layout: Handle);
            fn preference_create = "cublasLtMatmulPreferenceCreate"(preference: *mut Handle);
            fn preference_destroy = "cublasLtMatmulPreferenceDestroy"(preference: Handle);
            fn preference_set = "cublasLtMatmulPreferenceSetAttribute"(
                preference: Handle,
                attribute: c_int,
                value: *const c_void,
                bytes: usize,
            );
            fn heuristic = "cublasLtMatmulAlgoGetHeuristic"(
                library: Handle,
                description: Handle,
                a: Handle,
                b: Handle,
                c: Handle,
                d: Handle,
                preference: Handle,
                asked: c_int,
                found: *mut Found,
                count: *mut c_int,
            );
            fn matmul = "cublasLtMatmul"(
                library: Handle,
                description: Handle,
                alpha: *const f32,
                a: u64,
                a_layout: Handle,
                b: u64,
                b_layout: Handle,
                beta: *const f32,
                c: u64,
                c_layout: Handle,
                d: u64,
                d_layout: Handle,
                algorithm: *const [u64; 8],
                workspace: u64,
                workspace_bytes: usize,
                stream: Handle,
            );
        }
        other {
            fn get_version = "cublasLtGetVersion"() -> usize;
            fn get_status_name = "cublasLtGetStatusName"(c_int) -> *const c_char;
        }
    }
}

/// A way to compute a product: `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Found {
    pub(super) algorithm: [u64; 8],
    pub(super) workspace_bytes: usize,
    pub(super) status: c_int,
    pub(super) waves: f32,
    pub(super) reserved: [c_int; 4],
}

/// Numbers of `cublasLt.h`, `cublas_api.h` and `library_types.h`.
pub(super) mod number {
    use std::ffi::c_int;

    pub(crate) const ALLOC_FAILED: c_int = 3;
    pub(crate) const R_32F: c_int = 0;
    pub(crate) const R_16BF: c_int = 14;
    /// Sums in `f32`, of `f32` operands as they are: no TF32.
    pub(crate) const COMPUTE_32F: c_int = 68;
    pub(crate) const OPERATION_N: c_int = 0;
    pub(crate) const OPERATION_T: c_int = 1;
    pub(crate) const DESCRIPTION_TRANSPOSED_A: c_int = 3;
    pub(crate) const DESCRIPTION_TRANSPOSED_B: c_int = 4;
    pub(crate) const DESCRIPTION_EPILOGUE: c_int = 7;
    pub(crate) const DESCRIPTION_BIAS_POINTER: c_int = 8;
    pub(crate) const DESCRIPTION_BIAS_TYPE: c_int = 26;
    pub(crate) const EPILOGUE_BIAS: u32 = 4;
    pub(crate) const PREFERENCE_WORKSPACE_BYTES: c_int = 1;
    pub(crate) const PREFERENCE_REDUCTIONS: c_int = 3;
    /// Of A; those of B, C and D follow.
    pub(crate) const PREFERENCE_ALIGNMENT: c_int = 5;
    /// Parts of a sum are kept in `f32` and added in order by a second kernel. The other schemes round them to c's type,
    /// and one of them adds them up where they are.
    pub(crate) const REDUCTION_COMPUTE_TYPE: u32 = 2;
}

impl Api {
    pub(super) fn check(&self, call: &'static str, status: c_int) -> Outcome {
        if status == 0 {
            return Ok(());
        }
        Err(Failure { call, message: self.name_of(status), out_of_memory: status == number::ALLOC_FAILED })
    }

    #[expect(unsafe_code, reason = "a call of the library's")]
    fn name_of(&self, status: c_int) -> String {
        // SAFETY: the library's names are static.
        unsafe {
            let name = (self.get_status_name)(status);
            match name.is_null() {
                true => format!("error {status}"),
                false => CStr::from_ptr(name).to_string_lossy().into_owned(),
            }
        }
    }

    /// As `12.4.5`.
    #[expect(unsafe_code, reason = "a call of the library's")]
    pub(super) fn version(&self) -> String {
        // SAFETY: it takes nothing.
        let version = unsafe { (self.get_version)() };
        format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
    }
}
