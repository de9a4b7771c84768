// Attention forward: tiles of keys against tiles of rows, with the softmax's running maximum and sum (arXiv 2205.14135,
// algorithm 1; the order of loads and products is that of arXiv 2307.08691). No score leaves its warp's registers.

#pragma once

#include "op/attention/plain.cuh"

namespace attention {

template <typename T>
struct Forward {
    const Item* items;
    // q [T, H*E], k and v [S, G*E], o [T, H*E], lse [T, H].
    const T *q, *k, *v;
    T* o;
    float* lse;
    // Parts of results that are to be joined: [slots, G, tile, E in whole tiles] and [slots, G, tile].
    float *parts, *part_lse;
    u32 heads, kv_heads, e, window;
    Scale scale;
};

// Powers from which on a rounding error is more than 1/16.
constexpr float LARGE = 1 << 20;

// One warp's 16 M rows.
template <typename T, u32 E, u32 M, u32 KEYS>
struct ForwardBand {
    Mask mask;
    // The first row inside the segment.
    u32 start;
    // The keys that some row sees, and those that all see.
    u32 some_begin, some_end, all_begin, all_end;
    float o[M][E / 8][4];
    float s[M][KEYS / 8][4];
    // Of rows g and g + 8: the maximum so far, and this lane's part of the sum.
    float max[M][2], sum[M][2];

    DEVICE ForwardBand(Mask mask, u32 start) : mask(mask), start(start) {
        u32 rows = mask.rows(), last = min(start + 16 * M, rows) - 1;
        bool any = start < rows;
        some_begin = any ? mask.begin(start) : 0, some_end = any ? mask.end(last) : 0;
        all_begin = any ? mask.begin(last) : 0, all_end = any ? mask.end(start) : 0;
#pragma unroll
        for (u32 m = 0; m < M; m++) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) max[m][half] = -INFINITY, sum[m][half] = 0;
#pragma unroll
            for (u32 n = 0; n < E / 8; n++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) o[m][n][i] = 0;
        }
    }

    DEVICE bool sees(u32 key) const {
        return key < some_end && key + KEYS > some_begin;
    }

    DEVICE u32 row(u32 m, u32 half) const {
        return start + 16 * m + 8 * half + lane_index() / 4;
    }

    DEVICE void scores(Tile<T> q, Tile<T> k) {
#pragma unroll
        for (u32 m = 0; m < M; m++)
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) s[m][n][i] = 0;
        multiply_heads<T, E>(s, q, k);
    }

    // What is left to multiply scores by, so that they are powers of 2.
    DEVICE float bend(Scale scale) {
        // A maximum of scores is one of their multiples for positive factors alone.
        if (scale.bound == 0 && scale.factor > 0) return scale.factor;
#pragma unroll
        for (u32 m = 0; m < M; m++)
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    float x = s[m][n][i] * scale.factor;
                    s[m][n][i] = scale.bound == 0 ? x : scale.bound * tanh_of(x, T{});
                }
        return 1;
    }

    DEVICE void hide(u32 key) {
        if (key >= all_begin && key + KEYS <= all_end) return;
        u32 first = key + lane_index() % 4 * 2;
#pragma unroll
        for (u32 m = 0; m < M; m++)
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                u32 at = min(row(m, half), mask.rows() - 1), begin = mask.begin(at), end = mask.end(at);
#pragma unroll
                for (u32 i = 0; i < KEYS / 4; i++) {
                    u32 column = first + i / 2 * 8 + i % 2;
                    if (column < begin || column >= end) s[m][i / 2][2 * half + i % 2] = -INFINITY;
                }
            }
    }

    // Turns scores into probabilities relative to the maximum so far.
    DEVICE void softmax(float factor) {
#pragma unroll
        for (u32 m = 0; m < M; m++)
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                float before = max[m][half], now = before;
#pragma unroll
                for (u32 i = 0; i < KEYS / 4; i++) now = fmaxf(now, s[m][i / 2][2 * half + i % 2]);
                now = row_max(now);
                // Where nothing was seen yet, all powers are 0 and none is NaN.
                float base = now == -INFINITY ? 0 : __fmul_rn(now, factor);
                // Rounded as the base before was, so that it is 1 where the maximum stays.
                float rescale = power_of_2(__fmul_rn(before, factor) - base, T{});
                max[m][half] = now, sum[m][half] *= rescale;
                // The rounding of a large base is itself a large power, unless the scores are rounded alike.
                bool large = !(fabsf(base) < LARGE);
                float rest = large ? 1 : factor;
                if (large) {
#pragma unroll
                    for (u32 i = 0; i < KEYS / 4; i++) s[m][i / 2][2 * half + i % 2] *= factor;
                }
#pragma unroll
                for (u32 i = 0; i < KEYS / 4; i++) {
                    float& p = s[m][i / 2][2 * half + i % 2];
                    p = power_of_2(fmaf(p, rest, -base), T{});
                    sum[m][half] += p;
                }
#pragma unroll
                for (u32 n = 0; n < E / 8; n++) o[m][n][2 * half] *= rescale, o[m][n][2 * half + 1] *= rescale;
            }
    }
};

// The sum over the keys that a row sees, again, for a row whose log-sum-exp is finite and whose sum is not: 0 times an
// infinity or a NaN that it does not see is NaN.
template <typename T, u32 E, typename Out>
DEVICE void repair(const Forward<T>& f, const Item& item, u32 kv_head, u32 row, float lse, Out* to) {
    Mask mask = mask_of(item, f.heads / f.kv_heads, f.window);
    Rows<const T> q = query_rows(f.q, item, f.heads, mask.group, kv_head, f.e);
    Rows<const T> k = key_rows(f.k, item, f.kv_heads, kv_head, f.e), v = key_rows(f.v, item, f.kv_heads, kv_head, f.e);
    float sum[E / WARP] = {}, slope;
    auto weight = [&](u32 key) {
        float product = dot(q.at + q.offset(row), k.at + k.offset(key), f.e);
        return exp2f(score_of(product, f.scale, slope) - lse * LOG2_E);
    };
    auto values = [&](u32 key) { return v.at + v.offset(key); };
    u32 begin = max(mask.begin(row), item.begin), end = min(mask.end(row), item.end);
    add_weighted(sum, begin, end, f.e, weight, values);
#pragma unroll
    for (u32 n = 0; n < E / WARP; n++) {
        u32 column = n * WARP + lane_index();
        if (column < f.e) store(to + column, sum[n]);
    }
}

// Where a block's results go: o and lse themselves, or a part of them in f32, its rows counted from the tile's first.
template <typename T>
struct Output {
    Rows<T> o;
    float* lse;
    float *part, *part_lse;
    // From one query's log-sum-exps to the next's.
    u32 lse_stride;

    DEVICE Output(const Forward<T>& f, const Item& item, u32 kv_head, u32 group, u32 tile, u32 width) {
        u64 first = (u64(item.slot) * f.kv_heads + kv_head) * tile;
        o = query_rows(f.o, item, f.heads, group, kv_head, f.e);
        lse = f.lse + u64(item.first_query) * f.heads + kv_head * group, lse_stride = f.heads;
        part = item.slot == WHOLE ? nullptr : f.parts + first * width, part_lse = f.part_lse + first;
    }

    // The place of a row's log-sum-exp; `row` inside the segment, `at` inside the tile.
    DEVICE float* lse_of(u32 row, u32 at) const {
        if (part) return part_lse + at;
        u32 query = row / o.group;
        return lse + u64(query) * lse_stride + (row - query * o.group);
    }
};

// Divides by the sums and writes a band's rows.
template <typename T, u32 E, u32 M, u32 KEYS>
DEVICE void finish(ForwardBand<T, E, M, KEYS>& band, const Forward<T>& f, const Item& item, u32 kv_head, Output<T> out,
    Tile<T> own) {
    float factor = f.scale.bound == 0 && f.scale.factor > 0 ? f.scale.factor : 1;
    u32 rows = band.mask.rows(), leaks = 0;
#pragma unroll
    for (u32 m = 0; m < M; m++) {
        float inverse[2];
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            u32 row = band.row(m, half);
            float sum = row_sum(band.sum[m][half]), max = band.max[m][half];
            float total = ((max == -INFINITY ? 0 : __fmul_rn(max, factor)) + log2f(sum)) * LN_2;
            // A part of the keys may be invisible to a row.
            inverse[half] = out.part && sum == 0 ? 0 : 1 / sum;
            if (row < rows && lane_index() % 4 == 0) *out.lse_of(row, row - item.start) = total;
            float odd = 0;
#pragma unroll
            for (u32 n = 0; n < E / 8; n++) odd += (band.o[m][n][2 * half] + band.o[m][n][2 * half + 1]) * 0;
            u32 found = __ballot_sync(ALL_LANES, row < rows && odd != odd && total == total);
            for (u32 g = 0; g < 8; g++) leaks |= u32((found >> 4 * g & 15) != 0) << (16 * m + 8 * half + g);
        }
        if (!out.part) stage<T, E>(own.from(m * 16 * STRIDE<T, E>), band.o[m], inverse[0], inverse[1]);
        else stage_part<E>(out.part + (band.start - item.start + 16 * m) * E, band.o[m], inverse[0], inverse[1]);
    }
    if (!out.part) store_rows<T, E>(out.o, band.start, 16 * M, rows, own);
    __syncwarp();
    for (u32 at = 0; at < 16 * M; at++) {
        if ((leaks >> at & 1) == 0) continue;
        u32 row = band.start + at, inside = row - item.start;
        float lse = *out.lse_of(row, inside);
        if (out.part) repair<T, E>(f, item, kv_head, row, lse, out.part + inside * E);
        else repair<T, E>(f, item, kv_head, row, lse, out.o.at + out.o.offset(row));
    }
}

template <typename T, u32 E, u32 M, u32 KEYS>
DEVICE void forward(const Forward<T>& f) {
    DYNAMIC_SHARED(space);
    constexpr u32 S = STRIDE<T, E>;
    Item item = f.items[blockIdx.x / f.kv_heads];
    u32 kv_head = blockIdx.x % f.kv_heads, group = f.heads / f.kv_heads, tile = blockDim.x / WARP * 16 * M;
    Tile<T> q = tile_at<T>(space), k = q.from(tile * S), v = k.from(KEYS * S);
    Rows<const T> q_rows = query_rows(f.q, item, f.heads, group, kv_head, f.e);
    Rows<const T> k_rows = key_rows(f.k, item, f.kv_heads, kv_head, f.e);
    Rows<const T> v_rows = key_rows(f.v, item, f.kv_heads, kv_head, f.e);
    load_rows<T, E>(q, tile, q_rows, item.start, item.queries * group);
    load_rows<T, E>(k, KEYS, k_rows, item.begin, item.end);
    copies_commit();
    u32 own = threadIdx.x / WARP * 16 * M;
    ForwardBand<T, E, M, KEYS> band(mask_of(item, group, f.window), item.start + own);
    for (u32 key = item.begin; key < item.end; key += KEYS) {
        copies_wait<0>();
        __syncthreads();
        load_rows<T, E>(v, KEYS, v_rows, key, item.end);
        copies_commit();
        bool sees = band.sees(key);
        if (sees) band.scores(q.from(own * S), k);
        copies_wait<0>();
        __syncthreads();
        if (key + KEYS < item.end) load_rows<T, E>(k, KEYS, k_rows, key + KEYS, item.end);
        copies_commit();
        if (!sees) continue;
        float factor = band.bend(f.scale);
        band.hide(key);
        band.softmax(factor);
        multiply_scores<T, E>(band.o, band.s, v);
    }
    Output<T> out(f, item, kv_head, group, tile, E);
    finish(band, f, item, kv_head, out, q.from(own * S));
}

}  // namespace attention

// A kernel for heads of up to E elements: M tiles of 16 rows a warp, KEYS keys a tile; `tiling.rs` knows them too.
#define FORWARD(name, T, E, M, KEYS)                                                                                       \
    KERNEL __launch_bounds__(128) name(const Item* items, const T* q, const T* k, const T* v, T* o, float* lse,            \
        float* parts, float* part_lse, u32 heads, u32 kv_heads, u32 e, u32 window, float factor, float bound) {            \
        attention::forward<T, E, M, KEYS>(                                                                                 \
            {items, q, k, v, o, lse, parts, part_lse, heads, kv_heads, e, window, {factor, bound}});                       \
    }
