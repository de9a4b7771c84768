//! Outputs that several threads write at once, each in its own rectangle.

use std::marker::PhantomData;

/// Bytes that a processor fetches together.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// An exclusively borrowed array of rows, `stride` elements apart.
pub(crate) struct Output<'a, T = f32> {
    start: *mut T,
    length: usize,
    stride: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

impl<'a, T> Output<'a, T> {
    /// The rows of `data`.
    pub(crate) fn rows(data: &'a mut [T], stride: usize) -> Self {
        Output { start: data.as_mut_ptr(), length: data.len(), stride, _borrow: PhantomData }
    }

    /// Whether `rows` rows of `columns` elements fit.
    pub(crate) fn holds(&self, rows: usize, columns: usize) -> bool {
        rows * columns == 0 || (columns <= self.stride && (rows - 1) * self.stride + columns <= self.length)
    }

    /// The same rows for several threads.
    pub(crate) fn share(self) -> SharedRows<'a, T> {
        SharedRows(self)
    }
}

/// Rows that tasks on several threads write, each its own elements; every access is checked against the
/// array's end, and that no two overlap is what its callers vouch for.
pub(crate) struct SharedRows<'a, T = f32>(Output<'a, T>);

#[expect(unsafe_code, reason = "tasks on several threads write disjoint parts of one array")]
// SAFETY: the pointer is only reached through unsafe methods whose callers vouch that no element is reached
// by two tasks at a time.
unsafe impl<T: Send> Sync for SharedRows<'_, T> {}

#[expect(unsafe_code, reason = "hands out parts of one array to several tasks")]
impl<T> SharedRows<'_, T> {
    /// The distance between rows.
    pub(crate) fn stride(&self) -> usize {
        self.0.stride
    }

    /// The element at `offset`, to write a rectangle from there on.
    ///
    /// # Safety
    /// What is written through it must stay inside the array and no other task may reach it at the time.
    pub(crate) unsafe fn at(&self, offset: usize) -> *mut T {
        assert!(offset < self.0.length, "element {offset} of {}", self.0.length);
        // SAFETY: the offset has just been checked.
        unsafe { self.0.start.add(offset) }
    }

    /// Asks for the memory of the elements `offset..offset + length`; changes nothing.
    pub(crate) fn fetch(&self, offset: usize, length: usize) {
        assert!(offset + length <= self.0.length, "elements {offset} + {length} of {}", self.0.length);
        #[cfg(target_arch = "x86_64")]
        for element in (0..length).step_by(LINE / size_of::<T>()).chain(length.checked_sub(1)) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: every x86-64 processor has prefetches; they read nothing that the program sees and cannot fault.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.0.start.wrapping_add(offset + element).cast()) };
        }
    }

    /// The elements `offset..offset + length`.
    ///
    /// # Safety
    /// No other task may reach them while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(crate) unsafe fn slice(&self, offset: usize, length: usize) -> &mut [T] {
        assert!(offset + length <= self.0.length, "elements {offset} + {length} of {}", self.0.length);
        // SAFETY: the range has just been checked, exclusiveness is promised by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.0.start.add(offset), length) }
    }
}
