// A thread's share of an operation on each element alone, and of one on the columns of a matrix.
//
// A thread has fours of elements, each beside those of the other lanes, so that what a warp reads at once lies together
// whatever the operands' types. All operands are read before one is waited for: memory is what such an operation takes.

#pragma once

#include "cuda/prelude.cuh"

// Where four elements are: side by side from a multiple of 4 on, or where that is not to be had, the first `count` of them
// one by one, `step` apart.
struct Four {
    u64 first;
    u32 step, count;

    DEVICE bool whole() const {
        return step == 1 && count == 4;
    }

    DEVICE u64 operator[](u32 i) const {
        return first + i * step;
    }
};

// Four elements as they are stored: one a word of f32, two a word of the 16-bit types, in the first two.
struct Stored {
    u32 words[4];
};

DEVICE Stored fetch(Floats x, Four at) {
    Stored out = {};
    if (at.whole()) {
        if (x.type == F32) {
            uint4 v = static_cast<const uint4*>(x.at)[at.first / 4];
            out.words[0] = v.x, out.words[1] = v.y, out.words[2] = v.z, out.words[3] = v.w;
        } else {
            uint2 v = static_cast<const uint2*>(x.at)[at.first / 4];
            out.words[0] = v.x, out.words[1] = v.y;
        }
        return out;
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        if (i >= at.count) break;
        if (x.type == F32) out.words[i] = static_cast<const u32*>(x.at)[at[i]];
        else out.words[i / 2] |= u32(static_cast<const u16*>(x.at)[at[i]]) << (i % 2 * 16);
    }
    return out;
}

DEVICE void widen(u32 type, Stored x, float* out) {
    const u32* words = x.words;
    if (type == F32) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) out[i] = __uint_as_float(words[i]);
    } else if (type == BF16) {
#pragma unroll
        for (u32 i = 0; i < 4; i += 2) out[i] = low_half(words[i / 2]), out[i + 1] = high_half(words[i / 2]);
    } else {
#pragma unroll
        for (u32 i = 0; i < 4; i++) out[i] = wide(f16{u16(words[i / 2] >> (i % 2 * 16))});
    }
}

DEVICE void store(FloatsMut x, Four at, const float* v) {
    if (at.whole()) {
        if (x.type == F32) static_cast<float4*>(x.at)[at.first / 4] = make_float4(v[0], v[1], v[2], v[3]);
        else static_cast<uint2*>(x.at)[at.first / 4] = make_uint2(narrow2(v[0], v[1]), narrow2(v[2], v[3]));
        return;
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        if (i < at.count) store(x, at[i], v[i]);
    }
}

// ---- each element alone --------------------------------------------------------------------------------------------

// The fours of a thread.
constexpr u32 FOURS = 2;

// This thread's four number `which` of `count` elements; `Cuda::apply` launches a thread for every eight.
DEVICE Four four_of(u64 count, u32 which) {
    u64 first = (u64(blockIdx.x) * FOURS + which) * 4 * blockDim.x + 4 * threadIdx.x;
    u64 left = first < count ? count - first : 0;
    return Four{first, 1, u32(left < 4 ? left : 4)};
}

// An operand that is only written.
struct Written {
    FloatsMut to;
};

DEVICE Stored fetch(FloatsMut x, Four at) {
    return fetch(reading(x), at);
}
DEVICE Stored fetch(Written, Four) {
    return Stored{};
}

// An operand of a thread: its elements as they are stored, and the values of four of them.
template <typename Operand>
struct Held {
    Operand x;
    Stored stored[FOURS];
    float v[4];
};

template <typename Operand>
DEVICE void widen(Held<Operand>& held, u32 which) {
    widen(held.x.type, held.stored[which], held.v);
}
DEVICE void widen(Held<Written>&, u32) {}

DEVICE void put(const Held<Floats>&, Four) {}
DEVICE void put(const Held<FloatsMut>& held, Four at) {
    store(held.x, at, held.v);
}
DEVICE void put(const Held<Written>& held, Four at) {
    store(held.x.to, at, held.v);
}

template <typename Work, typename... Values>
DEVICE void on_four(Work work, Values&... v) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) work(v[i]...);
}

template <typename Work, typename... Operands>
DEVICE void apply_held(const Four (&at)[FOURS], Work work, Held<Operands>... held) {
#pragma unroll
    for (u32 k = 0; k < FOURS; k++) {
        (widen(held, k), ...);
        on_four(work, held.v...);
        (put(held, at[k]), ...);
    }
}

// Calls `work(x...)` for each of `count` elements: with the value of a `Floats` operand, and with a reference to that of a
// `FloatsMut` or `Written` one, which is stored afterwards.
template <typename Work, typename... Operands>
DEVICE void apply(u64 count, Work work, Operands... x) {
    Four at[FOURS];
#pragma unroll
    for (u32 k = 0; k < FOURS; k++) at[k] = four_of(count, k);
    static_assert(FOURS == 2, "as many as are fetched here");
    apply_held(at, work, Held<Operands>{x, {fetch(x, at[0]), fetch(x, at[1])}, {}}...);
}
