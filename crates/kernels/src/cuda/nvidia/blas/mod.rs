//! The vendor's matrix products: cuBLASLt.

mod api;
mod search;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use self::api::{Api, Found, number};
pub(super) use self::search::Search;
use super::context::Context;
use super::library::Handle;
use crate::DType;
use crate::cuda::blas::{Blas, Matrix, Product};
use crate::cuda::driver::Outcome;
use crate::cuda::probe::Products;
use crate::cuda::sizes::WORKSPACE_BYTES;

/// Addresses are told apart by their alignment up to this.
const MOST_ALIGNED: u64 = 256;

/// A bias is read 16 bytes at a time.
const BIAS_ALIGNMENT: u64 = 16;

/// Where the library is, without loading it into a GPU's context.
pub(super) fn find(search: &Search, driver: (u32, u32)) -> Products {
    search.load(driver).1
}

/// The library in a context, with what it has found out about every product so far.
#[derive(Debug)]
pub(super) struct CublasLt {
    api: Api,
    context: Arc<Context>,
    library: Handle,
    workspace: u64,
    preference: Handle,
    /// None where the library has no way. The lock is held through a call: a plan holds the bias of the product that is
    /// being asked for.
    plans: Mutex<HashMap<Key, Option<Plan>>>,
}

/// What the library's way to compute a product depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    sides: [Side; 3],
    has_bias: bool,
    reads_c: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Side {
    dtype: DType,
    rows: usize,
    columns: usize,
    stride: usize,
    transposed: bool,
    alignment: u64,
}

/// A product as the library describes it, and its way to compute it.
#[derive(Debug, Default)]
struct Plan {
    description: Handle,
    /// Of the library's A, B and C.
    layouts: [Handle; 3],
    algorithm: [u64; 8],
}

impl Key {
    /// The library's matrices are column-major: a row-major matrix is its transpose there, and `C = A B` is `C' = B' A'`.
    /// So its A is b, its B is a, and its C, with a bias for every row, is c.
    fn of(product: &Product) -> Key {
        let side = |matrix: &Matrix| Side {
            dtype: matrix.dtype,
            rows: matrix.columns,
            columns: matrix.rows,
            stride: matrix.stride,
            transposed: matrix.transposed,
            alignment: alignment(matrix.address),
        };
        Key {
            sides: [&product.b, &product.a, &product.c].map(side),
            has_bias: product.bias.is_some(),
            reads_c: product.beta != 0.0,
        }
    }
}

fn alignment(address: u64) -> u64 {
    1 << address.trailing_zeros().min(MOST_ALIGNED.trailing_zeros())
}

fn code(dtype: DType) -> c_int {
    match dtype {
        DType::Bf16 => number::R_16BF,
        _ => number::R_32F,
    }
}

/// Whether the types are those of [`Product`], the library's numbers hold the sizes, and there is something to add up.
fn is_taken(product: &Product) -> bool {
    let fits = |&size: &usize| size > 0 && size <= i32::MAX as usize;
    let is_known = |side: &&Matrix| matches!(side.dtype, DType::F32 | DType::Bf16);
    let sides = [&product.a, &product.b, &product.c];
    sides.iter().all(|side| is_known(side) && fits(&side.rows) && fits(&side.columns))
        && product.a.dtype == product.b.dtype
        && product.bias.is_none_or(|bias| bias.is_multiple_of(BIAS_ALIGNMENT))
}

#[expect(unsafe_code, reason = "calls of the library with places for their results")]
impl CublasLt {
    /// The library in a context.
    ///
    /// # Errors
    /// In words: it is not found, or does not run there.
    pub(super) fn new(
        context: Arc<Context>,
        search: &Search,
        driver: (u32, u32),
    ) -> Result<CublasLt, String> {
        let api = search.load(driver).0.ok_or("cuBLASLt is not found")?;
        let (plans, library) = (Mutex::default(), 0);
        let mut own = CublasLt { api, context, library, workspace: 0, preference: 0, plans };
        own.set_up().map_err(|failure| format!("{} is not usable: {failure}", own.name()))?;
        Ok(own)
    }

    fn set_up(&mut self) -> Outcome {
        self.context.current()?;
        // SAFETY: places for the handles. What is made before a failure is given back when `self` is dropped.
        unsafe {
            self.api.create(&mut self.library)?;
            self.api.preference_create(&mut self.preference)?;
        }
        self.workspace = self.context.allocate(WORKSPACE_BYTES)?;
        self.prefer(number::PREFERENCE_WORKSPACE_BYTES, &WORKSPACE_BYTES)?;
        self.prefer(number::PREFERENCE_REDUCTIONS, &number::REDUCTION_COMPUTE_TYPE)
    }

    fn prefer<T>(&self, attribute: c_int, value: &T) -> Outcome {
        let pointer = std::ptr::from_ref(value).cast::<c_void>();
        // SAFETY: the value is as large as is said.
        unsafe { self.api.preference_set(self.preference, attribute, pointer, size_of::<T>()) }
    }

    fn describe<T>(&self, description: Handle, attribute: c_int, value: &T) -> Outcome {
        let pointer = std::ptr::from_ref(value).cast::<c_void>();
        // SAFETY: the value is as large as is said.
        unsafe { self.api.description_set(description, attribute, pointer, size_of::<T>()) }
    }

    /// The library's way to compute such products; none where it has none.
    fn plan(&self, key: &Key) -> Outcome<Option<Plan>> {
        let mut plan = Plan::default();
        let outcome = self.fill(&mut plan, key);
        if !matches!(outcome, Ok(true)) {
            self.give_back(&plan);
        }
        Ok(outcome?.then_some(plan))
    }

    fn fill(&self, plan: &mut Plan, key: &Key) -> Outcome<bool> {
        // SAFETY: places for the handles.
        unsafe {
            self.api.description_create(&mut plan.description, number::COMPUTE_32F, number::R_32F)?;
            for (layout, side) in plan.layouts.iter_mut().zip(&key.sides) {
                let (rows, columns, stride) = (side.rows as u64, side.columns as u64, side.stride as i64);
                self.api.layout_create(layout, code(side.dtype), rows, columns, stride)?;
            }
        }
        for (attribute, side) in
            [number::DESCRIPTION_TRANSPOSED_A, number::DESCRIPTION_TRANSPOSED_B].into_iter().zip(&key.sides)
        {
            let operation = if side.transposed { number::OPERATION_T } else { number::OPERATION_N };
            self.describe(plan.description, attribute, &operation)?;
        }
        if key.has_bias {
            self.describe(plan.description, number::DESCRIPTION_EPILOGUE, &number::EPILOGUE_BIAS)?;
            self.describe(plan.description, number::DESCRIPTION_BIAS_TYPE, &code(key.sides[2].dtype))?;
            // Some ways are open only where the pointer is known to be there; it is set again at each call.
            self.describe(plan.description, number::DESCRIPTION_BIAS_POINTER, &self.workspace)?;
        }
        let [a, b, c] = key.sides.map(|side| side.alignment as u32);
        for (attribute, alignment) in (number::PREFERENCE_ALIGNMENT..).zip([a, b, c, c]) {
            self.prefer(attribute, &alignment)?;
        }
        self.ask(plan)
    }

    /// Asks the library for its best way; false where it has none.
    fn ask(&self, plan: &mut Plan) -> Outcome<bool> {
        let (mut found, mut count) = (Found::default(), 0);
        let [a, b, c] = plan.layouts;
        // SAFETY: the handles are the library's, and there is room for the one result that is asked for.
        let outcome = unsafe {
            let (description, preference) = (plan.description, self.preference);
            self.api.heuristic(self.library, description, a, b, c, c, preference, 1, &mut found, &mut count)
        };
        plan.algorithm = found.algorithm;
        match outcome {
            Err(failure) if failure.out_of_memory => Err(failure),
            // Not supported, or a combination that this version takes for an error.
            Err(_) => Ok(false),
            Ok(()) => Ok(count > 0 && found.status == 0),
        }
    }

    fn give_back(&self, plan: &Plan) {
        // SAFETY: the handles are the plan's own and are not used again.
        unsafe {
            for layout in plan.layouts.into_iter().filter(|&layout| layout != 0) {
                let _ = self.api.layout_destroy(layout);
            }
            if plan.description != 0 {
                let _ = self.api.description_destroy(plan.description);
            }
        }
    }

    /// Computes a product by a plan.
    ///
    /// # Safety
    /// As [`Blas::product`].
    unsafe fn run(&self, plan: &Plan, product: &Product) -> Outcome {
        if let Some(bias) = product.bias {
            self.describe(plan.description, number::DESCRIPTION_BIAS_POINTER, &bias)?;
        }
        let ([a, b, c], at) = (plan.layouts, product.c.address);
        // SAFETY: the layouts are those of the product's matrices, which the caller vouches for; the numbers and the way are
        // read before the call returns.
        unsafe {
            self.api.matmul(
                self.library,
                plan.description,
                &product.alpha,
                product.b.address,
                a,
                product.a.address,
                b,
                &product.beta,
                at,
                c,
                at,
                c,
                &plan.algorithm,
                self.workspace,
                WORKSPACE_BYTES,
                self.context.stream,
            )
        }
    }
}

#[expect(unsafe_code, reason = "a product of matrices that the caller vouches for")]
impl Blas for CublasLt {
    fn name(&self) -> String {
        format!("cuBLASLt {}", self.api.version())
    }

    unsafe fn product(&self, product: &Product) -> Outcome<bool> {
        if !is_taken(product) {
            return Ok(false);
        }
        self.context.current()?;
        let key = Key::of(product);
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(self.plan(&key)?),
        };
        match plan {
            None => Ok(false),
            // SAFETY: the caller's promise.
            Some(plan) => unsafe { self.run(plan, product) }.map(|()| true),
        }
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        let _ = self.context.synchronize();
        let plans = std::mem::take(self.plans.get_mut().unwrap_or_else(PoisonError::into_inner));
        plans.into_values().flatten().for_each(|plan| self.give_back(&plan));
        #[expect(unsafe_code, reason = "what the library made is given back")]
        // SAFETY: nothing runs any more, and nobody else has these.
        unsafe {
            if self.preference != 0 {
                let _ = self.api.preference_destroy(self.preference);
            }
            if self.workspace != 0 {
                self.context.free(self.workspace);
            }
            if self.library != 0 {
                let _ = self.api.destroy(self.library);
            }
        }
    }
}
