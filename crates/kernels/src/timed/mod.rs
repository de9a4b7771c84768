//! A device that measures another one, operation by operation.
//!
//! [`Timed`] hands every call on to the device inside it and notes how long it took. Operations that the inner device
//! makes out of others are its own affair: they are not seen from outside, so that no time is counted twice.
//! What a call is worth in floating-point operations and bytes stands in one place, `cost.rs`.

mod cost;
mod operations;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use self::cost::Cost;
use crate::{DType, Kernels, Memory, Place, Result, SharedBytes, Tensor, Usage};

/// Seconds since some fixed moment.
pub type Stopwatch = dyn Fn() -> f64 + Send + Sync;

/// A device that counts the calls of another, their time and what they computed.
///
/// Times are from a call's start to the end of its work, for which the inner device is waited for. They add up to the time of
/// a program that calls one operation at a time, as a model does.
pub struct Timed {
    inner: Arc<dyn Kernels>,
    clock: Box<Stopwatch>,
    rows: Mutex<BTreeMap<Key, OpTime>>,
    paused: AtomicBool,
}

/// An operation, and the weight `[N, K]` of a product.
type Key = (&'static str, Option<[usize; 2]>);

/// What the calls of one operation came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OpTime {
    /// The method's name, as `linear_input_gradient`; `memory` for making, filling, reading and writing tensors.
    pub op: &'static str,
    /// The weight `[N, K]` that a product read, where calls are told apart by it.
    pub weight: Option<[usize; 2]>,
    /// The number of calls.
    pub calls: u64,
    /// Their time.
    pub seconds: f64,
    /// Floating-point operations of products and attention; 0 for all others, whose time is memory's.
    pub operations: f64,
    /// Bytes of the operands, each counted once a call however often it is read or written.
    pub bytes: f64,
}

impl OpTime {
    fn add(&mut self, other: &OpTime) {
        self.calls += other.calls;
        self.seconds += other.seconds;
        self.operations += other.operations;
        self.bytes += other.bytes;
    }
}

impl Timed {
    /// Measures `inner` by `clock`.
    pub fn new(inner: Arc<dyn Kernels>, clock: Box<Stopwatch>) -> Self {
        Timed { inner, clock, rows: Mutex::default(), paused: AtomicBool::new(false) }
    }

    /// What was counted since the start or the last [`Timed::reset`], the longest operation first.
    pub fn report(&self) -> Vec<OpTime> {
        let mut by_op: BTreeMap<&'static str, OpTime> = BTreeMap::new();
        for row in self.rows().values() {
            let row = OpTime { weight: None, ..*row };
            by_op.entry(row.op).and_modify(|sum| sum.add(&row)).or_insert(row);
        }
        longest_first(by_op.into_values())
    }

    /// The same with products told apart by their weight's shape.
    pub fn report_by_weight(&self) -> Vec<OpTime> {
        longest_first(self.rows().values().copied())
    }

    /// Counts nothing and waits for nothing from here on: what is asked for goes to the inner device as if by itself.
    pub fn pause(&self) {
        self.paused.store(true, Ordering::Relaxed);
    }

    /// Counts again.
    pub fn resume(&self) {
        self.paused.store(false, Ordering::Relaxed);
    }

    /// Forgets what was counted.
    pub fn reset(&self) {
        self.rows().clear();
    }

    fn rows(&self) -> MutexGuard<'_, BTreeMap<Key, OpTime>> {
        self.rows.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Runs `call` to the end of what it asks the device for, and counts it, also where it fails.
    fn timed<R>(&self, op: &'static str, cost: Cost, call: impl FnOnce() -> Result<R>) -> Result<R> {
        if self.paused.load(Ordering::Relaxed) {
            return call();
        }
        let start = (self.clock)();
        let result = call().and_then(|value| self.inner.synchronize().map(|()| value));
        let seconds = (self.clock)() - start;
        let Cost { weight, operations, bytes } = cost;
        let row = OpTime { op, weight, calls: 1, seconds, operations, bytes };
        self.rows().entry((op, weight)).and_modify(|sum| sum.add(&row)).or_insert(row);
        result
    }
}

fn longest_first(rows: impl Iterator<Item = OpTime>) -> Vec<OpTime> {
    let mut rows: Vec<OpTime> = rows.collect();
    rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    rows
}

impl std::fmt::Debug for Timed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Timed")
            .field("inner", &self.inner)
            .field("rows", &self.rows())
            .finish_non_exhaustive()
    }
}

impl Kernels for Timed {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn prefers(&self) -> DType {
        self.inner.prefers()
    }

    fn synchronize(&self) -> Result<()> {
        self.inner.synchronize()
    }
}

const MEMORY: &str = "memory";

impl Memory for Timed {
    fn empty(&self, shape: &[usize]) -> Result<Tensor> {
        self.timed(MEMORY, Cost::default(), || self.inner.empty(shape))
    }

    fn empty_of(&self, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        self.timed(MEMORY, Cost::default(), || self.inner.empty_of(dtype, shape))
    }

    fn zeros(&self, shape: &[usize]) -> Result<Tensor> {
        let cost = Cost::of_bytes(4 * shape.iter().product::<usize>());
        self.timed(MEMORY, cost, || self.inner.zeros(shape))
    }

    fn from_f32(&self, values: &[f32], shape: &[usize]) -> Result<Tensor> {
        self.timed(MEMORY, Cost::of_bytes(size_of_val(values)), || self.inner.from_f32(values, shape))
    }

    fn from_u32(&self, values: &[u32], shape: &[usize]) -> Result<Tensor> {
        self.timed(MEMORY, Cost::of_bytes(size_of_val(values)), || self.inner.from_u32(values, shape))
    }

    fn from_bytes(&self, bytes: SharedBytes, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        self.timed(MEMORY, Cost::default(), || self.inner.from_bytes(bytes, dtype, shape))
    }

    fn to_f32(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        self.timed(MEMORY, Cost::moved(&[tensor]), || self.inner.to_f32(tensor))
    }

    fn write_f32(&self, tensor: &mut Tensor, values: &[f32]) -> Result<()> {
        self.timed(MEMORY, Cost::of_bytes(size_of_val(values)), || self.inner.write_f32(tensor, values))
    }

    fn to_owned_f32(&self, tensor: &Tensor) -> Result<Tensor> {
        self.timed(MEMORY, Cost::moved(&[tensor]), || self.inner.to_owned_f32(tensor))
    }

    fn place(&self) -> Place {
        self.inner.place()
    }

    fn available_bytes(&self) -> Result<Option<usize>> {
        self.inner.available_bytes()
    }

    fn usage(&self) -> Usage {
        self.inner.usage()
    }

    fn reset_peak(&self) {
        self.inner.reset_peak();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::{
        Accum, Attention, AttentionShape, Cpu, CrossEntropy, Elementwise, Extra, Linear, Mask, Reduce,
        Segments,
    };

    /// A clock that moves on by a second whenever it is read: a call takes 1 s, two calls between two readings more.
    fn timed() -> Timed {
        let readings = AtomicU64::new(0);
        let clock = move || readings.fetch_add(1, Ordering::Relaxed) as f64;
        Timed::new(Arc::new(Cpu::new(1).unwrap()), Box::new(clock))
    }

    fn row(timed: &Timed, op: &str) -> OpTime {
        timed.report().into_iter().find(|row| row.op == op).unwrap_or_else(|| panic!("no row {op}"))
    }

    #[test]
    fn products_are_handed_on_and_counted_in_every_orientation() {
        let timed = timed();
        let (t, n, k, r) = (3, 5, 7, 2);
        let x = timed.from_f32(&vec![1.0; t * k], &[t, k]).unwrap();
        let w = timed.from_f32(&vec![0.5; n * k], &[n, k]).unwrap();
        let h = timed.from_f32(&vec![2.0; t * r], &[t, r]).unwrap();
        let b = timed.from_f32(&vec![1.0; n * r], &[n, r]).unwrap();
        let a = timed.from_f32(&vec![1.0; r * k], &[r, k]).unwrap();
        let (mut y, mut dx, mut dw) =
            (timed.zeros(&[t, n]).unwrap(), timed.zeros(&[t, k]).unwrap(), timed.zeros(&[n, k]).unwrap());
        timed.reset();
        timed.linear(&x, &w, 1.0, Accum::Replace, &mut y).unwrap();
        timed.linear(&x, &w, 1.0, Accum::Add, &mut y).unwrap();
        timed.linear_input_gradient(&y, &w, 1.0, Accum::Replace, &mut dx).unwrap();
        timed.linear_weight_gradient(&y, &x, 1.0, Accum::Replace, &mut dw).unwrap();
        let product = 2.0 * (t * n * k) as f64;
        assert_eq!((row(&timed, "linear").calls, row(&timed, "linear").operations), (2, 2.0 * product));
        assert_eq!(row(&timed, "linear").seconds, 2.0);
        for op in ["linear_input_gradient", "linear_weight_gradient"] {
            let OpTime { calls, seconds, operations, bytes, .. } = row(&timed, op);
            assert_eq!((calls, seconds, operations), (1, 1.0, product), "{op}");
            assert_eq!(bytes, 4.0 * (t * n + n * k + t * k) as f64, "{op}");
        }
        let extra = Extra { bias: None, term: Some((&h, &b)) };
        timed.linear_fused(&x, &w, extra, Accum::Replace, &mut y).unwrap();
        timed.linear_input_gradient_fused(&y, &w, Some((&h, &a)), Accum::Replace, &mut dx).unwrap();
        assert_eq!(row(&timed, "linear_fused").operations, product + 2.0 * (t * r * n) as f64);
        assert_eq!(row(&timed, "linear_input_gradient_fused").operations, product + 2.0 * (t * r * k) as f64);
        assert_eq!(timed.to_f32(&y).unwrap(), vec![7.0 * 0.5 + 2.0 * 2.0; t * n]);
    }

    #[test]
    fn attention_counts_the_pairs_that_see_each_other() {
        let timed = timed();
        let segments = Segments::packed([3, 1, 4]);
        let (heads, kv_heads, head_size) = (4, 2, 8);
        let (width, narrow) = (heads * head_size, kv_heads * head_size);
        // 3, 1 and 4 tokens: 6 + 1 + 10 pairs for a decoder, 5 + 1 + 7 with a window of two, 9 + 1 + 16 for an encoder.
        for (mask, pairs) in [(Mask::Causal, 17.0), (Mask::Sliding { window: 2 }, 13.0), (Mask::Full, 26.0)] {
            let geometry = AttentionShape { heads, kv_heads, head_size, scale: 1.0, mask, soft_cap: None };
            let tensor = |columns| timed.zeros(&[8, columns]).unwrap();
            let (q, k, v) = (tensor(width), tensor(narrow), tensor(narrow));
            let (mut o, mut lse) = (tensor(width), tensor(heads));
            timed.reset();
            timed.attention(&geometry, &segments, &q, &k, &v, &mut o, &mut lse).unwrap();
            let (mut dq, mut dk, mut dv) = (tensor(width), tensor(narrow), tensor(narrow));
            let gradients = (&mut dq, &mut dk, &mut dv);
            timed.attention_backward(&geometry, &segments, (&q, &k, &v), &o, &lse, &o, gradients).unwrap();
            let product = 2.0 * pairs * width as f64;
            assert_eq!(row(&timed, "attention").operations, 2.0 * product, "{mask:?}");
            assert_eq!(row(&timed, "attention_backward").operations, 5.0 * product, "{mask:?}");
        }
    }

    #[test]
    fn the_loss_counts_a_product_for_each_gradient_that_is_wanted() {
        let timed = timed();
        let (n, d, v) = (3, 5, 11);
        let (x, w) = (timed.zeros(&[n, d]).unwrap(), timed.zeros(&[v, d]).unwrap());
        let labels = timed.from_u32(&[0, 4, 10], &[n]).unwrap();
        let weights = timed.from_f32(&[1.0; 3], &[n]).unwrap();
        let (mut dx, mut dw) = (timed.zeros(&[n, d]).unwrap(), timed.zeros(&[v, d]).unwrap());
        let product = 2.0 * (n * d * v) as f64;
        timed.reset();
        timed.cross_entropy(&x, &w, &labels, &weights, None, 2, None, None).unwrap();
        assert_eq!(row(&timed, "cross_entropy").operations, product);
        timed.cross_entropy(&x, &w, &labels, &weights, None, 2, Some(&mut dx), Some(&mut dw)).unwrap();
        assert_eq!(row(&timed, "cross_entropy").operations, 4.0 * product);
    }

    #[test]
    fn rows_are_told_apart_by_weight_and_forgotten_at_a_reset() {
        let timed = timed();
        let x = timed.zeros(&[2, 3]).unwrap();
        for n in [4, 6] {
            let (w, mut y) = (timed.zeros(&[n, 3]).unwrap(), timed.zeros(&[2, n]).unwrap());
            timed.linear(&x, &w, 1.0, Accum::Replace, &mut y).unwrap();
        }
        assert_eq!(row(&timed, "linear").calls, 2);
        let mut shapes: Vec<_> = timed.report_by_weight().iter().filter_map(|row| row.weight).collect();
        shapes.sort_unstable();
        assert_eq!(shapes, [[4, 3], [6, 3]]);
        timed.reset();
        assert!(timed.report().is_empty());
    }

    #[test]
    fn a_refused_call_is_refused_and_counted() {
        let timed = timed();
        let (x, mut y) = (timed.zeros(&[2]).unwrap(), timed.zeros(&[3]).unwrap());
        assert!(timed.add(1.0, &x, &mut y).is_err());
        let vector = timed.zeros(&[3]).unwrap();
        assert!(timed.linear(&vector, &vector, 1.0, Accum::Replace, &mut y).is_err());
        assert_eq!((row(&timed, "add").calls, row(&timed, "linear").operations), (1, 0.0));
    }

    #[test]
    fn nothing_is_counted_in_a_pause() {
        let timed = timed();
        timed.pause();
        let x = timed.zeros(&[7]).unwrap();
        assert!(timed.report().is_empty());
        timed.resume();
        assert_eq!(timed.sum_of_squares(&x).unwrap(), 0.0);
        assert_eq!((timed.report().len(), row(&timed, "sum_of_squares").calls), (1, 1));
    }

    #[test]
    fn memory_is_that_of_the_inner_device() {
        let timed = timed();
        let tensor = timed.zeros(&[100, 100]).unwrap();
        assert!(timed.usage().live_bytes >= tensor.bytes());
        drop(tensor);
        timed.reset_peak();
        assert_eq!(timed.usage(), Usage { live_bytes: 0, peak_bytes: 0 });
        assert_eq!(timed.name(), Cpu::new(1).unwrap().name());
        assert_eq!(row(&timed, "memory").calls, 1);
    }
}
