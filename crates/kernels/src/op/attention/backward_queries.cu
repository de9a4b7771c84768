// Attention backward, the gradients of queries: dq = scale dS K, a tile of rows against tiles of keys.

#include "cuda/prelude.cuh"
#include "op/attention/backward.cuh"

namespace attention {

// delta = do . o of every query and head, rows of e elements; `lanes` lanes a row, a power of 2.
DEVICE void delta(Floats o, Floats d_o, float* out, u64 rows, u32 e, u32 lanes) {
    u64 row = (u64(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
    u32 lane = threadIdx.x % lanes;
    float sum = 0;
    if (row < rows && e % 4 == 0) {
        for (u32 i = 4 * lane; i < e; i += 4 * lanes) {
            float x[4], y[4];
            load4(o, row * e + i, x), load4(d_o, row * e + i, y);
            for (u32 n = 0; n < 4; n++) sum = fmaf(x[n], y[n], sum);
        }
    } else if (row < rows) {
        for (u32 i = lane; i < e; i += lanes) sum = fmaf(load(o, row * e + i), load(d_o, row * e + i), sum);
    }
    for (u32 distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    if (row < rows && lane == 0) out[row] = sum;
}

// One warp's 16 M rows.
template <typename T, u32 E, u32 M, u32 KEYS>
struct Band {
    Mask mask;
    u32 start;
    // The keys that some row sees, and those that all see.
    u32 some_begin, some_end, all_begin, all_end;
    // Of rows g and g + 8; the log-sum-exp as a power of 2.
    float lse[M][2], delta[M][2];
    float dq[M][E / 8][4];

    DEVICE Band(const Backward<T>& b, const Item& item, Mask mask, u32 kv_head, u32 start) : mask(mask), start(start) {
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
        multiply_heads<T, E>(ds, d_o, v);
#pragma unroll
        for (u32 m = 0; m < M; m++)
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) slope<T>(s[m][n][i], ds[m][n][i], scale, lse[m][i / 2]);
        if (key < all_begin || key + KEYS > all_end) hide(key, ds);
        multiply_scores<T, E>(dq, ds, k);
    }

    DEVICE void hide(u32 key, float (&ds)[M][KEYS / 8][4]) const {
        u32 first = key + lane_index() % 4 * 2;
#pragma unroll
        for (u32 m = 0; m < M; m++)
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                u32 at = min(row(m, half), mask.rows() - 1), begin = mask.begin(at), end = mask.end(at);
#pragma unroll
                for (u32 i = 0; i < KEYS / 4; i++) {
                    u32 column = first + i / 2 * 8 + i % 2;
                    if (column < begin || column >= end) ds[m][i / 2][2 * half + i % 2] = 0;
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
    Rows<const T> v_rows = key_rows(b.v, item, b.kv_heads, kv_head, b.e);
    u32 rows = item.queries * group, own = threadIdx.x / WARP * 16 * M;
    load_rows<T, E>(q, tile, query_rows(b.q, item, b.heads, group, kv_head, b.e), item.start, rows);
    load_rows<T, E>(d_o, tile, query_rows(b.d_o, item, b.heads, group, kv_head, b.e), item.start, rows);
    Band<T, E, M, KEYS> band(b, item, mask_of(item, group, b.window), kv_head, item.start + own);
    auto load = [&](u32 stage, u32 key) {
        Tile<T> to = keys.from(stage * 2 * KEYS * S);
        load_rows<T, E>(to, KEYS, k_rows, key, item.end);
        load_rows<T, E>(to.from(KEYS * S), KEYS, v_rows, key, item.end);
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

using namespace attention;

KERNEL attention_delta(Floats o, Floats d_o, float* out, u64 rows, u32 e, u32 lanes) {
    attention::delta(o, d_o, out, rows, e, lanes);
}

#define QUERIES(name, T, E, M, KEYS, THREADS)                                                                              \
    KERNEL __launch_bounds__(THREADS) name(const Item* items, const T* q, const T* k, const T* v, const T* d_o,            \
        const float* lse, const float* delta, T* dq, u32 heads, u32 kv_heads, u32 e, u32 window, float factor,             \
        float bound, float scale, u32 stages) {                                                                            \
        queries<T, E, M, KEYS>(                                                                                            \
            {items, q, k, v, d_o, lse, delta, heads, kv_heads, e, window, {factor, bound}, scale, stages}, dq);            \
    }

// (head size, tiles of 16 rows a warp, keys of a tile): `tiling.rs` knows them too.
QUERIES(attention_queries_bf16_32, bf16, 32, 2, 64, 128)
QUERIES(attention_queries_bf16_64, bf16, 64, 2, 32, 128)
QUERIES(attention_queries_bf16_96, bf16, 96, 2, 32, 128)
QUERIES(attention_queries_bf16_128, bf16, 128, 2, 32, 128)
QUERIES(attention_queries_bf16_256, bf16, 256, 1, 32, 128)
QUERIES(attention_queries_f32_64, float, 64, 1, 32, 128)
QUERIES(attention_queries_f32_128, float, 128, 1, 32, 128)
QUERIES(attention_queries_f32_256, float, 256, 1, 16, 128)
