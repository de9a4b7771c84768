// The softmax of the loss: blocks of logits with running maximum and sum, and gradients from them.
//
// Logits z are f32. A row of a block of them is held in registers by a team of threads, so what becomes of it is written where
// it stood, as bf16 too: a row then takes the first half of its own place.

#include "cuda/row.cuh"

// What is known of a row's logits after some blocks of them.
struct Seen {
    // The largest, and the sum of exp(z - max).
    float max, total;
    // The logit of the label, and the row's weight.
    float labelled, weight;
};

// The logits of a slab, -inf behind the row's end; `cap` bounds them where it is not 0.
template <u32 PIECE>
DEVICE void load_logits(const float* z, Team team, u32 slab, float cap, float (&v)[HELD]) {
    load_slab<PIECE>(Floats{z, F32, 0}, team, team.start, slab, v);
#pragma unroll
    for (u32 i = 0; i < HELD; i++) {
        if (cap != 0) v[i] = cap * tanhf(v[i] / cap);
        if (team.column<PIECE>(slab, i / PIECE) + i % PIECE >= team.width) v[i] = -INFINITY;
    }
}

DEVICE float largest(const float (&v)[HELD]) {
    float max = v[0];
#pragma unroll
    for (u32 i = 1; i < HELD; i++) max = larger(max, v[i]);
    return max;
}

// The derivative of the cap at a capped logit; 1 without one.
DEVICE float slope(float z, float cap) {
    if (cap == 0) return 1;
    float t = z / cap;
    return 1 - t * t;
}

// x times that derivative; 0 stays 0 where a row has no logit.
DEVICE float times_slope(float x, float z, float cap) {
    return x == 0 ? 0 : x * slope(z, cap);
}

// No column of a block.
constexpr u32 NONE = 0xffffffffu;

// The same row where z is written in another type.
DEVICE Team of_type(Team team, u32 type) {
    if (type == BF16) team.start *= 2;
    return team;
}

// ---- a block of the vocabulary ----------------------------------------------------------------------------------------

// Takes note of the logits z [N, columns] of the words from `first` on, whose rows begin `stride` apart: at most a slab. Where
// there is a p, which is z's place, z becomes exp(z - max) in p's type, times the cap's derivative; and `sums` [N, D], where
// something is in them, are scaled to the new maximum.
KERNEL __launch_bounds__(MOST_THREADS, 2) loss_block(
    const float* z, u32 stride, u32 columns, u32 first, const u32* labels, const float* weights, float cap, Seen* seen,
    FloatsMut p, float* sums, u32 d, u64 rows, u32 threads
) {
    Team team = team_of(threads, rows, columns);
    team.start = u64(team.row) * stride;
    Seen before{-INFINITY, 0, 0, 0};
    u32 label = NONE;
    if (team.works) {
        label = labels[team.row] - first;
        if (first > 0) before = seen[team.row];
    }
    float v[HELD];
    load_logits<4>(z, team, 0, cap, v);
    float max = larger(before.max, team_max(team, largest(v))), rescale = expf(before.max - max), sum = 0;
#pragma unroll
    for (u32 i = 0; i < HELD; i++) {
        if (team.column<4>(0, i / 4) + i % 4 == label) seen[team.row].labelled = v[i];
        float e = expf(v[i] - max);
        sum += e;
        v[i] = times_slope(e, v[i], cap);
    }
    if (p.at) store_slab<4>(p, of_type(team, p.type), 0, v);
    sum = team_sum(team, sum);
    if (team.works && team.rank == 0) {
        seen[team.row].max = max;
        seen[team.row].total = fmaf(before.total, rescale, sum);
        if (first == 0) seen[team.row].weight = weights[team.row];
    }
    if (!sums || first == 0 || !team.works || rescale == 1) return;
    for (u32 i = team.rank; i < d; i += team.size) sums[u64(team.row) * d + i] *= rescale;
}

// The logits z of such a block, once more, become weight (softmax(z) - [label]), times the cap's derivative, in p's type.
KERNEL __launch_bounds__(MOST_THREADS) loss_gradient_block(
    const float* z, u32 stride, u32 columns, u32 first, const u32* labels, float cap, const Seen* seen, FloatsMut p,
    u64 rows, u32 threads
) {
    Team team = team_of(threads, rows, columns);
    team.start = u64(team.row) * stride;
    Seen row{0, 1, 0, 0};
    u32 label = NONE;
    if (team.works) row = seen[team.row], label = labels[team.row] - first;
    float v[HELD], factor = row.weight / row.total;
    load_logits<4>(z, team, 0, cap, v);
    // Nobody writes before all have read.
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < HELD; i++) {
        bool labelled = team.column<4>(0, i / 4) + i % 4 == label;
        v[i] = times_slope(factor * expf(v[i] - row.max) - (labelled ? row.weight : 0), v[i], cap);
    }
    store_slab<4>(p, of_type(team, p.type), 0, v);
}

// ---- the gradient of x -------------------------------------------------------------------------------------------------

template <u32 PIECE>
DEVICE void input_gradient(
    const float* sums, Floats w, u32 label, Seen seen, float cap, u32 rounded, FloatsMut dx, Team team
) {
    float factor = seen.weight / seen.total, of_label = -seen.weight * slope(seen.labelled, cap);
    for (u32 slab = 0; slab < team.width; slab += team.slab()) {
        float v[HELD], row[HELD];
        load_slab<PIECE>(Floats{sums, F32, 0}, team, team.start, slab, v);
        load_slab<PIECE>(w, team, u64(label) * team.width, slab, row);
#pragma unroll
        for (u32 i = 0; i < HELD; i++) {
            if (rounded) row[i] = wide(narrow(row[i]));
            v[i] = fmaf(of_label, row[i], v[i] * factor);
        }
        store_slab<PIECE>(dx, team, slab, v);
    }
}

// dx = weight (sums / total - w[label]) from the sums [N, D] of exp(z - max) w, the second part times the cap's derivative;
// dx [N, D], which may be `sums`, w [V, D], whose elements are rounded to bf16 first where `rounded`.
KERNEL __launch_bounds__(MOST_THREADS) loss_input_gradient(
    const float* sums, Floats w, const u32* labels, const Seen* seen, float cap, u32 rounded, FloatsMut dx, u64 rows,
    u32 d, u32 threads
) {
    Team team = team_of(threads, rows, d);
    if (!team.works) return;
    if (d % 4 == 0) input_gradient<4>(sums, w, labels[team.row], seen[team.row], cap, rounded, dx, team);
    else input_gradient<1>(sums, w, labels[team.row], seen[team.row], cap, rounded, dx, team);
}

// ---- logits at hand ----------------------------------------------------------------------------------------------------

template <u32 PIECE>
DEVICE void softmax(float* z, u32 label, float weight, Seen* seen, Team team) {
    float v[HELD], max = -INFINITY, sum = 0;
    for (u32 slab = 0; slab < team.width; slab += team.slab()) {
        load_logits<PIECE>(z, team, slab, 0, v);
        max = larger(max, largest(v));
    }
    max = team_max(team, max);
    for (u32 slab = 0; slab < team.width; slab += team.slab()) {
        if (team.slab() < team.width) load_logits<PIECE>(z, team, slab, 0, v);
#pragma unroll
        for (u32 i = 0; i < HELD; i++) {
            if (team.column<PIECE>(slab, i / PIECE) + i % PIECE == label) seen->labelled = v[i];
            sum += expf(v[i] - max);
        }
    }
    sum = team_sum(team, sum);
    if (team.works && team.rank == 0) seen->max = max, seen->total = sum, seen->weight = weight;
    float factor = weight / sum;
    for (u32 slab = 0; slab < team.width; slab += team.slab()) {
        if (team.slab() < team.width) load_logits<PIECE>(z, team, slab, 0, v);
#pragma unroll
        for (u32 i = 0; i < HELD; i++) {
            bool labelled = team.column<PIECE>(slab, i / PIECE) + i % PIECE == label;
            v[i] = factor * expf(v[i] - max) - (labelled ? weight : 0);
        }
        store_slab<PIECE>(FloatsMut{z, F32, 0}, team, slab, v);
    }
}

// z [N, C] becomes weight (softmax(z) - [label]).
KERNEL __launch_bounds__(MOST_THREADS) loss_of_logits(
    float* z, const u32* labels, const float* weights, Seen* seen, u64 rows, u32 classes, u32 threads
) {
    Team team = team_of(threads, rows, classes);
    u32 label = team.works ? labels[team.row] : NONE;
    float weight = team.works ? weights[team.row] : 0;
    if (classes % 4 == 0) softmax<4>(z, label, weight, seen + team.row, team);
    else softmax<1>(z, label, weight, seen + team.row, team);
}
