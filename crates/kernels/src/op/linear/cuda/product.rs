//! Matrix products on a GPU: of the vendor's library where it is there, else of the crate's own kernels.

use crate::cuda::blas::{Matrix, Product};
use crate::cuda::driver_error;
use crate::cuda::launch::{Argument, DeviceFloats, Launch, THREADS};
use crate::cuda::memory::Storage;
use crate::{Cuda, DType, Error, Result};

use super::plan::{FEW_ROWS, Plan};

/// `c = alpha (a b + a' b') + beta c + bias`, sums in `f32`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sum {
    /// a `[m, k]` and b `[k, n]`, as they are read; of any floating type.
    pub(crate) first: (Matrix, Matrix),
    /// The same with a depth of its own; its operands lie as the first's do.
    pub(crate) second: Option<(Matrix, Matrix)>,
    /// `[m, n]`.
    pub(crate) c: Matrix,
    pub(crate) alpha: f32,
    pub(crate) beta: f32,
    /// `[n]`, of any floating type.
    pub(crate) bias: Option<DeviceFloats>,
}

impl Sum {
    pub(super) fn terms(&self) -> impl Iterator<Item = (Matrix, Matrix)> {
        std::iter::once(self.first).chain(self.second)
    }

    pub(super) fn operands(&self) -> impl Iterator<Item = Matrix> {
        self.terms().flat_map(|(a, b)| [a, b])
    }

    /// Products of the first term.
    fn products(&self) -> usize {
        self.c.rows * self.c.columns * depth(&self.first)
    }
}

impl Cuda {
    /// A sum of products.
    pub(crate) fn sum(&self, op: &'static str, sum: &Sum) -> Result<()> {
        if sum.c.rows == 0 || sum.c.columns == 0 || self.sum_by_library(op, sum)? {
            return Ok(());
        }
        match sum.second {
            // A thin term at odd places would keep the whole sum from the fastest kernels.
            Some(second) if sum.products() >= TWO_LAUNCHES && at_odds(sum.first, second) => {
                self.two_sums(op, sum, second)
            }
            _ => self.sum_by_kernels(op, sum, Plan::of(sum, self.gpu())),
        }
    }

    /// Whether the vendor's library has done it, in the cases where it is faster and knows a way.
    ///
    /// It takes one term. Of two, the second is made first: it is an adapter's, smaller than the weight's, and so is the
    /// error of a result in `bf16` that is rounded twice. A bias is rounded to c's type.
    fn sum_by_library(&self, op: &'static str, sum: &Sum) -> Result<bool> {
        let Some(blas) = self.driver.blas().filter(|_| library_is_faster(sum)) else { return Ok(false) };
        let &Sum { first: (a, b), second, c, alpha, beta, bias } = sum;
        if let Some(second) = second {
            return self.two_sums(op, sum, second).map(|()| true);
        }
        let rounded = bias.map(|bias| self.as_type(op, bias, c.columns, c.dtype)).transpose()?;
        let bias = rounded.as_ref().map(|bias| bias.floats.address);
        #[expect(unsafe_code, reason = "the library reads and writes what it is given the address of")]
        // SAFETY: the operation has checked that its tensors are as large as their shapes say.
        let outcome = unsafe { blas.product(&Product { a, b, c, alpha, beta, bias }) };
        outcome.map_err(|failure| driver_error(op, &failure))
    }

    /// A sum of two terms as two sums, the second term's first.
    pub(super) fn two_sums(&self, op: &'static str, sum: &Sum, second: (Matrix, Matrix)) -> Result<()> {
        self.sum(op, &Sum { first: second, second: None, ..*sum })?;
        self.sum(op, &Sum { second: None, beta: 1.0, bias: None, ..*sum })
    }

    /// Elements in another type: where they are, or in scratch.
    pub(crate) fn as_type(
        &self,
        op: &'static str,
        floats: DeviceFloats,
        count: usize,
        dtype: DType,
    ) -> Result<Typed> {
        if floats.dtype == dtype {
            return Ok(Typed { floats, _scratch: None });
        }
        let scratch = self.scratch(op, count * dtype.size())?;
        let typed = DeviceFloats { address: scratch.address(), dtype };
        self.apply(op, "cast", count, &[floats.into(), typed.into(), (count as u64).into()])?;
        Ok(Typed { floats: typed, _scratch: Some(scratch) })
    }

    /// By the kernels of a plan, which takes such a sum.
    pub(super) fn sum_by_kernels(&self, op: &'static str, sum: &Sum, plan: Plan) -> Result<()> {
        match plan.parts {
            1 => self.launch_sum(op, sum, plan),
            _ => self.add_parts(op, &self.parts_by_kernels(op, sum, plan)?, sum),
        }
    }

    /// a b, a `[m, k]` and b `[k, n]`, as it comes: in as many parts as are made at once.
    pub(crate) fn parts(&self, op: &'static str, a: Matrix, b: Matrix) -> Result<Parts> {
        let (rows, columns) = (if a.transposed { a.columns } else { a.rows }, width(&b));
        let c = Matrix { address: 0, dtype: DType::F32, rows, columns, stride: columns, transposed: false };
        let sum = Sum { first: (a, b), second: None, c, alpha: 1.0, beta: 0.0, bias: None };
        if self.driver.blas().is_some() && library_is_faster(&sum) {
            let storage = self.scratch(op, rows * columns * DType::F32.size())?;
            self.sum(op, &Sum { c: Matrix { address: storage.address(), ..c }, ..sum })?;
            return Ok(Parts { storage, count: 1, rows, columns });
        }
        self.parts_by_kernels(op, &sum, Plan::of(&sum, self.gpu()))
    }

    /// The terms' sum in the parts of a plan.
    fn parts_by_kernels(&self, op: &'static str, sum: &Sum, plan: Plan) -> Result<Parts> {
        let &Matrix { rows, columns, .. } = &sum.c;
        let storage = self.scratch(op, plan.parts * rows * columns * DType::F32.size())?;
        let c = Matrix { address: storage.address(), dtype: DType::F32, stride: columns, ..sum.c };
        if rows > 0 && columns > 0 {
            self.launch_sum(op, &Sum { c, alpha: 1.0, beta: 0.0, bias: None, ..*sum }, plan)?;
        }
        Ok(Parts { storage, count: plan.parts, rows, columns })
    }

    /// `c = alpha (the parts' sum) + beta c + bias`, with the rest of what `sum` says.
    fn add_parts(&self, op: &'static str, parts: &Parts, sum: &Sum) -> Result<()> {
        let threads = parts.rows * parts.columns.div_ceil(4);
        self.launch(
            op,
            "sum_parts",
            Launch::blocks(threads.div_ceil(THREADS as usize), THREADS),
            &[
                parts.storage.address().into(),
                (parts.count as u32).into(),
                word(op, parts.rows)?.into(),
                word(op, parts.columns)?.into(),
                floats(&sum.c).into(),
                (sum.c.stride as u64).into(),
                bias(sum).into(),
                sum.alpha.into(),
                sum.beta.into(),
                u32::from(output_aligned(sum)).into(),
            ],
        )
    }

    /// Launches the plan's kernel; c is f32 of m x n for each part where there are several.
    fn launch_sum(&self, op: &'static str, sum: &Sum, plan: Plan) -> Result<()> {
        let kernel = plan.kernel;
        let absent = Matrix { rows: 0, columns: 0, address: 0, ..sum.first.0 };
        let second = sum.second.unwrap_or((absent, absent));
        let mut arguments: Vec<Argument> = Vec::with_capacity(19);
        for (a, b) in [sum.first, second] {
            for x in [a, b] {
                arguments.extend([Argument::from(floats(&x)), (x.stride as u64).into()]);
            }
            arguments.push(word(op, depth(&(a, b)))?.into());
        }
        let rest: [Argument; 9] = [
            layout(sum, second, kernel.vector()).into(),
            word(op, sum.c.rows)?.into(),
            word(op, sum.c.columns)?.into(),
            floats(&sum.c).into(),
            (sum.c.stride as u64).into(),
            bias(sum).into(),
            sum.alpha.into(),
            sum.beta.into(),
            word(op, plan.steps_of_a_part(sum))?.into(),
        ];
        arguments.extend(rest);
        let [rows, columns] = kernel.tile();
        let tiles = sum.c.rows.div_ceil(rows) * sum.c.columns.div_ceil(columns);
        let launch = Launch {
            grid: [tiles, 1, plan.parts],
            threads: kernel.threads(),
            shared_bytes: kernel.shared_bytes(),
        };
        self.launch(op, kernel.name(sum), launch, &arguments)
    }
}

/// Matrices of `f32` `[rows, columns]`, one behind the other, whose sum is a product.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) storage: Storage,
    pub(crate) count: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

/// Elements in a type that was asked for.
#[derive(Debug)]
pub(crate) struct Typed {
    pub(crate) floats: DeviceFloats,
    /// What holds them where they had to be cast.
    _scratch: Option<Storage>,
}

/// Below so many products, two launches cost more than the library saves.
const TWO_LAUNCHES: usize = 1 << 31;

fn library_is_faster(sum: &Sum) -> bool {
    let &Sum { first: (a, b), second, c, .. } = sum;
    let terms = second.is_none() || sum.products() >= TWO_LAUNCHES;
    a.dtype == b.dtype && a.dtype != DType::F16 && depth(&sum.first) > 0 && c.rows > FEW_ROWS && terms
}

/// Whether only the first of two terms of `bf16` lies at whole vectors.
fn at_odds(first: (Matrix, Matrix), second: (Matrix, Matrix)) -> bool {
    let whole = |(a, b): (Matrix, Matrix)| [a, b].iter().all(|x| x.dtype == DType::Bf16 && aligned(x, 8));
    whole(first) && !whole(second)
}

/// Products along the depth of a term.
pub(super) fn depth((a, _): &(Matrix, Matrix)) -> usize {
    if a.transposed { a.rows } else { a.columns }
}

/// Columns of b as it is read.
fn width(b: &Matrix) -> usize {
    if b.transposed { b.rows } else { b.columns }
}

/// A size as the kernels take it.
pub(crate) fn word(op: &'static str, size: usize) -> Result<u32> {
    let message = || format!("a product of {size} rows or columns");
    // Kernels add a tile's size to it.
    match u32::try_from(size) {
        Ok(size) if size <= u32::MAX / 2 => Ok(size),
        _ => Err(Error::Value { op, message: message() }),
    }
}

fn floats(matrix: &Matrix) -> DeviceFloats {
    DeviceFloats { address: matrix.address, dtype: matrix.dtype }
}

fn bias(sum: &Sum) -> DeviceFloats {
    sum.bias.unwrap_or(DeviceFloats { address: 0, dtype: DType::F32 })
}

/// Whether four elements of a row of c, and of the bias, can be written at once.
fn output_aligned(sum: &Sum) -> bool {
    aligned(&sum.c, 4) && sum.bias.is_none_or(|bias| bias.address.is_multiple_of(16))
}

/// Whether vectors of so many elements can be read of a matrix.
pub(super) fn aligned(matrix: &Matrix, vector: usize) -> bool {
    let bytes = vector * matrix.dtype.size();
    matrix.address.is_multiple_of(bytes as u64) && matrix.stride.is_multiple_of(vector)
}

/// The bits of `gemm.cuh`.
fn layout(sum: &Sum, second: (Matrix, Matrix), vector: usize) -> u32 {
    let bits = [
        sum.first.0.transposed,
        sum.first.1.transposed,
        aligned(&sum.first.0, vector),
        aligned(&sum.first.1, vector),
        aligned(&second.0, vector),
        aligned(&second.1, vector),
        output_aligned(sum),
    ];
    bits.iter().enumerate().map(|(bit, &set)| u32::from(set) << bit).sum()
}
