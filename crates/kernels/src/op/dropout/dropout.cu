// Dropout, with the mask that the operation's documentation defines.

#include "cuda/elements.cuh"

// The output function of SplitMix64.
DEVICE u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

// Sets to 0 what is dropped of four elements from `first` on, a multiple of 4, and multiplies the others by `scale`.
DEVICE void mask(u64 key, u32 threshold, float scale, u64 first, float (&v)[4]) {
#pragma unroll
    for (u32 pair = 0; pair < 2; pair++) {
        u64 word = mix(key + (first / 2 + pair + 1) * 0x9e3779b97f4a7c15);
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            float& value = v[2 * pair + half];
            value = u32(word >> (32 * half)) >= threshold ? __fmul_rn(scale, value) : 0.0f;
        }
    }
}

// y (+)= x mask / (1 - rate), `scale` being 1 / (1 - rate)
KERNEL dropout(u64 key, u32 threshold, float scale, Floats x, u32 accum, FloatsMut y, u64 count) {
    Four at[FOURS];
    Stored from[FOURS], to[FOURS];
#pragma unroll
    for (u32 k = 0; k < FOURS; k++) {
        at[k] = four_of(count, k);
        from[k] = fetch(x, at[k]);
        to[k] = accum ? fetch(y, at[k]) : Stored{};
    }
#pragma unroll
    for (u32 k = 0; k < FOURS; k++) {
        float v[4], before[4];
        widen(x.type, from[k], v);
        mask(key, threshold, scale, at[k].first, v);
        if (accum) {
            widen(y.type, to[k], before);
#pragma unroll
            for (u32 i = 0; i < 4; i++) v[i] = __fadd_rn(before[i], v[i]);
        }
        store(y, at[k], v);
    }
}
