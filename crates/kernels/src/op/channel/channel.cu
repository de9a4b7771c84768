// One factor per output channel, and the sums behind its gradient.

#include "cuda/columns.cuh"

// y[t, n] *= c[n]
KERNEL scale_channels(Floats c, FloatsMut y, u64 rows, u64 n) {
    apply_columns(c, y, rows, n, [](float c, float& y) { y *= c; });
}

// out[c, n] (+)= the sum of a[t, n] b[t, n] over the rows t of chunk c
KERNEL channel_products(Floats a, Floats b, u64 rows, u64 n, u32 chunk_rows, u32 add, float* out) {
    sum_rows({a, b}, rows, n, chunk_rows, add, out);
}

// out[n] (+)= alpha sum_k a[n, k] b[n, k]; a warp has a row
KERNEL row_products(Floats a, Floats b, float alpha, u64 rows, u64 k, u32 add, float* out) {
    u64 row = u64(blockIdx.x) * WARPS + threadIdx.x / WARP;
    u32 tiles = column_tiles_of(k);
    float sums[4] = {};
    for (u32 tile = 0; tile < tiles; tile += AT_ONCE) {
        Four at[AT_ONCE];
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) at[i] = in_row(columns_of(tile + i, k), row, rows, k);
        add_products({a, b}, at, sums);
    }
    float sum = alpha * warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (lane_index() != 0 || row >= rows) return;
    out[row] = add ? out[row] + sum : sum;
}
