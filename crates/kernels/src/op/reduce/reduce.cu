// Sums of squares of several tensors by one launch; the blocks' sums are added on the host, in their order.

#include "cuda/elements.cuh"

// One tensor and its blocks; five words, as on the other side of the launch.
struct Summand {
    Floats x;
    u64 count, first_block, blocks;
};

// What a block adds up: the last tensor whose first block is not behind it. Each has at least one.
DEVICE Summand summand_of(const Summand* summands, u32 count) {
    u32 low = 0, high = count;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (summands[middle].first_block <= blockIdx.x) low = middle;
        else high = middle;
    }
    return summands[low];
}

// out[b] = the sum of the squares that block b has
KERNEL sums_of_squares(const Summand* summands, u32 count, double* out) {
    __shared__ double space[WARP];
    Summand summand = summand_of(summands, count);
    u64 stride = summand.blocks * 4 * blockDim.x;
    u64 first = ((blockIdx.x - summand.first_block) * blockDim.x + threadIdx.x) * 4;
    double sum = 0;
    for (u64 i = first; i < summand.count; i += FOURS * stride) {
        Stored stored[FOURS];
#pragma unroll
        for (u32 k = 0; k < FOURS; k++) {
            u64 at = i + k * stride, left = at < summand.count ? summand.count - at : 0;
            stored[k] = fetch(summand.x, Four{at, 1, u32(left < 4 ? left : 4)});
        }
#pragma unroll
        for (u32 k = 0; k < FOURS; k++) {
            float v[4];
            widen(summand.x.type, stored[k], v);
#pragma unroll
            for (u32 j = 0; j < 4; j++) sum += double(v[j]) * double(v[j]);
        }
    }
    sum = block_sum(sum, space);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
