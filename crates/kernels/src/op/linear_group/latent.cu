// What lies between the products of an adapter: sums of parts, products with R, and several casts at once.
//
// They are small beside the layers' own products; what they cost is their number.

#include "cuda/prelude.cuh"

// Calls `work(i, four)` for every element of `count`, mostly for four from `i` on, a multiple of 4; the last ones, fewer than
// four, come one by one. One thread for every four.
template <typename Work>
DEVICE void each(u64 count, Work work) {
    u64 thread = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (4 * thread + 4 <= count) work(4 * thread, true);
    u64 rest = count / 4 * 4 + thread;
    if (rest < count) work(rest, false);
}

constexpr u32 THREADS = 256;
// Rows of z that a block makes, and columns and depth of R that it holds at a time.
constexpr u32 ROWS = 32, COLUMNS = 64, DEPTH = 32;
// Rows of a thread, which takes one column.
constexpr u32 OF_A_THREAD = ROWS / (THREADS / COLUMNS);

struct Square {
    const float* at;
    u32 r;
    bool transposed;

    // Elements (k, column) of R or R^T from (first_k, first_column) on, zeros outside.
    DEVICE void read(float (&tile)[DEPTH][COLUMNS + 1], u32 first_k, u32 first_column) const {
        for (u32 i = threadIdx.x; i < DEPTH * COLUMNS; i += THREADS) {
            u32 k = transposed ? i % DEPTH : i / COLUMNS, column = transposed ? i / DEPTH : i % COLUMNS;
            u32 at_k = first_k + k, at_column = first_column + column;
            bool inside = at_k < r && at_column < r;
            tile[k][column] = inside ? at[transposed ? at_column * r + at_k : at_k * r + at_column] : 0.0f;
        }
    }
};

// z [T, r] = the sum of parts, each [T, *] with lines of `part_stride`; h [T, r] = s z R^T, or s z R, where h is not null.
// Rows of h are `h_stride` apart. R [r, r].
KERNEL __launch_bounds__(THREADS) latent(const float* parts, u32 count, u64 part_elements, u32 part_stride, u32 t, u32 r,
    float* z, const float* square, u32 transposed, float scale, FloatsMut h, u64 h_stride) {
    DYNAMIC_SHARED(shared);
    __shared__ float tile[DEPTH][COLUMNS + 1];
    // This block's rows of z, padded to whole steps of the depth; where there is no h, no memory is given for them.
    float* rows = reinterpret_cast<float*>(shared);
    u32 pitch = (r + DEPTH - 1) / DEPTH * DEPTH + 4, first = blockIdx.x * ROWS;
    for (u32 i = threadIdx.x; i < ROWS * pitch; i += THREADS) {
        u32 row = i / pitch, column = i % pitch;
        bool inside = first + row < t && column < r;
        float sum = 0.0f;
        const float* part = parts + u64(first + row) * part_stride + column;
        for (u32 j = 0; inside && j < count; j++) sum += part[j * part_elements];
        if (h.at) rows[i] = sum;
        if (inside) z[u64(first + row) * r + column] = sum;
    }
    if (!h.at) return;
    Square of{square, r, transposed != 0};
    u32 row = threadIdx.x / COLUMNS * OF_A_THREAD, column = threadIdx.x % COLUMNS;
    for (u32 c = 0; c < r; c += COLUMNS) {
        float sums[OF_A_THREAD] = {};
        for (u32 k = 0; k < r; k += DEPTH) {
            __syncthreads();
            of.read(tile, k, c);
            __syncthreads();
#pragma unroll
            for (u32 l = 0; l < DEPTH; l += 4) {
#pragma unroll
                for (u32 i = 0; i < OF_A_THREAD; i++) {
                    float4 v = *reinterpret_cast<const float4*>(&rows[(row + i) * pitch + k + l]);
                    sums[i] = fmaf(v.x, tile[l][column], sums[i]);
                    sums[i] = fmaf(v.y, tile[l + 1][column], sums[i]);
                    sums[i] = fmaf(v.z, tile[l + 2][column], sums[i]);
                    sums[i] = fmaf(v.w, tile[l + 3][column], sums[i]);
                }
            }
        }
#pragma unroll
        for (u32 i = 0; i < OF_A_THREAD; i++)
            if (first + row + i < t && c + column < r) store(h, (first + row + i) * h_stride + c + column, scale * sums[i]);
    }
}

// y_j = x_j for up to four tensors, of `count_j` elements; one line of blocks for each.
KERNEL cast_four(Floats x0, FloatsMut y0, u64 count0, Floats x1, FloatsMut y1, u64 count1, Floats x2, FloatsMut y2,
    u64 count2, Floats x3, FloatsMut y3, u64 count3) {
    u32 which = blockIdx.y;
    Floats x = which == 0 ? x0 : which == 1 ? x1 : which == 2 ? x2 : x3;
    FloatsMut y = which == 0 ? y0 : which == 1 ? y1 : which == 2 ? y2 : y3;
    u64 count = which == 0 ? count0 : which == 1 ? count1 : which == 2 ? count2 : count3;
    // Tensors that lie one behind the other need not begin at a whole vector.
    bool aligned = reinterpret_cast<u64>(y.at) % 16 == 0;
    each(count, [&](u64 i, bool four) {
        if (!four) return store(y, i, load(x, i));
        float v[4];
        load4(x, i, v);
        if (aligned) return store4(y, i, v);
        for (u32 j = 0; j < 4; j++) store(y, i + j, v[j]);
    });
}
