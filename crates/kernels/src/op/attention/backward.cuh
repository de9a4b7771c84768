// What the two kernels of the backward share.

#pragma once

#include "op/attention/work.cuh"

namespace attention {

template <typename T>
struct Backward {
    const Item* items;
    // q and do [T, H*E], k and v [S, G*E].
    const T *q, *k, *v, *d_o;
    // [T, H] each: the log-sum-exp, and delta = do . o.
    const float *lse, *delta;
    u32 heads, kv_heads, e, window;
    Scale scale;
    // Of q . k in a score.
    float factor;
    // Tiles that are in shared memory at a time, 1 or 2: with 2, one is loaded while the other is used.
    u32 stages;
};

// The score that has no probability.
DEVICE float hidden(Scale scale) {
    return scale.factor < 0 ? INFINITY : -INFINITY;
}

// Turns a score and `do . v - delta` into the probability and the gradient of the score before the cap.
template <typename T>
DEVICE void slope(float& score, float& gradient, Scale scale, float lse) {
    float x = score * scale.factor, bend = 1;
    if (scale.bound != 0) {
        float bent = tanh_of(x, T{});
        x = x == -INFINITY ? x : scale.bound * bent, bend = 1 - bent * bent;
    }
    float p = power_of_2(x - lse, T{});
    gradient *= p * bend, score = p;
}

template <u32 M, u32 N>
DEVICE void clear(float (&c)[M][N][4]) {
#pragma unroll
    for (u32 m = 0; m < M; m++)
#pragma unroll
        for (u32 n = 0; n < N; n++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) c[m][n][i] = 0;
}

// Goes over tiles from `begin` to `end`: `load(stage, at)` starts copying one, `use(stage, at)` computes with it.
template <typename Load, typename Use>
DEVICE void each_tile(u32 begin, u32 end, u32 length, u32 stages, Load load, Use use) {
    u32 stage = 0, ahead = stages - 1;
    if (ahead && begin < end) load(0u, begin);
    copies_commit();
    for (u32 at = begin; at < end; at += length) {
        u32 next = at + ahead * length;
        if (next < end) load(stage ^ ahead, next);
        copies_commit();
        if (ahead) copies_wait<1>();
        else copies_wait<0>();
        __syncthreads();
        use(stage, at);
        __syncthreads();
        stage ^= ahead;
    }
    // Without a tile, nobody has waited for what the block itself loaded.
    copies_wait<0>();
    __syncthreads();
}

}  // namespace attention
