// What the kernels of attention share: a block's part of the work, who sees whom, tiles in and results out.
//
// The queries of a segment and the H/G query heads that read one key/value head are one list of rows, query by query:
// row r is query r / (H/G) and head r % (H/G) of the group. So a tile of keys serves all heads that read it, and a single
// query is as many rows as heads share its keys.

#pragma once

#include "op/attention/fragments.cuh"

namespace attention {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// A block's part of a segment; made by `work.rs`.
struct Item {
    // The segment's first query and first row of keys, and how many of each.
    u32 first_query, queries, first_key, keys;
    // The first row (or, for gradients of keys, key) of its tile, inside the segment.
    u32 start;
    // The keys (or rows) that it goes over.
    u32 begin, end;
    // Where the result is one of several to be added up; WHOLE where it is not.
    u32 slot;
};

constexpr u32 WHOLE = 0xffffffffu;

// Every row sees all keys, if it is the window of `Mask`.
constexpr u32 UNBOUNDED = 0;

// Who sees whom inside a segment; `AttentionShape::visible` in rows.
struct Mask {
    u32 queries, keys, group;
    // Keys that a query sees up to its own; as many as there can be where all before are seen.
    u32 window;

    DEVICE u32 rows() const {
        return queries * group;
    }
    // The keys that a row sees.
    DEVICE u32 end(u32 row) const {
        return window == UNBOUNDED ? keys : row / group + keys - queries + 1;
    }
    DEVICE u32 begin(u32 row) const {
        u32 last = end(row);
        return window != UNBOUNDED && last > window ? last - window : 0;
    }
    // The rows that see a key.
    DEVICE u32 end_row(u32 key) const {
        u64 end = window == UNBOUNDED ? queries : u64(key) + window;
        u32 earlier = keys - queries;
        if (window != UNBOUNDED) end = end > earlier ? end - earlier : 0;
        return u32(end < queries ? end : queries) * group;
    }
    DEVICE u32 begin_row(u32 key) const {
        u32 earlier = keys - queries, begin = key > earlier && window != UNBOUNDED ? key - earlier : 0;
        return min(begin * group, end_row(key));
    }
};

DEVICE Mask mask_of(const Item& item, u32 group, u32 window) {
    return Mask{item.queries, item.keys, group, window};
}

// s = factor q . k as a power of 2, or with a cap s = bound tanh(factor q . k).
struct Scale {
    float factor, bound;
};

DEVICE float tanh_of(float x, bf16) {
    // Off by about 2^-23; where the power overflows, the quotient is 0.
    return 1.0f - __fdividef(2.0f, 1.0f + fast_exp2(2.0f * LOG2_E * x));
}
DEVICE float tanh_of(float x, float) {
    return tanhf(x);
}

DEVICE float power_of_2(float x, bf16) {
    return fast_exp2(x);
}
DEVICE float power_of_2(float x, float) {
    return exp2f(x);
}

// ---- rows in memory --------------------------------------------------------------------------------------------------

// Row r is at (r / group) stride + (r % group) e.
template <typename T>
struct Rows {
    T* at;
    u64 stride;
    u32 group, e;

    DEVICE u64 offset(u32 row) const {
        u32 line = row / group;
        return line * stride + u64(row - line * group) * e;
    }
};

// The query heads of a segment that read head `kv_head`, of a tensor [T, H*E].
template <typename T>
DEVICE Rows<T> query_rows(T* x, const Item& item, u32 heads, u32 group, u32 kv_head, u32 e) {
    u64 stride = u64(heads) * e;
    return {x + item.first_query * stride + u64(kv_head) * group * e, stride, group, e};
}

// A key/value head of a segment, of a tensor [S, G*E].
template <typename T>
DEVICE Rows<T> key_rows(T* x, const Item& item, u32 kv_heads, u32 kv_head, u32 e) {
    u64 stride = u64(kv_heads) * e;
    return {x + item.first_key * stride + u64(kv_head) * e, stride, 1, e};
}

// Starts copying rows `first .. first + count` of tensors of one shape into tiles of E columns, with zeros behind row `end`
// and column e; `rows` are those of the first tensor, and the others begin `further` elements behind it.
template <typename T, u32 E, u32 N>
DEVICE void load_rows(const Tile<T> (&tiles)[N], u32 count, Rows<const T> rows, const i64 (&further)[N], u32 first,
    u32 end) {
    u32 line = first / rows.group, rest = first - line * rows.group;
    // n / group for the few n of a tile.
    u64 inverse = 0xffffffffu / rows.group + 1ull;
    const T* start = rows.at + line * rows.stride;
    auto offset = [&](u32 row) {
        u32 n = rest + row, lines = rows.group == 1 ? n : u32(n * inverse >> 32);
        return lines * rows.stride + (n - lines * rows.group) * rows.e;
    };
    if (rows.e % PIECE<T> != 0) {
#pragma unroll 1
        for (u32 i = threadIdx.x; i < count * E; i += blockDim.x) {
            u32 row = i / E, column = i % E;
            bool there = first + row < end && column < rows.e;
            const T* from = start + offset(row) + column;
#pragma unroll
            for (u32 n = 0; n < N; n++) tiles[n].at[row * STRIDE<T, E> + column] = there ? from[further[n]] : T{};
        }
        return;
    }
    constexpr u32 PIECES = E / PIECE<T>;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < count * PIECES; i += blockDim.x) {
        u32 row = i / PIECES, column = i % PIECES * PIECE<T>;
        bool there = first + row < end && column < rows.e;
        const T* from = there ? start + offset(row) + column : rows.at;
#pragma unroll
        for (u32 n = 0; n < N; n++) {
            copy_piece(tiles[n].from(row * STRIDE<T, E> + column).place, from + further[n], there ? 16 : 0);
        }
    }
}

template <typename T, u32 E>
DEVICE void load_rows(Tile<T> tile, u32 count, Rows<const T> rows, u32 first, u32 end) {
    load_rows<T, E, 1>({tile}, count, rows, {0}, first, end);
}

// The same rows of two tensors, into a tile and the one behind it.
template <typename T, u32 E>
DEVICE void load_pairs(Tile<T> tile, u32 count, Rows<const T> rows, const T* one, const T* other, u32 first, u32 end) {
    load_rows<T, E, 2>({tile, tile.from(count * STRIDE<T, E>)}, count, rows, {0, other - one}, first, end);
}

// ---- results ---------------------------------------------------------------------------------------------------------

DEVICE void store2(float* to, float x, float y) {
    *reinterpret_cast<float2*>(to) = make_float2(x, y);
}
DEVICE void store2(bf16* to, float x, float y) {
    *reinterpret_cast<u32*>(to) = narrow2(x, y);
}

// Puts rows g and g + 8 of a result [16, E], each times its factor, where a tile of a warp's own begins.
template <typename T, u32 E>
DEVICE void stage(Tile<T> tile, const float (&c)[E / 8][4], float low, float high) {
    u32 place = lane_index() / 4 * STRIDE<T, E> + lane_index() % 4 * 2;
#pragma unroll
    for (u32 n = 0; n < E / 8; n++) {
        store2(tile.at + place + n * 8, c[n][0] * low, c[n][1] * low);
        store2(tile.at + place + n * 8 + 8 * STRIDE<T, E>, c[n][2] * high, c[n][3] * high);
    }
}

// A part of rows g and g + 8, E columns each.
template <u32 E>
DEVICE void stage_part(float* to, const float (&c)[E / 8][4], float low, float high) {
    to += lane_index() / 4 * E + lane_index() % 4 * 2;
#pragma unroll
    for (u32 n = 0; n < E / 8; n++) {
        store2(to + n * 8, c[n][0] * low, c[n][1] * low);
        store2(to + n * 8 + 8 * E, c[n][2] * high, c[n][3] * high);
    }
}

// Overwrites rows `first .. first + count` below `end` by a warp's own tile of E columns.
template <typename T, u32 E>
DEVICE void store_rows(Rows<T> rows, u32 first, u32 count, u32 end, Tile<T> tile) {
    __syncwarp();
    constexpr u32 PIECES = E / PIECE<T>;
#pragma unroll 1
    for (u32 i = lane_index(); i < count * PIECES; i += WARP) {
        u32 row = i / PIECES, column = i % PIECES * PIECE<T>;
        if (first + row >= end || column >= rows.e) continue;
        T* to = rows.at + rows.offset(first + row) + column;
        const T* from = tile.at + row * STRIDE<T, E> + column;
        if (rows.e % PIECE<T> == 0) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        else for (u32 k = 0; k < min(PIECE<T>, rows.e - column); k++) to[k] = from[k];
    }
    __syncwarp();
}

// The sum over the four lanes that share a row of a result.
DEVICE float row_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
DEVICE float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

}  // namespace attention
