// Attention backward, the gradients of keys and values: dv = P^T do, dk = scale dS^T Q, a tile of keys against tiles of
// rows of all query heads that read it. The scores are taken transposed, a row of them a key, so that they are left operands
// of these products as they lie in the registers.

#pragma once

#include "op/attention/backward.cuh"

namespace attention {

// Which gradients a block computes; for the largest heads there are registers for one alone.
enum class Gradients { BOTH, VALUES, KEYS };

// One warp's 16 M keys.
template <typename T, u32 E, u32 M, u32 ROWS>
struct KeyBand {
    Mask mask;
    // The first key inside the segment.
    u32 start;
    // The rows that see some key, and those that see all.
    u32 some_begin, some_end, all_begin, all_end;

    DEVICE KeyBand(Mask mask, u32 start) : mask(mask), start(start) {
        u32 last = min(start + 16 * M, mask.keys) - 1;
        bool any = start < mask.keys;
        some_begin = any ? mask.begin_row(start) : 0, some_end = any ? mask.end_row(last) : 0;
        all_begin = any ? mask.begin_row(last) : 0, all_end = any ? mask.end_row(start) : 0;
    }

    // Adds what a tile of rows gives; `statistics` are its log-sum-exps and behind them its deltas.
    template <Gradients WHICH, u32 N>
    DEVICE void add(float (&dv)[M][N][4], float (&dk)[M][N][4], u32 row, Scale scale, Tile<T> k, Tile<T> v, Tile<T> q,
        Tile<T> d_o, const float* statistics) {
        if (row >= some_end || row + ROWS <= some_begin) return;
        float s[M][ROWS / 8][4], ds[M][ROWS / 8][4];
        clear(s);
        multiply_heads<T, E>(s, k, q);
        if (row < all_begin || row + ROWS > all_end) hide(row, s, hidden(scale));
        statistics += lane_index() % 4 * 2;
#pragma unroll
        for (u32 n = 0; n < ROWS / 8; n++) {
            float2 delta = *reinterpret_cast<const float2*>(statistics + ROWS + n * 8);
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                ds[m][n][0] = -delta.x, ds[m][n][1] = -delta.y;
                ds[m][n][2] = -delta.x, ds[m][n][3] = -delta.y;
            }
        }
        if (WHICH != Gradients::VALUES) multiply_heads<T, E>(ds, v, d_o);
#pragma unroll
        for (u32 n = 0; n < ROWS / 8; n++) {
            float2 pair = *reinterpret_cast<const float2*>(statistics + n * 8);
            float lse[2] = {pair.x * LOG2_E, pair.y * LOG2_E};
#pragma unroll
            for (u32 m = 0; m < M; m++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) slope<T>(s[m][n][i], ds[m][n][i], scale, lse[i % 2]);
        }
        if (WHICH != Gradients::KEYS) multiply_scores<T, E>(dv, s, d_o);
        if (WHICH != Gradients::VALUES) multiply_scores<T, E>(dk, ds, q);
    }

    DEVICE void hide(u32 row, float (&s)[M][ROWS / 8][4], float hidden) const {
        u32 first = row + lane_index() % 4 * 2;
#pragma unroll
        for (u32 m = 0; m < M; m++)
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                u32 key = min(start + 16 * m + 8 * half + lane_index() / 4, mask.keys - 1);
                u32 begin = mask.begin_row(key), end = mask.end_row(key);
#pragma unroll
                for (u32 i = 0; i < ROWS / 4; i++) {
                    u32 column = first + i / 2 * 8 + i % 2;
                    if (column < begin || column >= end) s[m][i / 2][2 * half + i % 2] = hidden;
                }
            }
    }
};

// Results, or parts of them in f32 [slots, G, tile, E in whole tiles] to be added up.
template <typename T>
struct Outputs {
    T *dk, *dv;
    float *dk_parts, *dv_parts;
};

template <typename T, u32 E, u32 M>
DEVICE void write(const Backward<T>& b, const Item& item, u32 kv_head, float (&sum)[M][E / 8][4], float factor, T* out,
    float* parts, Tile<T> own) {
    u32 start = threadIdx.x / WARP * 16 * M, tile = blockDim.x / WARP * 16 * M;
    if (item.slot != WHOLE) {
        float* to = parts + ((u64(item.slot) * b.kv_heads + kv_head) * tile + start) * E;
#pragma unroll
        for (u32 m = 0; m < M; m++) stage_part<E>(to + 16 * m * E, sum[m], factor, factor);
        return;
    }
#pragma unroll
    for (u32 m = 0; m < M; m++) stage<T, E>(own.from(16 * m * STRIDE<T, E>), sum[m], factor, factor);
    store_rows<T, E>(key_rows(out, item, b.kv_heads, kv_head, b.e), item.start + start, 16 * M, item.keys, own);
}

template <Gradients WHICH, typename T, u32 E, u32 M, u32 ROWS>
DEVICE void keys(const Backward<T>& b, const Outputs<T>& out, u8* space) {
    constexpr u32 S = STRIDE<T, E>;
    Item item = b.items[blockIdx.x / b.kv_heads];
    u32 kv_head = blockIdx.x % b.kv_heads, group = b.heads / b.kv_heads, tile = blockDim.x / WARP * 16 * M;
    Tile<T> k = tile_at<T>(space), v = k.from(tile * S), rows = v.from(tile * S);
    float* statistics = reinterpret_cast<float*>(rows.from(b.stages * 2 * ROWS * S).at);
    Rows<const T> q_rows = query_rows(b.q, item, b.heads, group, kv_head, b.e);
    Rows<const float> lse_rows = query_rows(b.lse, item, b.heads, group, kv_head, 1);
    const float* deltas = b.delta + (lse_rows.at - b.lse);
    u32 own = threadIdx.x / WARP * 16 * M;
    load_pairs<T, E>(k, tile, key_rows(b.k, item, b.kv_heads, kv_head, b.e), b.k, b.v, item.start, item.keys);
    KeyBand<T, E, M, ROWS> band(mask_of(item, group, b.window), item.start + own);
    float dv[M][E / 8][4], dk[M][E / 8][4];
    clear(dv), clear(dk);
    auto load = [&](u32 stage, u32 row) {
        load_pairs<T, E>(rows.from(stage * 2 * ROWS * S), ROWS, q_rows, b.q, b.d_o, row, item.end);
        for (u32 i = threadIdx.x; i < 2 * ROWS; i += blockDim.x) {
            u32 at = row + i % ROWS;
            bool there = at < item.end;
            const float* from = (i < ROWS ? lse_rows.at : deltas) + (there ? lse_rows.offset(at) : 0);
            copy_word(place_of(statistics) + (stage * 2 * ROWS + i) * 4, from, there ? 4 : 0);
        }
    };
    auto use = [&](u32 stage, u32 row) {
        Tile<T> q = rows.from(stage * 2 * ROWS * S);
        band.template add<WHICH>(dv, dk, row, b.scale, k.from(own * S), v.from(own * S), q, q.from(ROWS * S),
            statistics + stage * 2 * ROWS);
    };
    each_tile(item.begin, item.end, ROWS, b.stages, load, use);
    if (WHICH != Gradients::KEYS) write<T, E, M>(b, item, kv_head, dv, 1, out.dv, out.dv_parts, v.from(own * S));
    if (WHICH != Gradients::VALUES) write<T, E, M>(b, item, kv_head, dk, b.factor, out.dk, out.dk_parts, k.from(own * S));
}

template <typename T, u32 E, u32 M, u32 ROWS, bool TOGETHER>
DEVICE void keys(const Backward<T>& b, const Outputs<T>& out) {
    DYNAMIC_SHARED(space);
    if constexpr (TOGETHER) {
        keys<Gradients::BOTH, T, E, M, ROWS>(b, out, space);
    } else {
        if (blockIdx.y == 0) keys<Gradients::KEYS, T, E, M, ROWS>(b, out, space);
        else keys<Gradients::VALUES, T, E, M, ROWS>(b, out, space);
    }
}

}  // namespace attention

// A kernel for heads of up to E elements: M tiles of 16 keys a warp, ROWS rows a tile; `tiling.rs` knows them too. One
// block computes dk and dv TOGETHER, or two compute one each.
#define KEYS(name, T, E, M, ROWS, TOGETHER)                                                                                \
    KERNEL __launch_bounds__(128, 1) name(const Item* items, const T* q, const T* k, const T* v, const T* d_o,             \
        const float* lse, const float* delta, T* dk, T* dv, float* dk_parts, float* dv_parts, u32 heads, u32 kv_heads,     \
        u32 e, u32 window, float factor, float bound, float scale, u32 stages) {                                           \
        keys<T, E, M, ROWS, TOGETHER>(                                                                                     \
            {items, q, k, v, d_o, lse, delta, heads, kv_heads, e, window, {factor, bound}, scale, stages},                 \
            {dk, dv, dk_parts, dv_parts});                                                                                 \
    }
