// Scores and weighted sums by one warp straight from memory: for heads of any size, and for rows where tiles will not do.

#pragma once

#include "op/attention/work.cuh"

namespace attention {

template <typename T>
DEVICE float dot(const T* x, const T* y, u32 e) {
    float sum = 0;
    for (u32 i = 0; i < e; i++) sum = fmaf(wide(x[i]), wide(y[i]), sum);
    return sum;
}

// A score as a power of 2 from the dot product, and its derivative with respect to factor q . k with a cap.
DEVICE float score_of(float product, Scale scale, float& slope) {
    slope = 1;
    // Never one operation with what is taken from it: a maximum minus itself is 0.
    if (scale.bound == 0) return __fmul_rn(product, scale.factor);
    float bent = tanhf(product * scale.factor);
    slope = 1 - bent * bent;
    return __fmul_rn(scale.bound, bent);
}

// Adds `weight(i)` times elements lane, lane + 32, ... of the `width` at `line(i)`, for each i from `begin` to `end`.
template <u32 N, typename Weight, typename Line>
DEVICE void add_weighted(float (&sum)[N], u32 begin, u32 end, u32 width, Weight weight, Line line) {
    u32 lane = lane_index();
    for (u32 first = begin; first < end; first += WARP) {
        float own = first + lane < end ? weight(first + lane) : 0;
        for (u32 i = 0; i < min(WARP, end - first); i++) {
            float factor = __shfl_sync(ALL_LANES, own, i);
            auto x = line(first + i);
#pragma unroll
            for (u32 n = 0; n < N; n++) {
                u32 column = n * WARP + lane;
                if (column < width) sum[n] = fmaf(factor, wide(x[column]), sum[n]);
            }
        }
    }
}

}  // namespace attention
