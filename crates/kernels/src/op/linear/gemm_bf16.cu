// Matrix products of bf16 on the tensor cores: products exact, sums in f32.
//
// A block's warps each make 64 x 64 (or 32 x 32) of its tile. The operands go through shared memory in steps of 32 along
// the depth, several steps ahead; the fragments of a warp's next 16 are loaded while the tensor cores are busy with the
// last. The scheme is that of CUTLASS's pipelined products for compute capability 8.0.

#include "op/linear/gemm.cuh"

// Products along the depth that a stage holds.
constexpr u32 STEP = 32;
// Elements of a copy of 16 bytes.
constexpr u32 CHUNK = 8;

// ACROSS x STEP elements of an operand in shared memory, in lines along the depth (ALONG) or across it, as the operand lies.
// A line's chunks are permuted so that the 8 chunks which a warp reads or writes at once lie in different banks.
template <bool ALONG, u32 ACROSS, u32 THREADS>
struct Tile {
    static constexpr u32 BYTES = 2 * ACROSS * STEP;
    static constexpr u32 CHUNKS = (ALONG ? STEP : ACROSS) / CHUNK;
    static constexpr u32 LINES = ALONG ? ACROSS : STEP;
    static_assert(LINES * CHUNKS % THREADS == 0 && THREADS % CHUNKS == 0, "whole lines for all threads");

    static DEVICE u32 place(u32 line, u32 chunk) {
        // Two lines of 64 bytes fill all banks, or one of 128 and more.
        u32 turned = chunk ^ (ALONG ? line / 2 % 4 : line % 8);
        return (line * CHUNKS + turned) * 16;
    }

    // Starts the copies of what begins at (across, k); zeros outside, and everywhere where `wanted` is false.
    template <bool ALIGNED>
    static DEVICE void copy(u8* tile, const Operand& x, u32 across, u32 k, u32 width, u32 depth, bool wanted) {
        u32 line = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        u32 first = (ALONG ? across : k) + line, lines = ALONG ? width : depth;
        u32 i = (ALONG ? k : across) + chunk * CHUNK, length = ALONG ? depth : width;
        u32 inside = wanted && i < length ? min(length - i, CHUNK) : 0;
        const bf16* from = static_cast<const bf16*>(x.x.at) + (first * x.stride + i);
        if (ALIGNED || x.aligned) {
#pragma unroll
            for (u32 j = 0; j < LINES; j += THREADS / CHUNKS)
                copy_async(tile + place(line + j, chunk), from + j * x.stride, first + j < lines ? 2 * inside : 0);
        } else {
#pragma unroll 1
            for (u32 j = 0; j < LINES; j += THREADS / CHUNKS)
                gather(tile + place(line + j, chunk), from + j * x.stride, first + j < lines ? inside : 0);
        }
    }

    static DEVICE void gather(u8* to, const bf16* from, u32 count) {
        u32 words[CHUNK / 2];
#pragma unroll
        for (u32 j = 0; j < CHUNK; j += 2) {
            u32 low = j < count ? from[j].bits : 0, high = j + 1 < count ? from[j + 1].bits : 0;
            words[j / 2] = low | high << 16;
        }
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }

    // Fragments of 16 across by 16 along the depth, from (across, 16 half) on: the 8 x 8 matrix of lanes 8 to 15 is next to
    // the first one across, that of lanes 16 to 23 along, or with `B` the other way round. See `mma`.
    template <bool B>
    static DEVICE void fragments(u32 (&r)[4], const u8* tile, u32 across, u32 half) {
        u32 lane = lane_index(), in = lane % 8, low = lane / 8 % 2, high = lane / 16;
        u32 next_across = B ? high : low, next_along = B ? low : high;
        if (ALONG) {
            load_matrices(r, tile + place(across + next_across * 8 + in, half * 2 + next_along));
        } else {
            load_matrices_transposed(r, tile + place(half * 16 + next_along * 8 + in, across / CHUNK + next_across));
        }
    }
};

// The kernel of tiles ROWS x COLUMNS, of warps' tiles WARP_ROWS x WARP_COLUMNS.
template <u32 ROWS, u32 COLUMNS, u32 WARP_ROWS, u32 WARP_COLUMNS, u32 STAGES, bool ALIGNED, bool A_ALONG,
    bool B_ALONG>
struct Product {
    static constexpr u32 THREADS = ROWS / WARP_ROWS * (COLUMNS / WARP_COLUMNS) * WARP;
    static constexpr u32 A = WARP_ROWS / 16, B = WARP_COLUMNS / 16;
    using TileA = Tile<A_ALONG, ROWS, THREADS>;
    using TileB = Tile<B_ALONG, COLUMNS, THREADS>;
    static constexpr u32 STAGE = TileA::BYTES + TileB::BYTES;

    const Task& task;
    u8* stages;
    // Of this warp in the block's tile.
    u32 row, column;
    float sums[A][2 * B][4] = {};
    u32 a[2][A][4], b[2][B][4];

    DEVICE Product(const Task& task, u8* stages) : task(task), stages(stages) {
        u32 warp = threadIdx.x / WARP;
        row = warp % (ROWS / WARP_ROWS) * WARP_ROWS;
        column = warp / (ROWS / WARP_ROWS) * WARP_COLUMNS;
    }

    // Starts a step's copies, as a group; zeros behind the last step. Without a branch, so that the copies go out between
    // the products.
    DEVICE void copy(u32 step, u32 stage) {
        Term term = task.term(step);
        u32 k = (step < task.first_steps ? step : step - task.first_steps) * STEP;
        u8* at = stages + stage * STAGE;
        bool wanted = step < task.end;
        TileA::template copy<ALIGNED>(at, term.a, task.row, k, task.out.rows, term.depth, wanted);
        TileB::template copy<ALIGNED>(at + TileA::BYTES, term.b, task.column, k, task.out.columns, term.depth, wanted);
        copies_commit();
    }

    template <u32 HALF>
    DEVICE void load(u32 stage) {
        const u8* at = stages + stage * STAGE;
#pragma unroll
        for (u32 i = 0; i < A; i++) TileA::template fragments<false>(a[HALF][i], at, row + 16 * i, HALF);
#pragma unroll
        for (u32 j = 0; j < B; j++) TileB::template fragments<true>(b[HALF][j], at + TileA::BYTES, column + 16 * j, HALF);
    }

    template <u32 HALF>
    DEVICE void add() {
#pragma unroll
        for (u32 i = 0; i < A; i++) {
#pragma unroll
            for (u32 j = 0; j < 2 * B; j++)
                mma(sums[i][j], a[HALF][i], b[HALF][j / 2][j % 2 * 2], b[HALF][j / 2][j % 2 * 2 + 1]);
        }
    }

    DEVICE void run() {
        if (task.begin == task.end) return;
#pragma unroll
        for (u32 i = 0; i + 1 < STAGES; i++) copy(task.begin + i, i);
        copies_wait<STAGES - 2>();
        __syncthreads();
        load<0>(0);
        u32 stage = 0, free = STAGES - 1;
#pragma unroll 1
        for (u32 step = task.begin; step < task.end; step++) {
            load<1>(stage);
            copy(step + STAGES - 1, free);
            add<0>();
            // The next stage is there, and nobody reads this one any more.
            copies_wait<STAGES - 2>();
            __syncthreads();
            free = stage;
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            // Behind the last step these are zeros that nobody uses.
            load<0>(stage);
            add<1>();
        }
        // The stages' memory is used again.
        copies_wait<0>();
        __syncthreads();
    }

    // Sums go through a piece of shared memory of the warp's own, 16 rows at a time, and from there whole rows to the
    // result.
    DEVICE void finish() const {
        // 8 banks from one row to the next, for the four rows that are written at once.
        constexpr u32 PITCH = WARP_COLUMNS + 8, LANES = WARP_COLUMNS / 4;
        static_assert(THREADS / WARP * 16 * PITCH * 4 <= STAGES * STAGE, "fits where the stages were");
        u32 lane = lane_index();
        float* slab = reinterpret_cast<float*>(stages) + threadIdx.x / WARP * (16 * PITCH);
#pragma unroll
        for (u32 i = 0; i < A; i++) {
#pragma unroll
            for (u32 j = 0; j < 2 * B; j++) {
                float* at = slab + lane / 4 * PITCH + 8 * j + lane % 4 * 2;
                *reinterpret_cast<float2*>(at) = make_float2(sums[i][j][0], sums[i][j][1]);
                *reinterpret_cast<float2*>(at + 8 * PITCH) = make_float2(sums[i][j][2], sums[i][j][3]);
            }
            __syncwarp();
            u32 x = lane % LANES * 4;
#pragma unroll 1
            for (u32 y = lane / LANES; y < 16; y += WARP / LANES)
                task.out.put_inside(task.row + row + 16 * i + y, task.column + column + x, slab + y * PITCH + x);
            __syncwarp();
        }
    }
};

template <u32 ROWS, u32 COLUMNS, u32 WARP_ROWS, u32 WARP_COLUMNS, u32 STAGES, bool ALIGNED, bool A_ALONG,
    bool B_ALONG>
DEVICE void product(PRODUCT_PARAMETERS) {
    DYNAMIC_SHARED(stages);
    Task task(ROWS, COLUMNS, STEP, PRODUCT_ARGUMENTS);
    Product<ROWS, COLUMNS, WARP_ROWS, WARP_COLUMNS, STAGES, ALIGNED, A_ALONG, B_ALONG> made(task, stages);
    made.run();
    made.finish();
}

// Named after how a and b lie, n as they are read and t transposed: input gradient (dy W), forward (x W^T), weight gradient
// (dy^T x). The fourth way, which no operation has, is left to the f32 kernels. ALIGNED kernels take operands whose chunks
// begin at multiples of 16 bytes.
#define PRODUCT(name, blocks, rows, columns, warp_rows, warp_columns, aligned, a_along, b_along)                        \
    KERNEL __launch_bounds__(rows / warp_rows * (columns / warp_columns) * WARP, blocks) name(PRODUCT_PARAMETERS) {     \
        product<rows, columns, warp_rows, warp_columns, 4, aligned, a_along, b_along>(PRODUCT_ARGUMENTS);               \
    }

PRODUCT(gemm_bf16_256_nn, 1, 128, 256, 64, 64, true, true, false)
PRODUCT(gemm_bf16_256_nt, 1, 128, 256, 64, 64, true, true, true)
PRODUCT(gemm_bf16_256_tn, 1, 128, 256, 64, 64, true, false, false)
PRODUCT(gemm_bf16_128_nn, 2, 128, 128, 64, 64, true, true, false)
PRODUCT(gemm_bf16_128_nt, 2, 128, 128, 64, 64, true, true, true)
PRODUCT(gemm_bf16_128_tn, 2, 128, 128, 64, 64, true, false, false)
PRODUCT(gemm_bf16_64_nn, 4, 64, 64, 32, 32, false, true, false)
PRODUCT(gemm_bf16_64_nt, 4, 64, 64, 32, 32, false, true, true)
PRODUCT(gemm_bf16_64_tn, 4, 64, 64, 32, 32, false, false, false)
