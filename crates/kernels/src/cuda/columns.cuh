// Operations on the columns of a matrix [T, N]: a number for each column, and sums over the rows.

#pragma once

#include "cuda/elements.cuh"

// Columns that a warp has at once.
constexpr u32 TILE = 4 * WARP;

// Warps of a block, each with its own rows.
constexpr u32 WARPS = 8;

// Rows that a warp reads at once.
constexpr u32 AT_ONCE = 4;

DEVICE u32 column_tiles_of(u64 n) {
    return u32((n + TILE - 1) / TILE);
}

// This lane's columns of a tile, of rows of `n` elements.
DEVICE Four columns_of(u64 tile, u64 n) {
    u64 first = tile * TILE;
    if (n % 4 == 0) {
        first += 4 * lane_index();
        return Four{first, 1, first < n ? 4u : 0u};
    }
    first += lane_index();
    u64 left = first < n ? (n - first + WARP - 1) / WARP : 0;
    return Four{first, WARP, u32(left < 4 ? left : 4)};
}

// The same columns of a row; none of a row behind the last.
DEVICE Four in_row(Four columns, u64 row, u64 rows, u64 n) {
    return Four{row * n + columns.first, columns.step, row < rows ? columns.count : 0};
}

// `work(c, y)` for every element y of `y` [T, N] and the element c of `c` [N] of its column. A block has a tile of columns and
// `WARPS * AT_ONCE` rows.
template <typename Work>
DEVICE void apply_columns(Floats c, FloatsMut y, u64 rows, u64 n, Work work) {
    u32 tiles = column_tiles_of(n);
    u64 first_row = u64(blockIdx.x / tiles) * WARPS * AT_ONCE + threadIdx.x / WARP;
    Four columns = columns_of(blockIdx.x % tiles, n), at[AT_ONCE];
    Stored factors = fetch(c, columns), stored[AT_ONCE];
#pragma unroll
    for (u32 k = 0; k < AT_ONCE; k++) {
        at[k] = in_row(columns, first_row + k * WARPS, rows, n);
        stored[k] = fetch(y, at[k]);
    }
    float of_column[4];
    widen(c.type, factors, of_column);
#pragma unroll
    for (u32 k = 0; k < AT_ONCE; k++) {
        float v[4];
        widen(y.type, stored[k], v);
#pragma unroll
        for (u32 i = 0; i < 4; i++) work(of_column[i], v[i]);
        store(y, at[k], v);
    }
}

DEVICE void add_product(float& sum, const float (&v)[1]) {
    sum += v[0];
}
DEVICE void add_product(float& sum, const float (&v)[2]) {
    sum = fmaf(v[0], v[1], sum);
}

// Adds to `sums` the products of the `x` at `AT_ONCE` fours.
template <u32 FACTORS>
DEVICE void add_products(const Floats (&x)[FACTORS], const Four (&at)[AT_ONCE], float (&sums)[4]) {
    Stored stored[AT_ONCE][FACTORS];
#pragma unroll
    for (u32 k = 0; k < AT_ONCE; k++) {
#pragma unroll
        for (u32 f = 0; f < FACTORS; f++) stored[k][f] = fetch(x[f], at[k]);
    }
#pragma unroll
    for (u32 k = 0; k < AT_ONCE; k++) {
        float wide[FACTORS][4];
#pragma unroll
        for (u32 f = 0; f < FACTORS; f++) widen(x[f].type, stored[k][f], wide[f]);
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            float factors[FACTORS];
#pragma unroll
            for (u32 f = 0; f < FACTORS; f++) factors[f] = wide[f][i];
            add_product(sums[i], factors);
        }
    }
}

// `out[chunk, n] (+)= the sum over the chunk's rows t of the product of the x[t, n]`. A block has a tile of columns and a chunk
// of `chunk_rows` rows; its warps take rows in turn and are added up in their order.
template <u32 FACTORS>
DEVICE void sum_rows(const Floats (&x)[FACTORS], u64 rows, u64 n, u32 chunk_rows, bool add, float* out) {
    __shared__ float space[WARPS][TILE];
    u32 tiles = column_tiles_of(n), warp = threadIdx.x / WARP;
    u64 chunk = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    u64 end = (chunk + 1) * chunk_rows < rows ? (chunk + 1) * chunk_rows : rows;
    Four columns = columns_of(tile, n);
    float sums[4] = {};
    for (u64 row = chunk * chunk_rows + warp; row < end; row += WARPS * AT_ONCE) {
        Four at[AT_ONCE];
#pragma unroll
        for (u32 k = 0; k < AT_ONCE; k++) at[k] = in_row(columns, row + k * WARPS, end, n);
        add_products(x, at, sums);
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) space[warp][columns[i] - tile * TILE] = sums[i];
    __syncthreads();
    u64 column = tile * TILE + threadIdx.x;
    if (threadIdx.x >= TILE || column >= n) return;
    float sum = 0;
#pragma unroll
    for (u32 w = 0; w < WARPS; w++) sum += space[w][threadIdx.x];
    float* at = out + chunk * n + column;
    *at = add ? *at + sum : sum;
}
