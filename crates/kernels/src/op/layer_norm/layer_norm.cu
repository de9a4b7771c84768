// Layer normalisation of rows, its gradient with respect to them, and those of both norms' gains and shifts.

#include "cuda/row.cuh"

// The sum of (x - mean)^2 over this thread's elements of a slab.
template <u32 PIECE>
DEVICE float deviations(Team team, u32 slab, const float (&v)[HELD], float mean) {
    float sum = 0;
#pragma unroll
    for (u32 i = 0; i < HELD; i++) {
        float deviation = team.column<PIECE>(slab, i / PIECE) < team.width ? v[i] - mean : 0.0f;
        sum = fmaf(deviation, deviation, sum);
    }
    return sum;
}

// The variance is taken around the mean, from the values at hand: the mean of the squares less the square of the mean cancels
// where the mean is large.
template <u32 PIECE>
DEVICE void forward(
    Floats f, FloatsMut x, Floats gain, Floats shift, float eps, FloatsMut y, float* means, float* rstds, Team team
) {
    u32 width = team.width, slab_size = team.slab();
    float v[HELD], sum = 0, squares = 0;
    for (u32 slab = 0; slab < width; slab += slab_size) {
        load_sum<PIECE>(f, x, team, slab, v);
#pragma unroll
        for (u32 i = 0; i < HELD; i++) sum += v[i];
    }
    float mean = team_sum(team, sum) / float(width);
    for (u32 slab = 0; slab < width; slab += slab_size) {
        if (slab_size < width) load_slab<PIECE>(reading(x), team, team.start, slab, v);
        squares += deviations<PIECE>(team, slab, v, mean);
    }
    float rstd = 1.0f / sqrtf(team_sum(team, squares) / float(width) + eps);
    if (team.works && team.rank == 0) means[team.row] = mean, rstds[team.row] = rstd;
    for (u32 slab = 0; slab < width; slab += slab_size) {
        if (slab_size < width) load_slab<PIECE>(reading(x), team, team.start, slab, v);
        float g[HELD];
        load_slab<PIECE>(gain, team, 0, slab, g);
#pragma unroll
        for (u32 i = 0; i < HELD; i++) v[i] = g[i] * ((v[i] - mean) * rstd);
        load_slab<PIECE>(shift, team, 0, slab, g);
#pragma unroll
        for (u32 i = 0; i < HELD; i++) v[i] += g[i];
        store_slab<PIECE>(y, team, slab, v);
    }
}

// y = gain (x - mean) rstd + shift, mean and rstd of x [T, D]; with f [T, D], x becomes x + f first.
KERNEL __launch_bounds__(MOST_THREADS, 2) layer_norm(
    Floats f, FloatsMut x, Floats gain, Floats shift, float eps, FloatsMut y, float* mean, float* rstd, u64 rows,
    u32 width, u32 threads
) {
    Team team = team_of(threads, rows, width);
    if (width % 4 == 0) forward<4>(f, x, gain, shift, eps, y, mean, rstd, team);
    else forward<1>(f, x, gain, shift, eps, y, mean, rstd, team);
}

// What the gradient of a row is computed from: n = (x - mean) rstd and g = gain dy.
template <u32 PIECE>
DEVICE void read_gradient(
    Floats x, Floats gain, float mean, float rstd, Floats dy, Team team, u32 slab, float (&n)[HELD], float (&g)[HELD]
) {
    Stored xs = fetch<PIECE>(x, team, team.start, slab), gradients = fetch<PIECE>(dy, team, team.start, slab);
    widen<PIECE>(x.type, xs, n);
    widen<PIECE>(dy.type, gradients, g);
    float factor[HELD];
    load_slab<PIECE>(gain, team, 0, slab, factor);
#pragma unroll
    for (u32 i = 0; i < HELD; i++) n[i] = (n[i] - mean) * rstd, g[i] *= factor[i];
}

template <u32 PIECE>
DEVICE void backward(
    Floats x, Floats gain, float mean, float rstd, Floats dy, u32 add, FloatsMut dx, Team team
) {
    u32 width = team.width;
    float n[HELD], g[HELD], sum_g = 0, sum_gn = 0;
    for (u32 slab = 0; slab < width; slab += team.slab()) {
        read_gradient<PIECE>(x, gain, mean, rstd, dy, team, slab, n, g);
#pragma unroll
        for (u32 i = 0; i < HELD; i++) sum_g += g[i], sum_gn = fmaf(g[i], n[i], sum_gn);
    }
    float mean_g = team_sum(team, sum_g) / float(width), mean_gn = team_sum(team, sum_gn) / float(width);
    for (u32 slab = 0; slab < width; slab += team.slab()) {
        if (team.slab() < width) read_gradient<PIECE>(x, gain, mean, rstd, dy, team, slab, n, g);
#pragma unroll
        for (u32 i = 0; i < HELD; i++) n[i] = rstd * (g[i] - mean_g - n[i] * mean_gn);
        if (add) {
            load_slab<PIECE>(reading(dx), team, team.start, slab, g);
#pragma unroll
            for (u32 i = 0; i < HELD; i++) n[i] += g[i];
        }
        store_slab<PIECE>(dx, team, slab, n);
    }
}

// dx (+)= rstd (g - mean(g) - n mean(g n)) with n = (x - mean) rstd and g = gain dy; x, dy and dx [T, D], mean and rstd [T].
KERNEL __launch_bounds__(MOST_THREADS) layer_norm_backward(
    Floats x, Floats gain, const float* means, const float* rstds, Floats dy, u32 add, FloatsMut dx, u64 rows,
    u32 width, u32 threads
) {
    Team team = team_of(threads, rows, width);
    float mean = team.works ? means[team.row] : 0.0f, rstd = team.works ? rstds[team.row] : 0.0f;
    if (width % 4 == 0) backward<4>(x, gain, mean, rstd, dy, add, dx, team);
    else backward<1>(x, gain, mean, rstd, dy, add, dx, team);
}

// ---- gradients of gains and shifts: sums over rows, of chunks of them first --------------------------------------------

// Columns that a lane has, and warps of a block, which take rows in turn; `GRADIENT_COLUMNS` on the other side is a warp's.
constexpr u32 COLUMNS = 4, WARPS = 8;

// This lane's columns of row t of a matrix of `width` columns: from `first` on, `step` apart.
DEVICE void load_columns(Floats x, u64 start, u32 first, u32 step, u32 width, float (&v)[COLUMNS]) {
    if (step == 1) return load4(x, start + first, v);
#pragma unroll
    for (u32 i = 0; i < COLUMNS; i++) v[i] = first + i * step < width ? load(x, start + first + i * step) : 0.0f;
}

// Writes the sum over the block's warps of what their lanes have for their columns.
DEVICE void store_columns(const float (&sums)[COLUMNS], u32 tile, u32 first, u32 step, u32 width, float* out) {
    __shared__ float space[WARPS][COLUMNS * WARP];
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < COLUMNS; i++) space[threadIdx.x / WARP][first + i * step - tile] = sums[i];
    __syncthreads();
    u32 column = tile + threadIdx.x;
    if (threadIdx.x >= COLUMNS * WARP || column >= width) return;
    float sum = 0;
#pragma unroll
    for (u32 warp = 0; warp < WARPS; warp++) sum += space[warp][threadIdx.x];
    out[column] = sum;
}

// Of chunk c = blockIdx.y of the rows: gains[c] = sum of dy n with n = (x - mean) rstd, shifts[c] = sum of dy, where there is a
// place for them; x and dy [T, D], mean (0 where there is none) and rstd [T], gains and shifts [chunks, D].
KERNEL norm_gradient_parts(
    Floats x, const float* means, const float* rstds, Floats dy, u64 rows, u32 width, u32 chunk_rows, float* gains,
    float* shifts
) {
    u32 tile = blockIdx.x * COLUMNS * WARP, step = width % 4 == 0 ? 1 : WARP;
    u32 first = tile + lane_index() * (step == 1 ? COLUMNS : 1);
    float of_gain[COLUMNS] = {}, of_shift[COLUMNS] = {};
    u64 begin = u64(blockIdx.y) * chunk_rows, end = begin + chunk_rows < rows ? begin + chunk_rows : rows;
    for (u64 row = begin + threadIdx.x / WARP; row < end && first < width; row += WARPS) {
        float g[COLUMNS], v[COLUMNS];
        load_columns(dy, row * width, first, step, width, g);
        if (gains) {
            load_columns(x, row * width, first, step, width, v);
            float mean = means ? means[row] : 0.0f, rstd = rstds[row];
#pragma unroll
            for (u32 i = 0; i < COLUMNS; i++) of_gain[i] = fmaf(g[i], (v[i] - mean) * rstd, of_gain[i]);
        }
#pragma unroll
        for (u32 i = 0; i < COLUMNS; i++) of_shift[i] += g[i];
    }
    if (gains) store_columns(of_gain, tile, first, step, width, gains + u64(blockIdx.y) * width);
    if (shifts) store_columns(of_shift, tile, first, step, width, shifts + u64(blockIdx.y) * width);
}

// out [D] += the sum of parts [chunks, D]; a block has a warp's width of columns, and its warps take chunks in turn.
KERNEL norm_gradient(const float* parts, u32 chunks, u32 width, float* out) {
    __shared__ float space[WARPS][WARP];
    u32 column = blockIdx.x * WARP + lane_index(), warp = threadIdx.x / WARP;
    float sum = 0;
    for (u32 chunk = warp; chunk < chunks && column < width; chunk += WARPS) sum += parts[u64(chunk) * width + column];
    space[warp][lane_index()] = sum;
    __syncthreads();
    if (warp > 0 || column >= width) return;
    sum = 0;
#pragma unroll
    for (u32 w = 0; w < WARPS; w++) sum += space[w][lane_index()];
    out[column] += sum;
}
