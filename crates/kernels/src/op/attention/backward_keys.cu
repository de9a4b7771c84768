// Attention backward, the gradients of keys and values: dv = P^T do, dk = scale dS^T Q, a tile of keys against tiles of rows
// of all query heads that read it. The scores are taken transposed, a row of them a key, so that they are left operands of
// these products as they lie in the registers.

#include "cuda/prelude.cuh"
#include "op/attention/backward.cuh"

namespace attention {

// Which gradients a block computes; for the largest heads there are registers for one alone.
enum class Gradients { BOTH, VALUES, KEYS };

// One warp's 16 M keys.
template <typename T, u32 E, u32 M, u32 ROWS>
struct Band {
    Mask mask;
    // The first key inside the segment.
    u32 start;
    // The rows that see some key, and those that see all.
    u32 some_begin, some_end, all_begin, all_end;

    DEVICE Band(Mask mask, u32 start) : mask(mask), start(start) {
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
        u32 first = lane_index() % 4 * 2;
#pragma unroll
        for (u32 n = 0; n < ROWS / 8; n++)
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float delta = WHICH == Gradients::VALUES ? 0 : -statistics[ROWS + n * 8 + first + i];
#pragma unroll
                for (u32 m = 0; m < M; m++) ds[m][n][i] = delta, ds[m][n][2 + i] = delta;
            }
        if (WHICH != Gradients::VALUES) multiply_heads<T, E>(ds, v, d_o);
#pragma unroll
        for (u32 n = 0; n < ROWS / 8; n++)
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float lse = statistics[n * 8 + first + i] * LOG2_E;
#pragma unroll
                for (u32 m = 0; m < M; m++) {
                    slope<T>(s[m][n][i], ds[m][n][i], scale, lse);
                    slope<T>(s[m][n][2 + i], ds[m][n][2 + i], scale, lse);
                }
            }
        if (row < all_begin || row + ROWS > all_end) hide(row, s, ds);
        if (WHICH != Gradients::KEYS) multiply_scores<T, E>(dv, s, d_o);
        if (WHICH != Gradients::VALUES) multiply_scores<T, E>(dk, ds, q);
    }

    DEVICE void hide(u32 row, float (&s)[M][ROWS / 8][4], float (&ds)[M][ROWS / 8][4]) const {
        u32 first = row + lane_index() % 4 * 2;
#pragma unroll
        for (u32 m = 0; m < M; m++)
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                u32 key = min(start + 16 * m + 8 * half + lane_index() / 4, mask.keys - 1);
                u32 begin = mask.begin_row(key), end = mask.end_row(key);
#pragma unroll
                for (u32 i = 0; i < ROWS / 4; i++) {
                    u32 column = first + i / 2 * 8 + i % 2, at = 2 * half + i % 2;
                    if (column < begin || column >= end) s[m][i / 2][at] = 0, ds[m][i / 2][at] = 0;
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
    Place statistics_place = place_of(statistics);
    Rows<const T> q_rows = query_rows(b.q, item, b.heads, group, kv_head, b.e);
    Rows<const T> d_o_rows = query_rows(b.d_o, item, b.heads, group, kv_head, b.e);
    Rows<const float> lse_rows = query_rows(b.lse, item, b.heads, group, kv_head, 1);
    const float* deltas = b.delta + (lse_rows.at - b.lse);
    u32 own = threadIdx.x / WARP * 16 * M;
    load_rows<T, E>(k, tile, key_rows(b.k, item, b.kv_heads, kv_head, b.e), item.start, item.keys);
    load_rows<T, E>(v, tile, key_rows(b.v, item, b.kv_heads, kv_head, b.e), item.start, item.keys);
    Band<T, E, M, ROWS> band(mask_of(item, group, b.window), item.start + own);
    float dv[M][E / 8][4], dk[M][E / 8][4];
    clear(dv), clear(dk);
    auto load = [&](u32 stage, u32 row) {
        Tile<T> to = rows.from(stage * 2 * ROWS * S);
        load_rows<T, E>(to, ROWS, q_rows, row, item.end);
        load_rows<T, E>(to.from(ROWS * S), ROWS, d_o_rows, row, item.end);
        for (u32 i = threadIdx.x; i < 2 * ROWS; i += blockDim.x) {
            u32 at = row + i % ROWS;
            bool there = at < item.end;
            const float* from = (i < ROWS ? lse_rows.at : deltas) + (there ? lse_rows.offset(at) : 0);
            copy_word(statistics_place + (stage * 2 * ROWS + i) * 4, from, there ? 4 : 0);
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

using namespace attention;

#define KEYS(name, T, E, M, ROWS, TOGETHER, THREADS)                                                                       \
    KERNEL __launch_bounds__(THREADS) name(const Item* items, const T* q, const T* k, const T* v, const T* d_o,            \
        const float* lse, const float* delta, T* dk, T* dv, float* dk_parts, float* dv_parts, u32 heads, u32 kv_heads,     \
        u32 e, u32 window, float factor, float bound, float scale, u32 stages) {                                           \
        keys<T, E, M, ROWS, TOGETHER>(                                                                                     \
            {items, q, k, v, d_o, lse, delta, heads, kv_heads, e, window, {factor, bound}, scale, stages},                 \
            {dk, dv, dk_parts, dv_parts});                                                                                 \
    }

// (head size, tiles of 16 keys a warp, rows of a tile, dk and dv in one block): `tiling.rs` knows them too.
KEYS(attention_keys_bf16_32, bf16, 32, 2, 64, true, 128)
KEYS(attention_keys_bf16_64, bf16, 64, 2, 32, true, 128)
KEYS(attention_keys_bf16_96, bf16, 96, 1, 64, true, 256)
KEYS(attention_keys_bf16_128, bf16, 128, 1, 64, true, 256)
KEYS(attention_keys_bf16_256, bf16, 256, 1, 32, false, 128)
KEYS(attention_keys_f32_64, float, 64, 1, 32, true, 128)
KEYS(attention_keys_f32_128, float, 128, 1, 32, true, 128)
KEYS(attention_keys_f32_256, float, 256, 1, 16, false, 128)

// Keys whose rows were split.
struct KeySum {
    u32 first_key, keys;
    // The first of its slots, and how many.
    u32 slot, slots;
};

// dk and dv as sums of their parts, in the order of the slots. One block a head and a tile of keys.
KERNEL attention_keys_sum(const KeySum* sums, const float* dk_parts, const float* dv_parts, FloatsMut dk, FloatsMut dv,
    u32 tile, u32 kv_heads, u32 e, u32 width) {
    KeySum sum = sums[blockIdx.x];
    const float* parts = blockIdx.z == 0 ? dk_parts : dv_parts;
    FloatsMut out = blockIdx.z == 0 ? dk : dv;
    for (u32 i = threadIdx.x; i < sum.keys * e; i += blockDim.x) {
        u32 key = i / e, column = i - key * e;
        float value = 0;
        for (u32 slot = sum.slot; slot < sum.slot + sum.slots; slot++) {
            value += parts[((u64(slot) * kv_heads + blockIdx.y) * tile + key) * width + column];
        }
        store(out, ((u64(sum.first_key) + key) * kv_heads + blockIdx.y) * e + column, value);
    }
}
