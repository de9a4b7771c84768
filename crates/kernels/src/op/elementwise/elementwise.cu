// Operations on each element alone.

#include "cuda/elements.cuh"

// y = x
KERNEL cast(Floats x, FloatsMut y, u64 count) {
    apply(count, [](float x, float& y) { y = x; }, x, Written{y});
}

// y += alpha x
KERNEL add(float alpha, Floats x, FloatsMut y, u64 count) {
    apply(count, [=](float x, float& y) { y = fmaf(alpha, x, y); }, x, y);
}

// x = value
KERNEL fill(float value, FloatsMut x, u64 count) {
    apply(count, [=](float& x) { x = value; }, Written{x});
}

// x = alpha x
KERNEL scale(float alpha, FloatsMut x, u64 count) {
    apply(count, [=](float& x) { x = alpha * x; }, x);
}

// x = cap tanh(x / cap)
KERNEL soft_cap(float cap, FloatsMut x, u64 count) {
    apply(count, [=](float& x) { x = cap * tanhf(x / cap); }, x);
}

// `alpha` with the sign of `x`, both in bits of a type whose infinity and sign are `infinity` and `sign`; zeros and NaN stay
// what they are, to the last bit, which they would not if they were widened and narrowed.
DEVICE u32 signed_as(u32 x, u32 alpha, u32 infinity, u32 sign) {
    u32 magnitude = x & (sign - 1);
    return magnitude == 0 || magnitude > infinity ? x : alpha ^ (x & sign);
}

// x = alpha sign(x)
KERNEL scaled_sign(float alpha, FloatsMut x, u64 count) {
    u32 wide_alpha = __float_as_uint(alpha), narrow_alpha = narrow(alpha).bits;
    u64 first = u64(blockIdx.x) * 4 * FOURS * blockDim.x + threadIdx.x;
    for (u32 k = 0; k < 4 * FOURS; k++) {
        u64 i = first + k * blockDim.x;
        if (i >= count) return;
        if (x.type == F32) {
            u32* at = static_cast<u32*>(x.at) + i;
            *at = signed_as(*at, wide_alpha, 0x7f800000, 0x80000000);
        } else {
            u16* at = static_cast<u16*>(x.at) + i;
            *at = u16(signed_as(*at, narrow_alpha, 0x7f80, 0x8000));
        }
    }
}
