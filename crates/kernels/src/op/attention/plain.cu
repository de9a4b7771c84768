// Attention with heads larger than any tile: a warp a row or a key, scores taken again wherever they are needed.

#include "cuda/prelude.cuh"
#include "op/attention/plain.cuh"

namespace attention {

// Columns of a result that a warp holds at a time.
constexpr u32 COLUMNS = 256;

template <typename T>
struct Plain {
    // Tiles of as many rows or keys as a block has warps.
    const Item* items;
    // q and do [T, H*E], k and v [S, G*E].
    const T *q, *k, *v, *d_o;
    u32 heads, kv_heads, e, window;
    Scale scale;
};

// One warp's segment and head.
template <typename T>
struct Head {
    Item item;
    u32 kv_head, e;
    Mask mask;
    Scale scale;
    Rows<const T> q, k, v, d_o;
    // The first log-sum-exp of the segment and the group in [T, H].
    u64 first_statistic;
    u32 heads;

    DEVICE Head(const Plain<T>& p) : item(p.items[blockIdx.x / p.kv_heads]), kv_head(blockIdx.x % p.kv_heads), e(p.e) {
        u32 group = p.heads / p.kv_heads;
        mask = mask_of(item, group, p.window), scale = p.scale;
        q = query_rows(p.q, item, p.heads, group, kv_head, e), d_o = query_rows(p.d_o, item, p.heads, group, kv_head, e);
        k = key_rows(p.k, item, p.kv_heads, kv_head, e), v = key_rows(p.v, item, p.kv_heads, kv_head, e);
        first_statistic = u64(item.first_query) * p.heads + kv_head * group, heads = p.heads;
    }

    // The row or key of this warp.
    DEVICE u32 own() const {
        return item.start + threadIdx.x / WARP;
    }
    DEVICE u64 statistic(u32 row) const {
        u32 query = row / mask.group;
        return first_statistic + u64(query) * heads + (row - query * mask.group);
    }
    DEVICE float score(u32 row, u32 key, float& slope) const {
        return score_of(dot(q.at + q.offset(row), k.at + k.offset(key), e), scale, slope);
    }
    // p, and the gradient of the score.
    DEVICE float probability(u32 row, u32 key, const float* lse, const float* delta, float& gradient) const {
        float slope, p = exp2f(score(row, key, slope) - lse[statistic(row)] * LOG2_E);
        gradient = p * slope * (dot(d_o.at + d_o.offset(row), v.at + v.offset(key), e) - delta[statistic(row)]);
        return p;
    }
};

// to = factor times the sum over i of weight(i) line(i).
template <typename T, typename Weight, typename Line>
DEVICE void write_weighted(T* to, float factor, u32 begin, u32 end, u32 e, Weight weight, Line line) {
    for (u32 first = 0; first < e; first += COLUMNS) {
        float sum[COLUMNS / WARP] = {};
        add_weighted(sum, begin, end, e - first, weight, [&](u32 i) { return line(i) + first; });
#pragma unroll
        for (u32 n = 0; n < COLUMNS / WARP; n++) {
            u32 column = first + n * WARP + lane_index();
            if (column < e) store(to + column, sum[n] * factor);
        }
    }
}

template <typename T>
DEVICE void plain_forward(const Plain<T>& p, T* o, float* lse) {
    Head<T> head(p);
    u32 row = head.own();
    if (row >= head.mask.rows()) return;
    u32 begin = head.mask.begin(row), end = head.mask.end(row);
    float max = -INFINITY, sum = 0, slope;
    for (u32 key = begin + lane_index(); key < end; key += WARP) max = fmaxf(max, head.score(row, key, slope));
    max = warp_max(max);
    for (u32 key = begin + lane_index(); key < end; key += WARP) sum += exp2f(head.score(row, key, slope) - max);
    float total = max + log2f(warp_sum(sum));
    if (lane_index() == 0) lse[head.statistic(row)] = total * LN_2;
    Rows<T> out = query_rows(o, head.item, p.heads, head.mask.group, head.kv_head, p.e);
    auto weight = [&](u32 key) { return exp2f(head.score(row, key, slope) - total); };
    auto values = [&](u32 key) { return head.v.at + head.v.offset(key); };
    write_weighted(out.at + out.offset(row), 1, begin, end, p.e, weight, values);
}

template <typename T>
DEVICE void plain_queries(const Plain<T>& p, const float* lse, const float* delta, T* dq, float factor) {
    Head<T> head(p);
    u32 row = head.own();
    if (row >= head.mask.rows()) return;
    Rows<T> out = query_rows(dq, head.item, p.heads, head.mask.group, head.kv_head, p.e);
    auto weight = [&](u32 key) {
        float gradient;
        head.probability(row, key, lse, delta, gradient);
        return gradient;
    };
    write_weighted(out.at + out.offset(row), factor, head.mask.begin(row), head.mask.end(row), p.e, weight,
        [&](u32 key) { return head.k.at + head.k.offset(key); });
}

template <typename T>
DEVICE void plain_keys(const Plain<T>& p, const float* lse, const float* delta, T* dk, T* dv, float factor) {
    Head<T> head(p);
    u32 key = head.own();
    if (key >= head.mask.keys) return;
    u32 begin = head.mask.begin_row(key), end = head.mask.end_row(key);
    float gradient;
    auto probability = [&](u32 row) { return head.probability(row, key, lse, delta, gradient); };
    auto slope = [&](u32 row) { return probability(row), gradient; };
    Rows<T> dk_rows = key_rows(dk, head.item, p.kv_heads, head.kv_head, p.e);
    u64 at = dk_rows.offset(key);
    T* dv_at = key_rows(dv, head.item, p.kv_heads, head.kv_head, p.e).at + at;
    auto queries = [&](u32 row) { return head.q.at + head.q.offset(row); };
    auto gradients = [&](u32 row) { return head.d_o.at + head.d_o.offset(row); };
    write_weighted(dk_rows.at + at, factor, begin, end, p.e, slope, queries);
    write_weighted(dv_at, 1, begin, end, p.e, probability, gradients);
}

}  // namespace attention

using namespace attention;

#define PLAIN(T, type)                                                                                                     \
    KERNEL attention_plain_forward_##type(const Item* items, const T* q, const T* k, const T* v, T* o, float* lse,         \
        u32 heads, u32 kv_heads, u32 e, u32 window, float factor, float bound) {                                           \
        plain_forward<T>({items, q, k, v, q, heads, kv_heads, e, window, {factor, bound}}, o, lse);                        \
    }                                                                                                                      \
    KERNEL attention_plain_queries_##type(const Item* items, const T* q, const T* k, const T* v, const T* d_o,             \
        const float* lse, const float* delta, T* dq, u32 heads, u32 kv_heads, u32 e, u32 window, float factor,             \
        float bound, float scale) {                                                                                        \
        plain_queries<T>({items, q, k, v, d_o, heads, kv_heads, e, window, {factor, bound}}, lse, delta, dq, scale);       \
    }                                                                                                                      \
    KERNEL attention_plain_keys_##type(const Item* items, const T* q, const T* k, const T* v, const T* d_o,                \
        const float* lse, const float* delta, T* dk, T* dv, u32 heads, u32 kv_heads, u32 e, u32 window, float factor,      \
        float bound, float scale) {                                                                                        \
        plain_keys<T>({items, q, k, v, d_o, heads, kv_heads, e, window, {factor, bound}}, lse, delta, dk, dv, scale);      \
    }

PLAIN(float, f32)
PLAIN(bf16, bf16)
