//! Copying blocks of an operand into panels, widened to `f32`.

use crate::buffer::Floats;

use super::DEPTH;

/// A strided view of a matrix of any floating type; one of the strides is 1.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(super) data: Floats<'a>,
    pub(super) offset: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

impl<'a> View<'a> {
    /// `rows x columns`, rows `stride` apart, the first at `offset`.
    pub(crate) fn rows(data: Floats<'a>, offset: usize, rows: usize, columns: usize, stride: usize) -> Self {
        View { data, offset, rows, columns, row_stride: stride, column_stride: 1 }
    }

    /// `count` rows from `first` on.
    pub(crate) fn some_rows(self, first: usize, count: usize) -> Self {
        debug_assert!(first + count <= self.rows);
        View { offset: self.offset + first * self.row_stride, rows: count, ..self }
    }

    /// The same elements with rows and columns exchanged.
    pub(crate) fn transposed(self) -> Self {
        View {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// Which operand a panel is of: panels of A run along its rows, panels of B along its columns.
#[derive(Clone, Copy)]
pub(super) enum Side {
    A,
    B,
}

/// Packs panel `panel` of `width` lines, steps `k0..k0 + depth`, into `out [depth, width]`; lines behind the
/// operand's edge are zero.
pub(super) fn pack_panel(
    view: &View<'_>,
    side: Side,
    panel: usize,
    width: usize,
    k0: usize,
    depth: usize,
    out: &mut [f32],
) {
    let (lines, line_stride, step_stride) = match side {
        Side::A => (view.rows, view.row_stride, view.column_stride),
        Side::B => (view.columns, view.column_stride, view.row_stride),
    };
    let first = panel * width;
    let present = width.min(lines - first);
    let start = view.offset + first * line_stride + k0 * step_stride;
    let out = &mut out[..depth * width];
    if present < width {
        out.fill(0.0);
    }
    if line_stride == 1 {
        for (step, out) in out.chunks_exact_mut(width).enumerate() {
            view.data.widen(start + step * step_stride, &mut out[..present]);
        }
    } else {
        transpose_into(view.data, start, line_stride, present, depth, width, out);
    }
}

/// Lines that are contiguous along the depth become columns of the panel, four at a time so that a cache
/// line of the panel is written four times less often.
fn transpose_into(
    data: Floats<'_>,
    start: usize,
    line_stride: usize,
    present: usize,
    depth: usize,
    width: usize,
    out: &mut [f32],
) {
    let mut widened = [[0.0f32; DEPTH]; 4];
    let mut line = 0;
    while line + 4 <= present {
        let at = |i: usize| start + (line + i) * line_stride;
        let [l0, l1, l2, l3] = match data {
            Floats::F32(values) => [0, 1, 2, 3].map(|i| &values[at(i)..at(i) + depth]),
            _ => {
                for (i, widened) in widened.iter_mut().enumerate() {
                    data.widen(at(i), &mut widened[..depth]);
                }
                [0, 1, 2, 3].map(|i| &widened[i][..depth])
            }
        };
        for (step, out) in out.chunks_exact_mut(width).enumerate() {
            out[line..line + 4].copy_from_slice(&[l0[step], l1[step], l2[step], l3[step]]);
        }
        line += 4;
    }
    for line in line..present {
        data.widen(start + line * line_stride, &mut widened[0][..depth]);
        for (&value, out) in widened[0].iter().zip(out.chunks_exact_mut(width)) {
            out[line] = value;
        }
    }
}
