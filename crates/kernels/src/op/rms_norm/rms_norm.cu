// Root mean square normalisation of rows, and its gradient with respect to them.

#include "cuda/row.cuh"

template <u32 PIECE>
DEVICE void forward(
    Floats f, FloatsMut x, Floats gain, float offset, float eps, FloatsMut y, float* rstd, Team team
) {
    u32 width = team.width;
    float v[HELD], sum = 0;
    for (u32 slab = 0; slab < width; slab += team.slab()) {
        load_sum<PIECE>(f, x, team, slab, v);
#pragma unroll
        for (u32 i = 0; i < HELD; i++) sum = fmaf(v[i], v[i], sum);
    }
    float scale = 1.0f / sqrtf(team_sum(team, sum) / float(width) + eps);
    if (team.works && team.rank == 0) rstd[team.row] = scale;
    for (u32 slab = 0; slab < width; slab += team.slab()) {
        float g[HELD];
        load_slab<PIECE>(gain, team, 0, slab, g);
        if (team.slab() < width) load_slab<PIECE>(reading(x), team, team.start, slab, v);
#pragma unroll
        for (u32 i = 0; i < HELD; i++) v[i] = (offset + g[i]) * (v[i] * scale);
        store_slab<PIECE>(y, team, slab, v);
    }
}

// y = (offset + gain) x rstd and rstd of x [T, D]; with f [T, D], x becomes x + f first.
KERNEL __launch_bounds__(MOST_THREADS, 2) rms_norm(
    Floats f, FloatsMut x, Floats gain, float offset, float eps, FloatsMut y, float* rstd, u64 rows, u32 width,
    u32 threads
) {
    Team team = team_of(threads, rows, width);
    if (width % 4 == 0) forward<4>(f, x, gain, offset, eps, y, rstd, team);
    else forward<1>(f, x, gain, offset, eps, y, rstd, team);
}

// What the gradient of a row is computed from: g = (offset + gain) dy, and x.
template <u32 PIECE>
DEVICE void read_gradient(
    Floats x, Floats gain, float offset, Floats dy, Team team, u32 slab, float (&v)[HELD], float (&g)[HELD]
) {
    Stored xs = fetch<PIECE>(x, team, team.start, slab), gradients = fetch<PIECE>(dy, team, team.start, slab);
    widen<PIECE>(x.type, xs, v);
    widen<PIECE>(dy.type, gradients, g);
    float factor[HELD];
    load_slab<PIECE>(gain, team, 0, slab, factor);
#pragma unroll
    for (u32 i = 0; i < HELD; i++) g[i] *= offset + factor[i];
}

template <u32 PIECE>
DEVICE void backward(
    Floats x, Floats gain, float offset, const float* rstds, Floats dy, u32 add, FloatsMut dx, Team team
) {
    u32 width = team.width;
    float v[HELD], g[HELD], sum = 0;
    for (u32 slab = 0; slab < width; slab += team.slab()) {
        read_gradient<PIECE>(x, gain, offset, dy, team, slab, v, g);
#pragma unroll
        for (u32 i = 0; i < HELD; i++) sum = fmaf(g[i], v[i], sum);
    }
    float rstd = team.works ? rstds[team.row] : 0.0f, mean = team_sum(team, sum) * rstd / float(width);
    for (u32 slab = 0; slab < width; slab += team.slab()) {
        if (team.slab() < width) read_gradient<PIECE>(x, gain, offset, dy, team, slab, v, g);
#pragma unroll
        for (u32 i = 0; i < HELD; i++) v[i] = rstd * (g[i] - v[i] * rstd * mean);
        if (add) {
            load_slab<PIECE>(reading(dx), team, team.start, slab, g);
#pragma unroll
            for (u32 i = 0; i < HELD; i++) v[i] += g[i];
        }
        store_slab<PIECE>(dx, team, slab, v);
    }
}

// dx (+)= rstd (g - n mean(g n)) with n = x rstd and g = (offset + gain) dy; x, dy and dx [T, D], rstd [T].
KERNEL __launch_bounds__(MOST_THREADS) rms_norm_backward(
    Floats x, Floats gain, float offset, const float* rstd, Floats dy, u32 add, FloatsMut dx, u64 rows, u32 width,
    u32 threads
) {
    Team team = team_of(threads, rows, width);
    if (width % 4 == 0) backward<4>(x, gain, offset, rstd, dy, add, dx, team);
    else backward<1>(x, gain, offset, rstd, dy, add, dx, team);
}
