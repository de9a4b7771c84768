// Attention backward, gradients of keys and values with bf16 operands, and the sum of split rows.

#include "cuda/prelude.cuh"
#include "op/attention/backward_keys.cuh"

using namespace attention;

KEYS(attention_keys_bf16_32, bf16, 32, 2, 32, true)
KEYS(attention_keys_bf16_64, bf16, 64, 2, 32, true)
KEYS(attention_keys_bf16_96, bf16, 96, 1, 64, true)
KEYS(attention_keys_bf16_128, bf16, 128, 1, 64, true)
KEYS(attention_keys_bf16_256, bf16, 256, 1, 32, false)

// Keys whose rows were split.
struct KeySum {
    u32 first_key, keys;
    // The first of its slots, and how many.
    u32 slot, slots;
};

// dk and dv as sums of their parts, in the order of the slots. One block a head and a tile of keys.
KERNEL attention_keys_sum(const KeySum* sums, const float* dk_parts, const float* dv_parts, FloatsMut dk, FloatsMut dv,
    u32 tile, u32 kv_heads, u32 e, u32 width) {
    KeySum sum = sums[blockIdx.x];
    const float* parts = blockIdx.z == 0 ? dk_parts : dv_parts;
    FloatsMut out = blockIdx.z == 0 ? dk : dv;
    for (u32 i = threadIdx.x; i < sum.keys * e; i += blockDim.x) {
        u32 key = i / e, column = i - key * e;
        float value = 0;
        for (u32 slot = sum.slot; slot < sum.slot + sum.slots; slot++) {
            value += parts[((u64(slot) * kv_heads + blockIdx.y) * tile + key) * width + column];
        }
        store(out, ((u64(sum.first_key) + key) * kv_heads + blockIdx.y) * e + column, value);
    }
}
