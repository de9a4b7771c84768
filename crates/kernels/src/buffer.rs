//! Storage behind a tensor, opaque outside this crate.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use half::{bf16, f16};

use crate::cpu::vector;
use crate::cuda::{DeviceBuffer, Origin};
use crate::{DType, Error, Result, Tensor, Usage, heap};

/// Bytes owned elsewhere (a memory map, the program's own image), shared without a copy.
#[derive(Clone)]
pub struct SharedBytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl SharedBytes {
    /// The bytes `range` of `owner`.
    ///
    /// # Errors
    /// Where the range ends behind the owner's last byte.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> Result<Self> {
        let length = (*owner).as_ref().len();
        if range.start > range.end || range.end > length {
            let message = format!("bytes {}..{} of {length}", range.start, range.end);
            return Err(Error::Value { op: "shared bytes", message });
        }
        Ok(SharedBytes { owner, range })
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

impl std::fmt::Debug for SharedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SharedBytes({:?})", self.range)
    }
}

/// A tensor's storage on one of the devices.
#[derive(Debug)]
pub(crate) enum Buffer {
    /// Owned `f32`, recycled when dropped.
    F32(Recycled),
    /// Owned `bf16`, so many of them; recycled when dropped.
    Bf16(Recycled, usize),
    /// Owned indices.
    U32(Vec<u32>),
    /// Read-only elements of another owner; the bytes are aligned for their type.
    Shared(SharedBytes, DType),
    /// On a GPU.
    Cuda(DeviceBuffer),
}

impl Buffer {
    pub(crate) fn len(&self) -> usize {
        match self {
            Buffer::F32(values) => values.as_slice().len(),
            Buffer::Bf16(_, elements) => *elements,
            Buffer::U32(values) => values.len(),
            Buffer::Shared(shared, dtype) => shared.range.len() / dtype.size(),
            Buffer::Cuda(buffer) => buffer.elements,
        }
    }

    pub(crate) fn dtype(&self) -> DType {
        match self {
            Buffer::F32(_) => DType::F32,
            Buffer::Bf16(..) => DType::Bf16,
            Buffer::U32(_) => DType::U32,
            Buffer::Shared(_, dtype) => *dtype,
            Buffer::Cuda(buffer) => buffer.dtype,
        }
    }
}

impl Buffer {
    /// The error of an operation on the processor that takes no such storage.
    fn refused(&self, op: &'static str, operand: &'static str, expected: &'static str) -> Error {
        match self {
            Buffer::Cuda(_) => Error::Place { op, operand, expected: "cpu".into() },
            _ => Error::Type { op, operand, found: self.dtype(), expected },
        }
    }
}

/// Read-only elements of any floating type.
#[derive(Clone, Copy)]
pub(crate) enum Floats<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

impl<'a> Floats<'a> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Floats::F32(values) => values.len(),
            Floats::Bf16(values) => values.len(),
            Floats::F16(values) => values.len(),
        }
    }

    /// The elements of `range`.
    pub(crate) fn slice(&self, range: Range<usize>) -> Floats<'a> {
        match self {
            Floats::F32(values) => Floats::F32(&values[range]),
            Floats::Bf16(values) => Floats::Bf16(&values[range]),
            Floats::F16(values) => Floats::F16(&values[range]),
        }
    }

    /// Pieces of `length` elements, the last one shorter where it does not divide.
    pub(crate) fn chunks(self, length: usize) -> impl ExactSizeIterator<Item = Floats<'a>> {
        let end = self.len();
        (0..end.div_ceil(length)).map(move |piece| self.slice(piece * length..end.min((piece + 1) * length)))
    }

    /// Elements `start..start + out.len()`, widened.
    pub(crate) fn widen(&self, start: usize, out: &mut [f32]) {
        use half::slice::HalfFloatSliceExt;
        let range = start..start + out.len();
        match self {
            Floats::F32(values) => out.copy_from_slice(&values[range]),
            Floats::Bf16(values) => vector::widen(&values[range], out),
            Floats::F16(values) => values[range].convert_to_f32_slice(out),
        }
    }

    /// All elements as `f32`: where they lie, or widened into `space`.
    pub(crate) fn widened<'s>(&self, space: &'s mut Vec<f32>) -> &'s [f32]
    where
        'a: 's,
    {
        if let Floats::F32(values) = self {
            return values;
        }
        space.resize(self.len(), 0.0);
        self.widen(0, space);
        space
    }
}

/// Elements to be written: `f32`, or `bf16` that values are rounded to.
pub(crate) enum FloatsMut<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

impl<'a> FloatsMut<'a> {
    pub(crate) fn len(&self) -> usize {
        match self {
            FloatsMut::F32(values) => values.len(),
            FloatsMut::Bf16(values) => values.len(),
        }
    }

    /// Pieces of `length` elements, the last one shorter where it does not divide.
    pub(crate) fn chunks(self, length: usize) -> Box<dyn Iterator<Item = FloatsMut<'a>> + 'a> {
        match self {
            FloatsMut::F32(values) => Box::new(values.chunks_mut(length).map(FloatsMut::F32)),
            FloatsMut::Bf16(values) => Box::new(values.chunks_mut(length).map(FloatsMut::Bf16)),
        }
    }

    /// The elements of `range`.
    pub(crate) fn slice(self, range: Range<usize>) -> FloatsMut<'a> {
        match self {
            FloatsMut::F32(values) => FloatsMut::F32(&mut values[range]),
            FloatsMut::Bf16(values) => FloatsMut::Bf16(&mut values[range]),
        }
    }

    /// The same elements, for a shorter time.
    pub(crate) fn reborrow(&mut self) -> FloatsMut<'_> {
        match self {
            FloatsMut::F32(values) => FloatsMut::F32(values),
            FloatsMut::Bf16(values) => FloatsMut::Bf16(values),
        }
    }

    /// Overwrites all elements with those of `x`; one length.
    pub(crate) fn copy(self, x: Floats<'_>) {
        match (x, self) {
            (x, FloatsMut::F32(y)) => x.widen(0, y),
            (Floats::F32(x), FloatsMut::Bf16(y)) => vector::narrow(x, y),
            (Floats::Bf16(x), FloatsMut::Bf16(y)) => y.copy_from_slice(x),
            (Floats::F16(x), FloatsMut::Bf16(y)) => {
                y.iter_mut().zip(x).for_each(|(y, x)| *y = bf16::from_f32(x.to_f32()));
            }
        }
    }

    /// Overwrites all elements with what `work` writes; what stands in its slice before is unspecified.
    pub(crate) fn replace<R>(self, work: impl FnOnce(&mut [f32]) -> R) -> R {
        match self {
            FloatsMut::F32(values) => work(values),
            FloatsMut::Bf16(values) => {
                let mut space = vec![0.0; values.len()];
                let result = work(&mut space);
                vector::narrow(&space, values);
                result
            }
        }
    }

    /// Changes all elements by `work`.
    pub(crate) fn update<R>(self, work: impl FnOnce(&mut [f32]) -> R) -> R {
        match self {
            FloatsMut::F32(values) => work(values),
            FloatsMut::Bf16(values) => {
                let mut space = vec![0.0; values.len()];
                vector::widen(values, &mut space);
                let result = work(&mut space);
                vector::narrow(&space, values);
                result
            }
        }
    }
}

impl Tensor {
    /// The elements of an `f32` tensor.
    pub(crate) fn f32(&self, op: &'static str, operand: &'static str) -> Result<&[f32]> {
        match &self.buffer {
            Buffer::F32(values) => Ok(values.as_slice()),
            Buffer::Shared(shared, DType::F32) => Ok(bytemuck::cast_slice(shared.bytes())),
            other => Err(other.refused(op, operand, "f32")),
        }
    }

    /// The elements of an `f32` tensor that the device owns.
    pub(crate) fn f32_mut(&mut self, op: &'static str, operand: &'static str) -> Result<&mut [f32]> {
        match &mut self.buffer {
            Buffer::F32(values) => Ok(values.as_mut_slice()),
            other => Err(other.refused(op, operand, "f32 that is not a file's")),
        }
    }

    /// The elements of a tensor that the device owns, of either type that it computes in.
    pub(crate) fn floats_mut(&mut self, op: &'static str, operand: &'static str) -> Result<FloatsMut<'_>> {
        match &mut self.buffer {
            Buffer::F32(values) => Ok(FloatsMut::F32(values.as_mut_slice())),
            Buffer::Bf16(values, elements) => Ok(FloatsMut::Bf16(values.as_mut_bf16(*elements))),
            other => Err(other.refused(op, operand, "f32 or bf16 that is not a file's")),
        }
    }

    /// The elements of an index tensor.
    pub(crate) fn u32(&self, op: &'static str, operand: &'static str) -> Result<&[u32]> {
        match &self.buffer {
            Buffer::U32(values) => Ok(values),
            Buffer::Shared(shared, DType::U32) => Ok(bytemuck::cast_slice(shared.bytes())),
            // On a GPU they are kept on the host besides, where they are checked.
            Buffer::Cuda(DeviceBuffer { origin: Origin::Indices(values), .. }) => Ok(values),
            Buffer::Cuda(buffer) => Err(Error::Type { op, operand, found: buffer.dtype, expected: "u32" }),
            other => Err(other.refused(op, operand, "u32")),
        }
    }

    /// The elements of a tensor of any floating type.
    pub(crate) fn floats(&self, op: &'static str, operand: &'static str) -> Result<Floats<'_>> {
        match &self.buffer {
            Buffer::F32(values) => Ok(Floats::F32(values.as_slice())),
            Buffer::Bf16(values, elements) => Ok(Floats::Bf16(values.as_bf16(*elements))),
            Buffer::Shared(shared, DType::F32) => Ok(Floats::F32(bytemuck::cast_slice(shared.bytes()))),
            Buffer::Shared(shared, DType::Bf16) => Ok(Floats::Bf16(bytemuck::cast_slice(shared.bytes()))),
            Buffer::Shared(shared, DType::F16) => Ok(Floats::F16(bytemuck::cast_slice(shared.bytes()))),
            other => Err(other.refused(op, operand, "f32, bf16 or f16")),
        }
    }
}

/// Freed `f32` storage kept for the next tensor of the same size class.
///
/// A training step asks for the same sizes again and again; taking fresh pages from the system for each
/// costs more than many of the operations themselves. What is kept idle plus what is in use stays below the peak of use
/// and [a little](idle_bytes) more: at the peak itself, the sizes that the rest of a step wants then need not all be given
/// back.
#[derive(Debug, Default)]
pub(crate) struct Recycler {
    state: Mutex<RecyclerState>,
}

#[derive(Debug, Default)]
struct RecyclerState {
    /// Idle storage by capacity.
    idle: BTreeMap<usize, Vec<Vec<f32>>>,
    idle_elements: usize,
    live_elements: usize,
    peak_elements: usize,
}

/// The part of the peak, one in so many, that idle storage may take beyond it. Without it, 5 % of the processor's time went
/// into fresh pages on a model of 32 million parameters.
const SPARE: usize = 8;

/// Where that would be more, bytes: a larger model has more to compute for each page.
const SPARE_BYTES: usize = 32 << 20;

/// Bytes that a device may keep idle beyond the peak of what is in use.
pub(crate) fn idle_bytes(peak: usize) -> usize {
    (peak / SPARE).min(SPARE_BYTES)
}

/// Smallest number of elements worth keeping; the system's allocator is fast below it.
const RECYCLED_FROM: usize = 4096;

/// Smallest number of elements whose storage is worth pages of 2 MiB.
const HUGE_FROM: usize = 1 << 20;

/// Rounds up to a size with at most four significant bits, so that packed batches of slightly different
/// lengths share storage; at most 12.5 % larger than asked for.
fn size_class(elements: usize) -> usize {
    if elements < RECYCLED_FROM {
        return elements;
    }
    let step = 1usize << (elements.ilog2() - 3);
    elements.next_multiple_of(step)
}

/// Bytes that a tensor of `elements` `f32` values takes on a device.
pub(crate) fn allocated_bytes(elements: usize) -> usize {
    size_of::<f32>() * size_class(elements)
}

/// Bytes that a tensor of `elements` values of a type takes on a device.
pub(crate) fn allocated_bytes_of(dtype: DType, elements: usize) -> usize {
    allocated_bytes(words(dtype, elements))
}

/// The 4-byte words that hold `elements` values.
pub(crate) fn words(dtype: DType, elements: usize) -> usize {
    (elements * dtype.size()).div_ceil(size_of::<f32>())
}

impl Recycler {
    /// Storage for `elements` values whose contents are unspecified.
    pub(crate) fn take(self: &Arc<Self>, elements: usize) -> Recycled {
        let class = size_class(elements);
        let reused = {
            let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            state.live_elements += class;
            let reused = state.pop(class);
            state.peak_elements = state.peak_elements.max(state.live_elements);
            state.shrink_to_peak();
            reused
        };
        let mut values = reused.unwrap_or_else(|| {
            let mut values = vec![0.0; class];
            if class >= HUGE_FROM {
                heap::prefer_huge_pages(&mut values);
            }
            values
        });
        if cfg!(debug_assertions) {
            values.fill(f32::NAN);
        }
        Recycled { values, elements, recycler: Arc::clone(self) }
    }

    pub(crate) fn usage(&self) -> Usage {
        let state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        Usage { live_bytes: state.live_elements * 4, peak_bytes: state.peak_elements * 4 }
    }

    pub(crate) fn reset_peak(&self) {
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        state.peak_elements = state.live_elements;
        state.shrink_to_peak();
    }

    fn give_back(&self, values: Vec<f32>) {
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let class = values.len();
        state.live_elements -= class;
        if class >= RECYCLED_FROM {
            state.idle_elements += class;
            state.idle.entry(class).or_default().push(values);
        }
    }
}

impl RecyclerState {
    fn pop(&mut self, class: usize) -> Option<Vec<f32>> {
        let values = self.idle.get_mut(&class)?.pop()?;
        self.idle_elements -= class;
        if self.idle[&class].is_empty() {
            self.idle.remove(&class);
        }
        Some(values)
    }

    fn shrink_to_peak(&mut self) {
        let spare = idle_bytes(size_of::<f32>() * self.peak_elements) / size_of::<f32>();
        while self.live_elements + self.idle_elements > self.peak_elements + spare {
            let Some(&largest) = self.idle.keys().next_back() else { return };
            drop(self.pop(largest));
        }
    }
}

/// `f32` storage that goes back to its recycler when dropped.
#[derive(Debug)]
pub(crate) struct Recycled {
    values: Vec<f32>,
    elements: usize,
    recycler: Arc<Recycler>,
}

impl Recycled {
    pub(crate) fn as_slice(&self) -> &[f32] {
        &self.values[..self.elements]
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.values[..self.elements]
    }

    /// The first `elements` values of the storage taken as `bf16`.
    pub(crate) fn as_bf16(&self, elements: usize) -> &[bf16] {
        &bytemuck::cast_slice(self.as_slice())[..elements]
    }

    pub(crate) fn as_mut_bf16(&mut self, elements: usize) -> &mut [bf16] {
        &mut bytemuck::cast_slice_mut(self.as_mut_slice())[..elements]
    }
}

impl Drop for Recycled {
    fn drop(&mut self) {
        self.recycler.give_back(std::mem::take(&mut self.values));
    }
}
