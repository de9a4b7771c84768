// The gradient of an embedding table.

#include "cuda/prelude.cuh"

// Rows of dx that are read before the first is added.
constexpr u32 AT_ONCE = 4;

template <u32 PIECE>
struct Piece {
    float v[PIECE];

    DEVICE void read(Floats x, u64 at) {
        if constexpr (PIECE == 4) load4(x, at, v);
        else v[0] = load(x, at);
    }
};

// Adds the rows of dx [T, D] of some tokens to a row of the table, in their order.
template <u32 PIECE>
DEVICE void add_rows(Floats dx, const u32* tokens, u32 count, u32 width, float* row) {
    u32 column = (blockIdx.y * blockDim.x + threadIdx.x) * PIECE;
    if (column >= width) return;
    Piece<PIECE> sum, next[AT_ONCE];
    sum.read(Floats{row, F32, 0}, column);
    for (u32 first = 0; first < count; first += AT_ONCE) {
#pragma unroll
        for (u32 k = 0; k < AT_ONCE; k++) {
            if (first + k < count) next[k].read(dx, u64(tokens[first + k]) * width + column);
        }
#pragma unroll
        for (u32 k = 0; k < AT_ONCE; k++) {
            if (first + k >= count) break;
#pragma unroll
            for (u32 i = 0; i < PIECE; i++) sum.v[i] += next[k].v[i];
        }
    }
    if constexpr (PIECE == 4) store4(FloatsMut{row, F32, 0}, column, sum.v);
    else row[column] = sum.v[0];
}

// dtable[ids[i]] += dx[t] for the tokens t of `tokens` from starts[i] to starts[i + 1]: a block has columns of one row of
// dtable [V, D], ids are distinct.
KERNEL embedding_gradient(Floats dx, const u32* tokens, const u32* starts, const u32* ids, u32 width, float* dtable) {
    u32 begin = starts[blockIdx.x], count = starts[blockIdx.x + 1] - begin;
    float* row = dtable + u64(ids[blockIdx.x]) * width;
    if (width % 4 == 0) add_rows<4>(dx, tokens + begin, count, width, row);
    else add_rows<1>(dx, tokens + begin, count, width, row);
}
