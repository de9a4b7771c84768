// Matrix products in f32, of operands of any type, on the ordinary cores: exact products, one rounding an addition.

#include "op/linear/gemm.cuh"

constexpr u32 THREADS = 256;

// Where one thread's four elements of an operand's tile lie: (across, along the depth), and which way they go.
struct Four {
    u32 across, along;
};

// A tile ACROSS x ALONG of an operand, transposed to lie along the depth in shared memory. Each thread brings four elements.
template <u32 ACROSS, u32 ALONG>
struct alignas(16) Tile {
    static_assert(ACROSS * ALONG == 4 * THREADS, "four elements a thread");
    // Rows of 16-byte multiples that begin in different banks.
    static constexpr u32 PITCH = ACROSS + 4;
    float values[ALONG][PITCH];

    // Where this thread's elements begin.
    static DEVICE Four place(bool along) {
        u32 i = threadIdx.x;
        return along ? Four{i / (ALONG / 4), i % (ALONG / 4) * 4} : Four{i % (ACROSS / 4) * 4, i / (ACROSS / 4)};
    }

    // This thread's elements of the tile that begins at (across, k), zeros outside.
    static DEVICE void read(float (&v)[4], const Operand& x, bool along, u32 across, u32 k, u32 width, u32 depth) {
        Four at = place(along);
        across += at.across, k += at.along;
        u32 line = along ? across : k, lines = along ? width : depth;
        u32 i = along ? k : across, length = along ? depth : width;
        u64 start = line * x.stride + i;
        if (line < lines && x.aligned && i + 4 <= length) return load4(x.x, start, v);
        for (u32 j = 0; j < 4; j++) v[j] = line < lines && i + j < length ? load(x.x, start + j) : 0.0f;
    }

    DEVICE void write(const float (&v)[4], bool along) {
        Four at = place(along);
        if (along) {
            for (u32 j = 0; j < 4; j++) values[at.along + j][at.across] = v[j];
        } else {
            *reinterpret_cast<float4*>(&values[at.along][at.across]) = make_float4(v[0], v[1], v[2], v[3]);
        }
    }
};

// A block's tile is 16 x 16 threads' blocks of (4 A) x (4 B) elements: A x B squares of 4 x 4, 64 rows and columns apart.
template <u32 A, u32 B, u32 STEP>
struct Product {
    static constexpr u32 ROWS = 64 * A, COLUMNS = 64 * B;
    using TileA = Tile<ROWS, STEP>;
    using TileB = Tile<COLUMNS, STEP>;
    struct Stage {
        TileA a;
        TileB b;
    };

    const Task& task;
    float sums[4 * A][4 * B] = {};
    float next_a[4], next_b[4];

    DEVICE Product(const Task& task) : task(task) {}

    DEVICE bool a_along() const {
        return !(task.layout & A_TRANSPOSED);
    }
    DEVICE bool b_along() const {
        return task.layout & B_TRANSPOSED;
    }

    DEVICE void read(u32 step) {
        Term term = task.term(step);
        u32 k = (step < task.first_steps ? step : step - task.first_steps) * STEP;
        TileA::read(next_a, term.a, a_along(), task.row, k, task.out.rows, term.depth);
        TileB::read(next_b, term.b, b_along(), task.column, k, task.out.columns, term.depth);
    }

    DEVICE void write(Stage& stage) {
        stage.a.write(next_a, a_along());
        stage.b.write(next_b, b_along());
    }

    DEVICE void add(const Stage& stage) {
        u32 x = threadIdx.x % 16 * 4, y = threadIdx.x / 16 * 4;
#pragma unroll
        for (u32 k = 0; k < STEP; k++) {
            float a[4 * A], b[4 * B];
#pragma unroll
            for (u32 i = 0; i < A; i++) square(&a[4 * i], &stage.a.values[k][64 * i + y]);
#pragma unroll
            for (u32 j = 0; j < B; j++) square(&b[4 * j], &stage.b.values[k][64 * j + x]);
#pragma unroll
            for (u32 i = 0; i < 4 * A; i++)
#pragma unroll
                for (u32 j = 0; j < 4 * B; j++) sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
        }
    }

    static DEVICE void square(float* to, const float* from) {
        float4 v = *reinterpret_cast<const float4*>(from);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }

    // Two stages in turn: while one is read, the next one's elements are on their way.
    DEVICE void run(Stage (&stages)[2]) {
        if (task.begin < task.end) {
            read(task.begin);
            write(stages[0]);
        }
        __syncthreads();
        for (u32 step = task.begin; step < task.end; step++) {
            u32 which = (step - task.begin) % 2;
            bool more = step + 1 < task.end;
            if (more) read(step + 1);
            add(stages[which]);
            if (more) write(stages[1 - which]);
            __syncthreads();
        }
    }

    // One row of every thread at a time goes through shared memory, and from there whole rows to the result.
    DEVICE void finish(float (&slab)[16][COLUMNS]) const {
        u32 x = threadIdx.x % 16 * 4, y = threadIdx.x / 16;
#pragma unroll
        for (u32 i = 0; i < 4 * A; i++) {
#pragma unroll
            for (u32 j = 0; j < B; j++) {
                float4 four = make_float4(sums[i][4 * j], sums[i][4 * j + 1], sums[i][4 * j + 2], sums[i][4 * j + 3]);
                *reinterpret_cast<float4*>(&slab[y][64 * j + x]) = four;
            }
            __syncthreads();
#pragma unroll 1
            for (u32 at = threadIdx.x; at < 4 * COLUMNS; at += THREADS) {
                u32 row = at / (COLUMNS / 4), column = at % (COLUMNS / 4) * 4;
                task.out.put_inside(task.row + i / 4 * 64 + row * 4 + i % 4, task.column + column, &slab[row][column]);
            }
            __syncthreads();
        }
    }
};

template <u32 A, u32 B, u32 STEP>
DEVICE void product(PRODUCT_PARAMETERS) {
    using Made = Product<A, B, STEP>;
    // The stages are done with when the results go out.
    __shared__ union Space {
        typename Made::Stage stages[2];
        float slab[16][Made::COLUMNS];
    } space;
    Task task(Made::ROWS, Made::COLUMNS, STEP, PRODUCT_ARGUMENTS);
    Made made(task);
    made.run(space.stages);
    made.finish(space.slab);
}

KERNEL __launch_bounds__(THREADS, 2) gemm_f32_128(PRODUCT_PARAMETERS) {
    product<2, 2, 8>(PRODUCT_ARGUMENTS);
}

KERNEL __launch_bounds__(THREADS, 3) gemm_f32_64(PRODUCT_PARAMETERS) {
    product<1, 1, 16>(PRODUCT_ARGUMENTS);
}

// c [m, n] = alpha (the sum of `parts` matrices [m, n], the first ones first) + beta c + bias; a thread for four columns.
KERNEL sum_parts(const float* parts, u32 count, u32 m, u32 n, FloatsMut c, u64 c_stride, Floats bias, float alpha,
    float beta, u32 aligned) {
    u32 fours = (n + 3) / 4;
    u64 thread = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    u32 row = u32(thread / fours), column = u32(thread % fours) * 4;
    if (row >= m) return;
    Output out{c, c_stride, m, n, bias, alpha, beta, aligned != 0};
    float sums[4] = {};
    const float* part = parts + (u64(row) * n + column);
    bool four = n % 4 == 0;
    for (u32 i = 0; i < count; i++, part += u64(m) * n) {
        float v[4] = {};
        if (four) load4(Floats{part, F32, 0}, 0, v);
        else for (u32 j = 0; j < 4; j++) if (column + j < n) v[j] = part[j];
        for (u32 j = 0; j < 4; j++) sums[j] += v[j];
    }
    if (out.fits(column)) return out.put4(row, column, sums[0], sums[1], sums[2], sums[3]);
    for (u32 j = 0; j < 4; j++)
        if (column + j < n) out.put(row, column + j, sums[j]);
}
