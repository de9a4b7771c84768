// A row of a matrix in the registers of a team of threads: what norms are computed on.
//
// A team is a power of two of threads and has a row to itself: a few lanes of a warp, or several warps; a block has one team
// or several. Each thread holds `HELD` elements of the row at a time, a slab of the team's. A row of one slab, which is every
// row of up to `MOST_THREADS * HELD` elements, is read once however often its values are used.
//
// Elements are taken by fours, or one by one where four do not divide the row. What the lanes of a warp read at once lies
// together for every type, which pieces of 16 bytes of bf16 beside f32 would not.

#pragma once

#include "cuda/prelude.cuh"

// Elements that a thread holds; `HELD` and `MOST_THREADS` are those of cuda/row.rs.
constexpr u32 HELD = 16;
constexpr u32 MOST_THREADS = 512;

struct Team {
    u32 size, rank;
    // Whether the row is one of the matrix; all threads meet at barriers, whatever they have to do.
    bool works;
    // Where its row begins, and the row's number and length.
    u64 start;
    u32 row, width;

    // Elements of a slab.
    DEVICE u32 slab() const {
        return size * HELD;
    }

    // The first of the elements that piece number `piece` of this thread's part of a slab has.
    template <u32 PIECE>
    DEVICE u32 column(u32 slab, u32 piece) const {
        return slab + (piece * size + rank) * PIECE;
    }
};

// This thread's team of `size` threads, of a matrix `[rows, width]`.
DEVICE Team team_of(u32 size, u64 rows, u32 width) {
    u64 row = u64(blockIdx.x) * (blockDim.x / size) + threadIdx.x / size;
    return Team{size, threadIdx.x % size, row < rows, row * width, u32(row), width};
}

// A thread's elements of a slab as they are stored.
struct Stored {
    u32 words[HELD];
};

// This thread's elements of the slab from column `slab` on; 0 behind the row's end.
template <u32 PIECE>
DEVICE Stored fetch(Floats x, Team team, u64 start, u32 slab) {
    Stored out;
#pragma unroll
    for (u32 p = 0; p < HELD / PIECE; p++) {
        u32* words = out.words + p * PIECE;
#pragma unroll
        for (u32 i = 0; i < PIECE; i++) words[i] = 0;
        u32 column = team.column<PIECE>(slab, p);
        if (!team.works || column >= team.width) continue;
        u64 at = start + column;
        if (PIECE == 4 && x.type == F32) {
            uint4 v = static_cast<const uint4*>(x.at)[at / 4];
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
        } else if (PIECE == 4) {
            uint2 v = static_cast<const uint2*>(x.at)[at / 4];
            words[0] = v.x, words[1] = v.y;
        } else if (x.type == F32) {
            words[0] = static_cast<const u32*>(x.at)[at];
        } else {
            words[0] = static_cast<const u16*>(x.at)[at];
        }
    }
    return out;
}

// The values of stored elements.
template <u32 PIECE>
DEVICE void widen(u32 type, const Stored& stored, float (&v)[HELD]) {
#pragma unroll
    for (u32 i = 0; i < HELD; i++) {
        u32 place = i % PIECE, word = stored.words[i - place + place / 2];
        u32 half = place % 2 ? word >> 16 : word & 0xffff;
        if (type == F32) v[i] = __uint_as_float(stored.words[i]);
        else if (type == BF16) v[i] = __uint_as_float(half << 16);
        else v[i] = wide(f16{u16(half)});
    }
}

// The values of this thread's elements of a slab.
template <u32 PIECE>
DEVICE void load_slab(Floats x, Team team, u64 start, u32 slab, float (&v)[HELD]) {
    widen<PIECE>(x.type, fetch<PIECE>(x, team, start, slab), v);
}

// Overwrites this thread's elements of a slab of the team's row.
template <u32 PIECE>
DEVICE void store_slab(FloatsMut x, Team team, u32 slab, const float (&v)[HELD]) {
#pragma unroll
    for (u32 p = 0; p < HELD / PIECE; p++) {
        u32 column = team.column<PIECE>(slab, p);
        if (!team.works || column >= team.width) continue;
        if (PIECE == 4) store4(x, team.start + column, {v[4 * p], v[4 * p + 1], v[4 * p + 2], v[4 * p + 3]});
        else store(x, team.start + column, v[p]);
    }
}

// The values of this thread's elements of a slab of the team's row of x; where there is an f, those of x + f as x keeps them,
// which they become.
template <u32 PIECE>
DEVICE void load_sum(Floats f, FloatsMut x, Team team, u32 slab, float (&v)[HELD]) {
    Stored stored = fetch<PIECE>(reading(x), team, team.start, slab);
    if (!f.at) return widen<PIECE>(x.type, stored, v);
    float added[HELD];
    load_slab<PIECE>(f, team, team.start, slab, added);
    widen<PIECE>(x.type, stored, v);
#pragma unroll
    for (u32 i = 0; i < HELD; i++) v[i] += added[i];
    store_slab<PIECE>(x, team, slab, v);
    if (x.type == F32) return;
#pragma unroll
    for (u32 i = 0; i < HELD; i++) v[i] = wide(narrow(v[i]));
}

// A number made of every thread's by `both`, in every thread of the team; the order is always the same. `space` holds one for
// each warp of the block.
template <typename Both>
DEVICE float team_fold(Team team, float x, float* space, Both both) {
    for (u32 distance = min(team.size, WARP) / 2; distance > 0; distance /= 2) {
        x = both(x, __shfl_xor_sync(ALL_LANES, x, distance));
    }
    if (team.size <= WARP) return x;
    u32 warp = threadIdx.x / WARP, warps = team.size / WARP, first = warp / warps * warps;
    // Nobody is still reading the last one.
    __syncthreads();
    if (lane_index() == 0) space[warp] = x;
    __syncthreads();
    x = space[first];
    for (u32 w = 1; w < warps; w++) x = both(x, space[first + w]);
    return x;
}

DEVICE float team_sum(Team team, float x) {
    __shared__ float space[MOST_THREADS / WARP];
    return team_fold(team, x, space, [](float a, float b) { return a + b; });
}

DEVICE float larger(float a, float b) {
    // A NaN stays.
    return b > a || b != b ? b : a;
}

DEVICE float team_max(Team team, float x) {
    __shared__ float space[MOST_THREADS / WARP];
    return team_fold(team, x, space, larger);
}
