// Attention backward, gradients of queries with bf16 operands, and delta.

#include "cuda/prelude.cuh"
#include "op/attention/backward_queries.cuh"

using namespace attention;

QUERIES(attention_queries_bf16_32, bf16, 32, 2, 32, 3)
QUERIES(attention_queries_bf16_64, bf16, 64, 2, 32, 3)
QUERIES(attention_queries_bf16_96, bf16, 96, 2, 32, 1)
QUERIES(attention_queries_bf16_128, bf16, 128, 2, 32, 1)
QUERIES(attention_queries_bf16_256, bf16, 256, 1, 32, 1)

// delta = do . o of every query and head, rows of e elements; `lanes` lanes a row, a power of 2.
KERNEL attention_delta(Floats o, Floats d_o, float* out, u64 rows, u32 e, u32 lanes) {
    u64 row = (u64(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
    u32 lane = threadIdx.x % lanes;
    float sum = 0;
    if (row < rows && e % 4 == 0) {
        for (u32 i = 4 * lane; i < e; i += 4 * lanes) {
            float x[4], y[4];
            load4(o, row * e + i, x), load4(d_o, row * e + i, y);
            for (u32 n = 0; n < 4; n++) sum = fmaf(x[n], y[n], sum);
        }
    } else if (row < rows) {
        for (u32 i = lane; i < e; i += lanes) sum = fmaf(load(o, row * e + i), load(d_o, row * e + i), sum);
    }
    for (u32 distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    if (row < rows && lane == 0) out[row] = sum;
}
