// Tiles in shared memory and one warp's products of them: bf16 on the tensor cores, f32 by exact multiplications.
//
// Both types hold a result C [16, 8] as mma.m16n8k16 does: with g = lane / 4 and t = lane % 4, a lane has C[g][2t],
// C[g][2t+1], C[g+8][2t], C[g+8][2t+1]. So the kernels are written once.

#pragma once

#include "cuda/prelude.cuh"

namespace attention {

// Where something lies in shared memory. As a number of 32 bits, constants are added to it inside the instructions.
#ifdef EMULATED
typedef u8* Place;

DEVICE Place place_of(void* at) {
    return static_cast<u8*>(at);
}
DEVICE void load_matrices_at(u32 (&r)[4], Place row) {
    load_matrices(r, row);
}
DEVICE void load_matrices_transposed_at(u32 (&r)[4], Place row) {
    load_matrices_transposed(r, row);
}
DEVICE void copy_piece(Place to, const void* from, u32 bytes) {
    copy_async(to, from, bytes);
}
DEVICE void copy_word(Place to, const void* from, u32 bytes) {
    u32 word = bytes ? *static_cast<const u32*>(from) : 0;
    *reinterpret_cast<u32*>(to) = word;
}
DEVICE float fast_exp2(float x) {
    return std::exp2(x);
}
#else
typedef u32 Place;

DEVICE Place place_of(void* at) {
    return shared_address(at);
}
DEVICE void load_matrices_at(u32 (&r)[4], Place row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
DEVICE void load_matrices_transposed_at(u32 (&r)[4], Place row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
// Starts copying 16 bytes, or fewer and then zeros, as `copy_async`.
DEVICE void copy_piece(Place to, const void* from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(bytes) : "memory");
}
// Starts copying 4 bytes, or none and then a zero.
DEVICE void copy_word(Place to, const void* from, u32 bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(to), "l"(from), "r"(bytes) : "memory");
}
// 2^x to 2^-22 of it.
DEVICE float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

template <typename T>
constexpr u32 PIECE = 16 / sizeof(T);

// Elements from one row of a tile to the next: 16 bytes more than a row, so that the same piece of eight rows lies in eight
// groups of banks.
template <typename T, u32 E>
constexpr u32 STRIDE = E + PIECE<T>;

// An element of a tile in shared memory and those behind it.
template <typename T>
struct Tile {
    T* at;
    Place place;

    DEVICE Tile from(u32 element) const {
        return {at + element, place + element * u32(sizeof(T))};
    }
};

template <typename T>
DEVICE Tile<T> tile_at(void* at) {
    return {static_cast<T*>(at), place_of(at)};
}

// ---- left operands: A [16, 16] -----------------------------------------------------------------------------------

template <typename T>
struct Left;

template <>
struct Left<bf16> {
    u32 words[4];
};

// Rows g and g + 8 whole, in each of the four lanes that have a part of them in C.
template <>
struct Left<float> {
    float low[16], high[16];
};

// A from a tile at its first row and column.
template <u32 STRIDE>
DEVICE void load_left(Left<bf16>& a, Tile<bf16> tile) {
    u32 lane = lane_index();
    load_matrices_at(a.words, tile.from(lane % 16 * STRIDE + lane / 16 * 8).place);
}

template <u32 STRIDE>
DEVICE void load_left(Left<float>& a, Tile<float> tile) {
    const float* low = tile.at + lane_index() / 4 * STRIDE;
    const float* high = low + 8 * STRIDE;
#pragma unroll
    for (u32 k = 0; k < 16; k += 4) {
        float4 x = *reinterpret_cast<const float4*>(low + k), y = *reinterpret_cast<const float4*>(high + k);
        a.low[k] = x.x, a.low[k + 1] = x.y, a.low[k + 2] = x.z, a.low[k + 3] = x.w;
        a.high[k] = y.x, a.high[k + 1] = y.y, a.high[k + 2] = y.z, a.high[k + 3] = y.w;
    }
}

// A from two neighbouring results, [16, 8] each.
DEVICE void left_of(Left<bf16>& a, const float (&first)[4], const float (&second)[4]) {
    a.words[0] = narrow2(first[0], first[1]), a.words[1] = narrow2(first[2], first[3]);
    a.words[2] = narrow2(second[0], second[1]), a.words[3] = narrow2(second[2], second[3]);
}

DEVICE void left_of(Left<float>& a, const float (&first)[4], const float (&second)[4]) {
    u32 group = lane_index() & ~3u;
#pragma unroll
    for (u32 k = 0; k < 16; k++) {
        const float(&c)[4] = k < 8 ? first : second;
        u32 owner = group | k % 8 / 2;
        a.low[k] = __shfl_sync(ALL_LANES, c[k % 2], owner);
        a.high[k] = __shfl_sync(ALL_LANES, c[2 + k % 2], owner);
    }
}

// ---- products ----------------------------------------------------------------------------------------------------

// C += A B^T, where the rows of the tile are those of B: 16 elements of each of 8 N rows.
template <u32 STRIDE, u32 M, u32 N>
DEVICE void multiply_rows(float (&c)[M][N][4], const Left<bf16> (&a)[M], Tile<bf16> b) {
    static_assert(N % 2 == 0, "results come in pairs");
    u32 lane = lane_index();
    Tile<bf16> own = b.from((lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8);
#pragma unroll
    for (u32 n = 0; n < N; n += 2) {
        u32 r[4];
        load_matrices_at(r, own.from(n * 8 * STRIDE).place);
#pragma unroll
        for (u32 m = 0; m < M; m++) {
            mma(c[m][n], a[m].words, r[0], r[1]);
            mma(c[m][n + 1], a[m].words, r[2], r[3]);
        }
    }
}

template <u32 STRIDE, u32 M, u32 N>
DEVICE void multiply_rows(float (&c)[M][N][4], const Left<float> (&a)[M], Tile<float> b) {
    const float* own = b.at + lane_index() % 4 * 2 * STRIDE;
#pragma unroll
    for (u32 n = 0; n < N; n++) {
#pragma unroll
        for (u32 k = 0; k < 16; k += 4) {
            const float* at = own + n * 8 * STRIDE + k;
            float4 u = *reinterpret_cast<const float4*>(at), v = *reinterpret_cast<const float4*>(at + STRIDE);
            const float x[4] = {u.x, u.y, u.z, u.w}, y[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (u32 m = 0; m < M; m++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    c[m][n][0] = fmaf(a[m].low[k + i], x[i], c[m][n][0]);
                    c[m][n][1] = fmaf(a[m].low[k + i], y[i], c[m][n][1]);
                    c[m][n][2] = fmaf(a[m].high[k + i], x[i], c[m][n][2]);
                    c[m][n][3] = fmaf(a[m].high[k + i], y[i], c[m][n][3]);
                }
            }
        }
    }
}

// C += A B, where the rows of the tile are those of B: 8 N elements of each of 16 rows.
template <u32 STRIDE, u32 M, u32 N>
DEVICE void multiply_columns(float (&c)[M][N][4], const Left<bf16> (&a)[M], Tile<bf16> b) {
    static_assert(N % 2 == 0, "results come in pairs");
    u32 lane = lane_index();
    Tile<bf16> own = b.from(lane % 16 * STRIDE + lane / 16 * 8);
#pragma unroll
    for (u32 n = 0; n < N; n += 2) {
        u32 r[4];
        load_matrices_transposed_at(r, own.from(n * 8).place);
#pragma unroll
        for (u32 m = 0; m < M; m++) {
            mma(c[m][n], a[m].words, r[0], r[1]);
            mma(c[m][n + 1], a[m].words, r[2], r[3]);
        }
    }
}

template <u32 STRIDE, u32 M, u32 N>
DEVICE void multiply_columns(float (&c)[M][N][4], const Left<float> (&a)[M], Tile<float> b) {
    const float* own = b.at + lane_index() % 4 * 2;
#pragma unroll
    for (u32 k = 0; k < 16; k++) {
#pragma unroll
        for (u32 n = 0; n < N; n++) {
            float2 x = *reinterpret_cast<const float2*>(own + k * STRIDE + n * 8);
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                c[m][n][0] = fmaf(a[m].low[k], x.x, c[m][n][0]);
                c[m][n][1] = fmaf(a[m].low[k], x.y, c[m][n][1]);
                c[m][n][2] = fmaf(a[m].high[k], x.x, c[m][n][2]);
                c[m][n][3] = fmaf(a[m].high[k], x.y, c[m][n][3]);
            }
        }
    }
}

// C += A B^T over E elements, A and B rows of tiles of E columns.
template <typename T, u32 E, u32 M, u32 N>
DEVICE void multiply_heads(float (&c)[M][N][4], Tile<T> a, Tile<T> b) {
    // A roll of f32 is long enough as it is.
#pragma unroll(sizeof(T) == 2 ? E / 16 : 1)
    for (u32 k = 0; k < E; k += 16) {
        Left<T> left[M];
#pragma unroll
        for (u32 m = 0; m < M; m++) load_left<STRIDE<T, E>>(left[m], a.from(m * 16 * STRIDE<T, E> + k));
        multiply_rows<STRIDE<T, E>>(c, left, b.from(k));
    }
}

// C += P B: the scores P [16 M, 8 K] and K * 8 rows of a tile of E columns.
template <typename T, u32 E, u32 M, u32 K>
DEVICE void multiply_scores(float (&c)[M][E / 8][4], const float (&p)[M][K][4], Tile<T> b) {
#pragma unroll
    for (u32 k = 0; k < K; k += 2) {
        Left<T> left[M];
#pragma unroll
        for (u32 m = 0; m < M; m++) left_of(left[m], p[m][k], p[m][k + 1]);
        multiply_columns<STRIDE<T, E>>(c, left, b.from(k * 8 * STRIDE<T, E>));
    }
}

}  // namespace attention
