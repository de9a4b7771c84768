// Attention forward with bf16 operands, and the join of split keys.

#include "cuda/prelude.cuh"
#include "op/attention/forward.cuh"

using namespace attention;

FORWARD(attention_forward_bf16_32, bf16, 32, 2, 64)
FORWARD(attention_forward_bf16_64, bf16, 64, 2, 64)
FORWARD(attention_forward_bf16_96, bf16, 96, 2, 64)
FORWARD(attention_forward_bf16_128, bf16, 128, 2, 64)
FORWARD(attention_forward_bf16_256, bf16, 256, 1, 64)

// Rows of a tile whose keys were split.
struct Join {
    u32 first_query, start, rows;
    // The first of its slots, and how many.
    u32 slot, slots;
};

// o = sum of exp(lse_i - lse) o_i over the parts i of a row's keys. One warp a row.
KERNEL attention_join(const Join* joins, const float* parts, const float* part_lse, FloatsMut o, float* lse, u32 tile,
    u32 heads, u32 kv_heads, u32 e, u32 width) {
    Join join = joins[blockIdx.x];
    u32 kv_head = blockIdx.y, group = heads / kv_heads, row = blockIdx.z * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= join.rows) return;
    auto part = [&](u32 i) { return (u64(join.slot + i) * kv_heads + kv_head) * tile + row; };
    float max = -INFINITY, sum = 0;
    for (u32 i = 0; i < join.slots; i++) max = fmaxf(max, part_lse[part(i)]);
    for (u32 i = 0; i < join.slots; i++) sum += expf(part_lse[part(i)] - max);
    u32 at = join.start + row, query = at / group;
    u64 out = (u64(join.first_query) + query) * heads + kv_head * group + at % group;
    float total = max + logf(sum);
    if (lane_index() == 0) lse[out] = total;
    for (u32 column = lane_index(); column < e; column += WARP) {
        float value = 0;
        for (u32 i = 0; i < join.slots; i++) {
            float weight = expf(part_lse[part(i)] - total);
            // What a row sees nothing of has no values, not even NaN.
            if (weight != 0) value = fmaf(weight, parts[part(i) * width + column], value);
        }
        store(o, out * e + column, value);
    }
}
