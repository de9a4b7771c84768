// What every kernel is written with: types, conversions, sums over a warp and a block, and the tensor cores.
//
// The kernels are compiled without any header of a toolkit, so what they need of one stands here. The same files are
// compiled for the processor by the emulator (emulator/emulator.hpp), which brings its own version of what only a GPU
// has; everything else below is shared.
//
// Symbols are those of the crate's legend: T tokens, D width, H query heads, G key/value heads, E head size, F feed-forward
// width, V vocabulary, r rank.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifdef EMULATED
#include "emulator.hpp"
#else
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
// Memory whose size is given at the launch; 16-byte aligned.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]
#endif

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// Stored elements; they are computed with as f32.
struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

// ---- conversions -------------------------------------------------------------------------------------------------

DEVICE float wide(float x) {
    return x;
}

DEVICE float wide(bf16 x) {
    return __uint_as_float(u32(x.bits) << 16);
}

#ifdef EMULATED
DEVICE float wide(f16 x) {
    return emulated_half(x.bits);
}
#else
DEVICE float wide(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Two values rounded to nearest, ties to even: `low` in the lower half.
DEVICE u32 narrow2(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
#endif

DEVICE bf16 narrow(float x) {
    return bf16{u16(narrow2(x, 0.0f) & 0xffff)};
}

// The halves of a pair.
DEVICE float low_half(u32 pair) {
    return __uint_as_float(pair << 16);
}
DEVICE float high_half(u32 pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

DEVICE void store(float* at, float x) {
    *at = x;
}
DEVICE void store(bf16* at, float x) {
    *at = narrow(x);
}

// ---- tensors of a type known at the launch -------------------------------------------------------------------------

// The values of `DType` on the other side of a launch.
constexpr u32 F32 = 0, BF16 = 1, F16 = 2;

// Elements of any floating type; 16-byte aligned at the first.
struct Floats {
    const void* at;
    u32 type;
    u32 unused;
};

// Elements that are written: f32 or bf16.
struct FloatsMut {
    void* at;
    u32 type;
    u32 unused;
};

DEVICE Floats reading(FloatsMut x) {
    return Floats{x.at, x.type, 0};
}

DEVICE float load(Floats x, u64 i) {
    if (x.type == F32) return static_cast<const float*>(x.at)[i];
    if (x.type == BF16) return wide(static_cast<const bf16*>(x.at)[i]);
    return wide(static_cast<const f16*>(x.at)[i]);
}

DEVICE void store(FloatsMut x, u64 i, float value) {
    if (x.type == F32) static_cast<float*>(x.at)[i] = value;
    else static_cast<bf16*>(x.at)[i] = narrow(value);
}

// Four elements from `i` on, a multiple of 4.
DEVICE void load4(Floats x, u64 i, float (&out)[4]) {
    if (x.type == F32) {
        float4 v = reinterpret_cast<const float4*>(x.at)[i / 4];
        out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
        return;
    }
    uint2 v = reinterpret_cast<const uint2*>(x.at)[i / 4];
    if (x.type == BF16) {
        out[0] = low_half(v.x), out[1] = high_half(v.x), out[2] = low_half(v.y), out[3] = high_half(v.y);
    } else {
        out[0] = wide(f16{u16(v.x)}), out[1] = wide(f16{u16(v.x >> 16)});
        out[2] = wide(f16{u16(v.y)}), out[3] = wide(f16{u16(v.y >> 16)});
    }
}

// Overwrites four elements from `i` on, a multiple of 4.
DEVICE void store4(FloatsMut x, u64 i, const float (&v)[4]) {
    if (x.type == F32) reinterpret_cast<float4*>(x.at)[i / 4] = make_float4(v[0], v[1], v[2], v[3]);
    else reinterpret_cast<uint2*>(x.at)[i / 4] = make_uint2(narrow2(v[0], v[1]), narrow2(v[2], v[3]));
}

// ---- sums in a fixed order -----------------------------------------------------------------------------------------

DEVICE u32 lane_index() {
    return threadIdx.x % WARP;
}

// The sum over a warp, in every lane; the same tree of additions each time.
template <typename Value>
DEVICE Value warp_sum(Value x) {
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

DEVICE float warp_max(float x) {
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
        float other = __shfl_xor_sync(ALL_LANES, x, distance);
        // A NaN stays.
        x = other > x || other != other ? other : x;
    }
    return x;
}

// The sum over a block of `blockDim.x` threads, a multiple of 32, in every thread. `space` holds 32 values in shared
// memory and may be used again at once.
template <typename Value>
DEVICE Value block_sum(Value x, Value* space) {
    x = warp_sum(x);
    if (lane_index() == 0) space[threadIdx.x / WARP] = x;
    __syncthreads();
    Value sum = 0;
    for (u32 warp = 0; warp < blockDim.x / WARP; warp++) sum += space[warp];
    __syncthreads();
    return sum;
}

DEVICE float block_max(float x, float* space) {
    x = warp_max(x);
    if (lane_index() == 0) space[threadIdx.x / WARP] = x;
    __syncthreads();
    float max = space[0];
    for (u32 warp = 1; warp < blockDim.x / WARP; warp++) {
        float other = space[warp];
        max = other > max || other != other ? other : max;
    }
    __syncthreads();
    return max;
}

// ---- tensor cores --------------------------------------------------------------------------------------------------
//
// One warp's product C [16, 8] += A [16, 16] B [16, 8] of bf16 with f32 sums. With g = lane / 4 and t = lane % 4, each word
// of two neighbours along k:
//   a = A[g][2t..], A[g+8][2t..], A[g][2t+8..], A[g+8][2t+8..]
//   b = B[2t..][g], B[2t+8..][g]
//   c = C[g][2t], C[g][2t+1], C[g+8][2t], C[g+8][2t+1]
// PTX ISA, "Matrix Fragments for mma.m16n8k16".

#ifndef EMULATED
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE u32 shared_address(const void* at) {
    u64 address;
    asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(at));
    return u32(address);
}

// Four matrices of 8 x 8 16-bit elements: lane i gives the address (16-byte aligned, shared) of row i % 8 of matrix i / 8,
// and gets of each matrix m the elements 2 (lane % 4) and the next of row lane / 4 as `r[m]`.
DEVICE void load_matrices(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// The same of the transposed matrices.
DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Starts copying 16 bytes to shared memory, both 16-byte aligned; the bytes behind the first `bytes` become 0 and are not
// read. They are there after `copies_wait` and a barrier.
DEVICE void copy_async(void* to_shared, const void* from, u32 bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        :: "r"(shared_address(to_shared)), "l"(from), "r"(bytes) : "memory");
}

// Ends a group of copies.
DEVICE void copies_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all groups of this thread but the last `PENDING` are there.
template <int PENDING>
DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}
#endif
