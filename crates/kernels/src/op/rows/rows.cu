// Copies of rows and of ranges of columns.

#include "cuda/prelude.cuh"

// Pieces of rows that a thread copies.
constexpr u32 AT_ONCE = 4;

// Where a piece is read and written.
struct Place {
    u64 from, to;
    bool there;
};

// Place number `which` of this thread; the pieces of all rows, `pieces` of each, are numbered on through the rows.
DEVICE Place place_of(
    u32 which, u32 piece, u64 x_stride, const u32* from, u64 y_stride, const u32* to, u64 rows, u32 pieces
) {
    u64 block = u64(blockIdx.x) * AT_ONCE * blockDim.x;
    u32 after = u32(block % pieces) + which * blockDim.x + threadIdx.x;
    u64 row = block / pieces + after / pieces;
    if (row >= rows) return Place{0, 0, false};
    u32 column = after % pieces * piece;
    return Place{(from ? from[row] : row) * x_stride + column, (to ? to[row] : row) * y_stride + column, true};
}

// y[to[i]][j] = x[from[i]][j] for i < rows and j < pieces * piece, from and to the rows' own numbers where they are null. Rows
// begin at multiples of `piece` elements: 1, 4, or 8 where both are of one 16-bit type.
KERNEL copy_rows(
    Floats x, u64 x_stride, const u32* from, FloatsMut y, u64 y_stride, const u32* to, u64 rows, u32 pieces, u32 piece
) {
    Place at[AT_ONCE];
#pragma unroll
    for (u32 k = 0; k < AT_ONCE; k++) at[k] = place_of(k, piece, x_stride, from, y_stride, to, rows, pieces);
    if (piece == 8) {
        uint4 v[AT_ONCE];
#pragma unroll
        for (u32 k = 0; k < AT_ONCE; k++) {
            if (at[k].there) v[k] = static_cast<const uint4*>(x.at)[at[k].from / 8];
        }
#pragma unroll
        for (u32 k = 0; k < AT_ONCE; k++) {
            if (at[k].there) static_cast<uint4*>(y.at)[at[k].to / 8] = v[k];
        }
    } else if (piece == 4) {
        float v[AT_ONCE][4];
#pragma unroll
        for (u32 k = 0; k < AT_ONCE; k++) {
            if (at[k].there) load4(x, at[k].from, v[k]);
        }
#pragma unroll
        for (u32 k = 0; k < AT_ONCE; k++) {
            if (at[k].there) store4(y, at[k].to, v[k]);
        }
    } else {
#pragma unroll
        for (u32 k = 0; k < AT_ONCE; k++) {
            if (at[k].there) store(y, at[k].to, load(x, at[k].from));
        }
    }
}
