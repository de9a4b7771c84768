// The bias of a linear layer, and sums over the rows of a matrix.

#include "cuda/columns.cuh"

// y[t, n] += b[n]
KERNEL bias(Floats b, FloatsMut y, u64 rows, u64 n) {
    apply_columns(b, y, rows, n, [](float b, float& y) { y += b; });
}

// out[c, n] (+)= the sum of x[t, n] over the rows t of chunk c
KERNEL row_sums(Floats x, u64 rows, u64 n, u32 chunk_rows, u32 add, float* out) {
    sum_rows({x}, rows, n, chunk_rows, add, out);
}
