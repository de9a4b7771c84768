// Attention backward, the gradients of queries: dq = scale dS K, a tile of rows against tiles of keys.

#pragma once

#include "op/attention/backward.cuh"

namespace attention {

// One warp's 16 M rows.
template <typename T, u32 E, u32 M, u32 KEYS>
struct QueryBand {
    Mask mask;
    u32 start;
    // The keys that some row sees, and those that all see.
    u32 some_begin, some_end, all_begin, all_end;
    // Of rows g and g + 8; the log-sum-exp as a power of 2.
    float lse[M][2], delta[M][2];
    float dq[M][E / 8][4];

    DEVICE QueryBand(const Backward<T>& b, const Item& item, Mask mask, u32 kv_head, u32 start) : mask(mask), start(start) {
        u32 rows = mask.rows(), last = min(start + 16 * M, rows) - 1;
        bool any = start < rows;
        some_begin = any ? mask.begin(start) : 0, some_end = any ? mask.end(last) : 0;
        all_begin = any ? mask.begin(last) : 0, all_end = any ? mask.end(start) : 0;
#pragma unroll
        for (u32 m = 0; m < M; m++)
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                u32 own = row(m, half), query = own / mask.group;
                u64 at = u64(item.first_query + query) * b.heads + kv_head * mask.group + (own - query * mask.group);
                lse[m][half] = own < rows ? b.lse[at] * LOG2_E : 0, delta[m][half] = own < rows ? b.delta[at] : 0;
            }
        clear(dq);
    }

    DEVICE u32 row(u32 m, u32 half) const {
        return start + 16 * m + 8 * half + lane_index() / 4;
    }

    // Adds what a tile of keys gives.
    DEVICE void add(u32 key, Scale scale, Tile<T> q, Tile<T> d_o, Tile<T> k, Tile<T> v) {
        if (key >= some_end || key + KEYS <= some_begin) return;
        float s[M][KEYS / 8][4], ds[M][KEYS / 8][4];
        clear(s);
#pragma unroll
        for (u32 m = 0; m < M; m++)
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) ds[m][n][i] = -delta[m][i / 2];
        multiply_heads<T, E>(s, q, k);
        if (key < all_begin || key + KEYS > all_end) hide(key, s, hidden(scale));
        multiply_heads<T, E>(ds, d_o, v);
#pragma unroll
        for (u32 m = 0; m < M; m++)
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) slope<T>(s[m][n][i], ds[m][n][i], scale, lse[m][i / 2]);
        multiply_scores<T, E>(dq, ds, k);
    }

    DEVICE void hide(u32 key, float (&s)[M][KEYS / 8][4], float hidden) const {
        u32 first = key + lane_index() % 4 * 2;
#pragma unroll
        for (u32 m = 0; m < M; m++)
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                u32 at = min(row(m, half), mask.rows() - 1), begin = mask.begin(at), end = mask.end(at);
#pragma unroll
                for (u32 i = 0; i < KEYS / 4; i++) {
                    u32 column = first + i / 2 * 8 + i % 2;
                    if (column < begin || column >= end) s[m][i / 2][2 * half + i % 2] = hidden;
                }
            }
    }
};

template <typename T, u32 E, u32 M, u32 KEYS>
DEVICE void queries(const Backward<T>& b, T* dq) {
    DYNAMIC_SHARED(space);
    constexpr u32 S = STRIDE<T, E>;
    Item item = b.items[blockIdx.x / b.kv_heads];
    u32 kv_head = blockIdx.x % b.kv_heads, group = b.heads / b.kv_heads, tile = blockDim.x / WARP * 16 * M;
    Tile<T> q = tile_at<T>(space), d_o = q.from(tile * S), keys = d_o.from(tile * S);
    Rows<const T> k_rows = key_rows(b.k, item, b.kv_heads, kv_head, b.e);
    u32 rows = item.queries * group, own = threadIdx.x / WARP * 16 * M;
    load_pairs<T, E>(q, tile, query_rows(b.q, item, b.heads, group, kv_head, b.e), b.q, b.d_o, item.start, rows);
    QueryBand<T, E, M, KEYS> band(b, item, mask_of(item, group, b.window), kv_head, item.start + own);
    auto load = [&](u32 stage, u32 key) {
        load_pairs<T, E>(keys.from(stage * 2 * KEYS * S), KEYS, k_rows, b.k, b.v, key, item.end);
    };
    auto use = [&](u32 stage, u32 key) {
        Tile<T> k = keys.from(stage * 2 * KEYS * S);
        band.add(key, b.scale, q.from(own * S), d_o.from(own * S), k, k.from(KEYS * S));
    };
    each_tile(item.begin, item.end, KEYS, b.stages, load, use);
#pragma unroll
    for (u32 m = 0; m < M; m++) stage<T, E>(q.from((own + 16 * m) * S), band.dq[m], b.factor, b.factor);
    Rows<T> out = query_rows(dq, item, b.heads, group, kv_head, b.e);
    store_rows<T, E>(out, band.start, 16 * M, rows, q.from(own * S));
}

}  // namespace attention

// A kernel for heads of up to E elements: M tiles of 16 rows a warp, KEYS keys a tile; `tiling.rs` knows them too. There
// are registers for BLOCKS blocks at a time.
#define QUERIES(name, T, E, M, KEYS, BLOCKS)                                                                               \
    KERNEL __launch_bounds__(128, BLOCKS) name(const Item* items, const T* q, const T* k, const T* v, const T* d_o,        \
        const float* lse, const float* delta, T* dq, u32 heads, u32 kv_heads, u32 e, u32 window, float factor,             \
        float bound, float scale, u32 stages) {                                                                            \
        queries<T, E, M, KEYS>(                                                                                            \
            {items, q, k, v, d_o, lse, delta, heads, kv_heads, e, window, {factor, bound}, scale, stages}, dq);            \
    }
