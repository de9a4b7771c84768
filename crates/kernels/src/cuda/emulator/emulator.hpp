// What a GPU has and a processor has not, for kernels compiled as C++: threads of a block as fibers, shared memory, warps.
//
// It is the specification of a kernel's meaning, not of its speed: blocks run one after another, and a block's threads run
// one after another from one meeting point (a barrier, a shuffle, a product of the tensor cores) to the next. The order of
// the threads is a setting: a result that depends on it is a race. Asynchronous copies happen at the last moment at which
// they may, so that reading too early is seen. Memory that is not written holds NaN; what lies behind it cannot be read; a
// vector that is not aligned for its size ends the program.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <cstdlib>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)
#define __constant__ static const
// A block's variable: the blocks of a launch run one after another on one system thread.
#define __shared__ static thread_local
#define DYNAMIC_SHARED(name) u8* name = emulator::block().dynamic_shared
#define CUDART_INF_F INFINITY

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

namespace emulator {

// The most that one thread hands to the others of its warp at a meeting.
constexpr unsigned MOST_WORDS = 12;

struct Copy {
    void* to;
    const void* from;
    unsigned bytes;
};

struct Thread {
    void* stack_pointer;
    dim3 index;
    unsigned lane, warp;
    bool done;
    // What it waits for: 0 nothing, 1 its block, 2 its warp.
    int waits_for;
    // Meetings of its warp so far; the parity says which of two sets of words is in use.
    unsigned meetings;
    // Copies in groups, the oldest first; the last is open.
    std::vector<std::vector<Copy>> copies;
};

struct Warp {
    unsigned words[2][32][MOST_WORDS];
};

struct Block {
    dim3 index, grid, size;
    unsigned char* dynamic_shared;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Thread* current;
    void* scheduler_stack_pointer;
    void (*body)(void*);
    void* argument;
};

// The block that this system thread runs.
extern thread_local Block* the_block;

inline Block& block() {
    return *the_block;
}

// Gives the processor to the next thread until the block, or the warp, has met.
void meet_block();
void meet_warp();

// Hands `words` to the warp; the answer gives those of any lane.
template <typename Value>
const unsigned (*exchange(const Value& value))[MOST_WORDS] {
    static_assert(sizeof(Value) <= sizeof(unsigned) * MOST_WORDS, "too large for a meeting");
    Thread* self = block().current;
    unsigned parity = self->meetings++ % 2;
    auto words = block().warps[self->warp].words[parity];
    std::memcpy(words[self->lane], &value, sizeof(Value));
    meet_warp();
    return words;
}

template <typename Value>
Value from_lane(const unsigned (*words)[MOST_WORDS], unsigned lane) {
    Value value;
    std::memcpy(&value, words[lane], sizeof(Value));
    return value;
}

}  // namespace emulator

#define threadIdx (emulator::block().current->index)
#define blockIdx (emulator::block().index)
#define blockDim (emulator::block().size)
#define gridDim (emulator::block().grid)

inline void __syncthreads() {
    emulator::meet_block();
}

inline void __syncwarp(unsigned = 0xffffffffu) {
    emulator::exchange(0u);
}

template <typename Value>
Value __shfl_sync(unsigned, Value value, unsigned lane) {
    return emulator::from_lane<Value>(emulator::exchange(value), lane % 32);
}
template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, unsigned mask) {
    unsigned lane = emulator::block().current->lane ^ mask;
    return emulator::from_lane<Value>(emulator::exchange(value), lane);
}
template <typename Value>
Value __shfl_down_sync(unsigned, Value value, unsigned distance) {
    unsigned lane = emulator::block().current->lane + distance;
    const unsigned(*words)[emulator::MOST_WORDS] = emulator::exchange(value);
    return lane < 32 ? emulator::from_lane<Value>(words, lane) : value;
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    const unsigned(*words)[emulator::MOST_WORDS] = emulator::exchange(unsigned(predicate != 0));
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < 32; lane++) ballot |= words[lane][0] << lane;
    return ballot;
}
inline int __any_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) == 0xffffffffu;
}

inline float __uint_as_float(unsigned x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline unsigned __float_as_uint(float x) {
    unsigned y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline float __int_as_float(int x) {
    return __uint_as_float(unsigned(x));
}
inline int __float_as_int(float x) {
    return int(__float_as_uint(x));
}
// The roundings of single operations, which nothing may contract; the emulator is compiled without contraction.
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fsub_rn(float a, float b) {
    return a - b;
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline float __fsqrt_rn(float a) {
    return std::sqrt(a);
}
inline float __fmaf_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
inline float __expf(float x) {
    return std::exp(x);
}
inline float __logf(float x) {
    return std::log(x);
}
inline float __fdividef(float a, float b) {
    return a / b;
}
inline float rsqrtf(float x) {
    return 1.0f / std::sqrt(x);
}
inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline unsigned min(unsigned a, unsigned b) {
    return a < b ? a : b;
}
inline unsigned max(unsigned a, unsigned b) {
    return a > b ? a : b;
}
inline int min(int a, int b) {
    return a < b ? a : b;
}
inline int max(int a, int b) {
    return a > b ? a : b;
}
inline unsigned long long min(unsigned long long a, unsigned long long b) {
    return a < b ? a : b;
}

inline unsigned short emulated_narrow(float x) {
    unsigned bits = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline unsigned narrow2(float low, float high) {
    return emulated_narrow(low) | unsigned(emulated_narrow(high)) << 16;
}
inline float emulated_half(unsigned short bits) {
    unsigned sign = unsigned(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) {
        float value = std::ldexp(float(fraction), -24);
        return sign ? -value : value;
    }
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

// See prelude.cuh for the fragments.
inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Fragments {
        unsigned a[4], b[2];
    } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const unsigned(*words)[emulator::MOST_WORDS] = emulator::exchange(mine);
    unsigned lane = emulator::block().current->lane, g = lane / 4, t = lane % 4;
    auto half = [](unsigned pair, unsigned which) {
        return __uint_as_float(which ? pair & 0xffff0000u : pair << 16);
    };
    for (unsigned out = 0; out < 4; out++) {
        unsigned row = g + out / 2 * 8, column = 2 * t + out % 2;
        double sum = c[out];
        for (unsigned k = 0; k < 16; k++) {
            unsigned owner = k % 8 / 2;
            unsigned a_word = words[row % 8 * 4 + owner][row / 8 + k / 8 * 2];
            unsigned b_word = words[column * 4 + owner][4 + k / 8];
            sum += double(half(a_word, k % 2)) * double(half(b_word, k % 2));
        }
        c[out] = float(sum);
    }
}

// Ends the program, naming what was done wrong: a GPU would end the process's context.
[[noreturn]] inline void fault(const char* what) {
    std::fprintf(stderr, "emulator: %s\n", what);
    std::abort();
}

inline void load_matrices(unsigned (&r)[4], const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fault("load_matrices: a row that is not 16-byte aligned");
    const unsigned(*words)[emulator::MOST_WORDS] = emulator::exchange(row);
    unsigned lane = emulator::block().current->lane;
    for (unsigned m = 0; m < 4; m++) {
        const void* found = emulator::from_lane<const void*>(words, 8 * m + lane / 4);
        std::memcpy(&r[m], static_cast<const char*>(found) + 4 * (lane % 4), 4);
    }
    // Nobody overwrites the matrices before all have read.
    __syncwarp();
}

inline void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fault("load_matrices_transposed: a row that is not 16-byte aligned");
    const unsigned(*words)[emulator::MOST_WORDS] = emulator::exchange(row);
    unsigned lane = emulator::block().current->lane;
    for (unsigned m = 0; m < 4; m++) {
        unsigned short halves[2];
        for (unsigned i = 0; i < 2; i++) {
            const void* found = emulator::from_lane<const void*>(words, 8 * m + 2 * (lane % 4) + i);
            std::memcpy(&halves[i], static_cast<const char*>(found) + 2 * (lane / 4), 2);
        }
        r[m] = halves[0] | unsigned(halves[1]) << 16;
    }
    __syncwarp();
}

inline void copy_async(void* to_shared, const void* from, unsigned bytes = 16) {
    if (reinterpret_cast<uintptr_t>(to_shared) % 16 || (bytes && reinterpret_cast<uintptr_t>(from) % 16)) {
        fault("copy_async: an address that is not 16-byte aligned");
    }
    std::memset(to_shared, 0xff, 16);
    emulator::block().current->copies.back().push_back({to_shared, from, bytes});
}
inline void copies_commit() {
    emulator::block().current->copies.emplace_back();
}
template <int PENDING>
inline void copies_wait() {
    auto& groups = emulator::block().current->copies;
    while (groups.size() > PENDING + 1) {
        for (auto& copy : groups.front()) {
            std::memset(copy.to, 0, 16);
            std::memcpy(copy.to, copy.from, copy.bytes);
        }
        groups.erase(groups.begin());
    }
}

inline unsigned atomicAdd(unsigned* at, unsigned value) {
    unsigned before = *at;
    *at += value;
    return before;
}

namespace emulator {

using Entry = void (*)(void**);

// Remembers a kernel by its name.
struct Registered {
    Registered(const char* name, Entry entry);
};

template <typename... Parameters, size_t... I>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<Parameters>*>(arguments[I])...);
}
template <typename... Parameters>
void call(void (*kernel)(Parameters...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<Parameters...>());
}

}  // namespace emulator

#define EMULATE(name) \
    static emulator::Registered registered_##name(#name, [](void** arguments) { emulator::call(&name, arguments); })
