// What the kernels of matrix products share: the terms of a sum, the part of it that a block makes, and where it goes.
//
// A product is c [m, n] = alpha (a b + a' b') + beta c + bias, with sums in f32; the second term may be absent, of depth 0.
// Where `gridDim.z` blocks share one tile, each sums a part of the depth and c is that part's own f32 matrix; `sum_parts`
// adds them up.

#pragma once

#include "cuda/prelude.cuh"

// Bits of `layout`. An operand is contiguous along its depth or across it: for a, transposed is across; for b, along.
constexpr u32 A_TRANSPOSED = 1, B_TRANSPOSED = 2;
// Whether whole vectors of an operand can be loaded: its address and its stride are their multiples.
constexpr u32 A_ALIGNED = 4, B_ALIGNED = 8, SECOND_A_ALIGNED = 16, SECOND_B_ALIGNED = 32, C_ALIGNED = 64;

// One operand of one term.
struct Operand {
    Floats x;
    u64 stride;
    bool aligned;
};

// a [m, depth] b [depth, n].
struct Term {
    Operand a, b;
    u32 depth;
};

// The matrix that a kernel writes.
struct Output {
    FloatsMut c;
    u64 stride;
    u32 rows, columns;
    // `at` is null where there is none.
    Floats bias;
    float alpha, beta;
    bool aligned;

    // Element (row, column), which is inside.
    DEVICE void put(u32 row, u32 column, float sum) const {
        u64 i = row * stride + column;
        float value = alpha * sum;
        if (beta != 0.0f) value += beta * load(reading(c), i);
        if (bias.at) value += load(bias, column);
        store(c, i, value);
    }

    // The same of four from (row, column) on, a multiple of 4, as far as they are inside; sums in shared memory.
    DEVICE void put_inside(u32 row, u32 column, const float* sums) const {
        if (row >= rows) return;
        if (fits(column)) {
            float4 v = *reinterpret_cast<const float4*>(sums);
            return put4(row, column, v.x, v.y, v.z, v.w);
        }
#pragma unroll 1
        for (u32 i = 0; i < 4; i++)
            if (column + i < columns) put(row, column + i, sums[i]);
    }

    // Whether four elements from a column on, a multiple of 4, are inside and can be written at once.
    DEVICE bool fits(u32 column) const {
        return aligned && column + 4 <= columns;
    }

    DEVICE void put4(u32 row, u32 column, float x, float y, float z, float w) const {
        u64 i = row * stride + column;
        float v[4] = {alpha * x, alpha * y, alpha * z, alpha * w}, more[4];
        if (beta != 0.0f) {
            load4(reading(c), i, more);
            for (u32 j = 0; j < 4; j++) v[j] += beta * more[j];
        }
        if (bias.at) {
            load4(bias, column, more);
            for (u32 j = 0; j < 4; j++) v[j] += more[j];
        }
        store4(c, i, v);
    }
};

// Everything that a kernel is told, in the order of its parameters.
#define PRODUCT_PARAMETERS                                                                                              \
    Floats a, u64 a_stride, Floats b, u64 b_stride, u32 depth, Floats second_a, u64 second_a_stride, Floats second_b,   \
        u64 second_b_stride, u32 second_depth, u32 layout, u32 m, u32 n, FloatsMut c, u64 c_stride, Floats bias,        \
        float alpha, float beta, u32 steps_of_a_part
#define PRODUCT_ARGUMENTS                                                                                               \
    a, a_stride, b, b_stride, depth, second_a, second_a_stride, second_b, second_b_stride, second_depth, layout, m, n,  \
        c, c_stride, bias, alpha, beta, steps_of_a_part

// What a block makes: the tile that begins at (row, column), from the steps `begin..end` of the depth of both terms.
struct Task {
    Term first, second;
    Output out;
    u32 layout, row, column, begin, end, first_steps;

    // For tiles of rows x columns whose sums go by steps of `step` along the depth.
    DEVICE Task(u32 tile_rows, u32 tile_columns, u32 step, PRODUCT_PARAMETERS) : layout(layout) {
        first = Term{{a, a_stride, (layout & A_ALIGNED) != 0}, {b, b_stride, (layout & B_ALIGNED) != 0}, depth};
        second = Term{{second_a, second_a_stride, (layout & SECOND_A_ALIGNED) != 0},
            {second_b, second_b_stride, (layout & SECOND_B_ALIGNED) != 0}, second_depth};
        out = Output{c, c_stride, m, n, bias, alpha, beta, (layout & C_ALIGNED) != 0};
        if (gridDim.z > 1) out.c.at = static_cast<float*>(c.at) + blockIdx.z * (u64(m) * n);
        first_steps = (depth + step - 1) / step;
        u32 steps = first_steps + (second_depth + step - 1) / step;
        begin = min(blockIdx.z * steps_of_a_part, steps);
        end = min(begin + steps_of_a_part, steps);
        place((m + tile_rows - 1) / tile_rows, (n + tile_columns - 1) / tile_columns, 2048 / tile_rows);
        row *= tile_rows, column *= tile_columns;
    }

    // Tiles are made in bands of rows of tiles, one column of a band after another: those that are made at the same time
    // share rows of a and columns of b, which are then in the cache. 2048 rows are about as many as the columns of what an
    // H100 makes at a time.
    DEVICE void place(u32 tile_rows, u32 tile_columns, u32 band_rows) {
        u32 of_a_band = band_rows * tile_columns, band = blockIdx.x / of_a_band, rest = blockIdx.x % of_a_band;
        u32 height = min(band_rows, tile_rows - band * band_rows);
        row = band * band_rows + rest % height, column = rest / height;
    }

    // The term that a step adds products of.
    DEVICE Term term(u32 step) const {
        return choose(step < first_steps);
    }

    // Member by member: a choice between two addresses would keep both terms out of the registers.
    DEVICE Term choose(bool f) const {
        return Term{choose(f, first.a, second.a), choose(f, first.b, second.b), f ? first.depth : second.depth};
    }

    static DEVICE Operand choose(bool f, const Operand& x, const Operand& y) {
        Floats elements{f ? x.x.at : y.x.at, f ? x.x.type : y.x.type, 0};
        return Operand{elements, f ? x.stride : y.stride, f ? x.aligned : y.aligned};
    }
};
