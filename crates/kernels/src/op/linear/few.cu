// Products of at most 8 rows with a weight [n, depth]: each of its rows is read once, as it is stored, and that is the time
// they take.
//
// A block makes 4 columns of the result for all rows; its 4 warps take turns along the depth. Beside bf16 rows a weight is
// rounded to bf16 in passing.

#include "op/linear/gemm.cuh"

constexpr u32 COLUMNS = 4, WARPS = 4;
// Elements of a line that a lane takes at once.
constexpr u32 VECTOR = 8;

DEVICE void widen2(float* to, u32 pair, bf16) {
    to[0] = low_half(pair), to[1] = high_half(pair);
}
DEVICE void widen2(float* to, u32 pair, f16) {
    to[0] = wide(f16{u16(pair)}), to[1] = wide(f16{u16(pair >> 16)});
}

// 8 neighbours as they are stored.
template <typename Element>
struct Eight {
    static constexpr u32 WORDS = sizeof(Element) * VECTOR / 16;
    uint4 words[WORDS];

    DEVICE void load(const void* from, u64 i) {
        const uint4* at = reinterpret_cast<const uint4*>(static_cast<const Element*>(from) + i);
#pragma unroll
        for (u32 j = 0; j < WORDS; j++) words[j] = at[j];
    }

    DEVICE void widen(float (&v)[VECTOR]) const {
#pragma unroll
        for (u32 j = 0; j < WORDS; j++) {
            u32 word[4] = {words[j].x, words[j].y, words[j].z, words[j].w};
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                if constexpr (sizeof(Element) == 4) v[4 * j + i] = __uint_as_float(word[i]);
                else widen2(&v[2 * i], word[i], Element{});
            }
        }
    }
};

DEVICE void round_to_bf16(float (&v)[VECTOR]) {
#pragma unroll
    for (u32 j = 0; j < VECTOR; j += 2) widen2(&v[j], narrow2(v[j], v[j + 1]), bf16{});
}

// The sums of a block: ROWS of a by COLUMNS of the weight. What is outside is computed of the last row or column that is
// inside, and not written.
template <u32 ROWS>
struct Sums {
    float of[ROWS][COLUMNS] = {};

    // Adds a term where vectors can be loaded.
    template <typename X, typename W>
    DEVICE void add(const Term& term, u32 column, const Output& out) {
        constexpr bool rounds = sizeof(X) == 2 && !is_bf16(W{});
        u64 lines[COLUMNS];
#pragma unroll
        for (u32 j = 0; j < COLUMNS; j++) lines[j] = min(column + j, out.columns - 1) * term.b.stride;
        // `depth` is a multiple of 8 where vectors can be loaded.
#pragma unroll(ROWS == 1 ? 2 : 1)
        for (u32 k = threadIdx.x * VECTOR; k < term.depth; k += WARPS * WARP * VECTOR) {
            Eight<W> weights[COLUMNS];
            float w[COLUMNS][VECTOR];
#pragma unroll
            for (u32 j = 0; j < COLUMNS; j++) weights[j].load(term.b.x.at, lines[j] + k);
#pragma unroll
            for (u32 j = 0; j < COLUMNS; j++) {
                weights[j].widen(w[j]);
                if (rounds) round_to_bf16(w[j]);
            }
#pragma unroll
            for (u32 i = 0; i < ROWS; i++) {
                Eight<X> row;
                row.load(term.a.x.at, min(i, out.rows - 1) * term.a.stride + k);
                float x[VECTOR];
                row.widen(x);
                add(i, x, w);
            }
        }
    }

    static DEVICE constexpr bool is_bf16(bf16) {
        return true;
    }
    template <typename Other>
    static DEVICE constexpr bool is_bf16(Other) {
        return false;
    }

    DEVICE void add(u32 i, const float (&x)[VECTOR], const float (&w)[COLUMNS][VECTOR]) {
#pragma unroll
        for (u32 j = 0; j < COLUMNS; j++)
#pragma unroll
            for (u32 l = 0; l < VECTOR; l++) of[i][j] = fmaf(x[l], w[j][l], of[i][j]);
    }

    // Adds a term one element at a time.
    DEVICE void add_elements(const Term& term, u32 column, const Output& out) {
        bool rounds = term.a.x.type == BF16;
        for (u32 k = threadIdx.x; k < term.depth; k += WARPS * WARP) {
            float w[COLUMNS];
#pragma unroll
            for (u32 j = 0; j < COLUMNS; j++) {
                w[j] = load(term.b.x, min(column + j, out.columns - 1) * term.b.stride + k);
                if (rounds) w[j] = wide(narrow(w[j]));
            }
#pragma unroll
            for (u32 i = 0; i < ROWS; i++) {
                float x = load(term.a.x, min(i, out.rows - 1) * term.a.stride + k);
#pragma unroll
                for (u32 j = 0; j < COLUMNS; j++) of[i][j] = fmaf(x, w[j], of[i][j]);
            }
        }
    }

    template <typename X>
    DEVICE void add_of(const Term& term, u32 column, const Output& out) {
        if (term.b.x.type == F32) add<X, float>(term, column, out);
        else if (term.b.x.type == BF16) add<X, bf16>(term, column, out);
        else add<X, f16>(term, column, out);
    }

    DEVICE void add(const Term& term, u32 column, const Output& out) {
        if (!term.a.aligned || !term.b.aligned || term.depth % VECTOR != 0) add_elements(term, column, out);
        else if (term.a.x.type == F32) add_of<float>(term, column, out);
        else add_of<bf16>(term, column, out);
    }

    // Adds up the warps' sums and writes them.
    DEVICE void finish(u32 column, const Output& out) {
        __shared__ float shared[WARPS][ROWS * COLUMNS];
#pragma unroll
        for (u32 i = 0; i < ROWS * COLUMNS; i++) {
            float sum = warp_sum(of[i / COLUMNS][i % COLUMNS]);
            if (lane_index() == 0) shared[threadIdx.x / WARP][i] = sum;
        }
        __syncthreads();
        u32 i = threadIdx.x, row = i / COLUMNS;
        column += i % COLUMNS;
        if (row >= ROWS || row >= out.rows || column >= out.columns) return;
        float sum = 0.0f;
#pragma unroll
        for (u32 warp = 0; warp < WARPS; warp++) sum += shared[warp][i];
        out.put(row, column, sum);
    }
};

template <u32 ROWS>
DEVICE void product(PRODUCT_PARAMETERS) {
    Task task(ROWS, COLUMNS, VECTOR, PRODUCT_ARGUMENTS);
    Sums<ROWS> sums;
    // One copy of the code for both terms.
#pragma unroll 1
    for (u32 which = 0; which < 2; which++) {
        Term term = task.choose(which == 0);
        if (term.depth > 0) sums.add(term, task.column, task.out);
    }
    sums.finish(task.column, task.out);
}

KERNEL __launch_bounds__(WARPS * WARP) few_1(PRODUCT_PARAMETERS) {
    product<1>(PRODUCT_ARGUMENTS);
}

KERNEL __launch_bounds__(WARPS * WARP) few_4(PRODUCT_PARAMETERS) {
    product<4>(PRODUCT_ARGUMENTS);
}

KERNEL __launch_bounds__(WARPS * WARP) few_8(PRODUCT_PARAMETERS) {
    product<8>(PRODUCT_ARGUMENTS);
}
