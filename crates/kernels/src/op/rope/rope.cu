// The rotation of queries and keys by their positions.

#include "cuda/prelude.cuh"

// `PIECE` neighbours, from a multiple of `PIECE` on.
template <u32 PIECE>
struct Piece;

template <>
struct Piece<1> {
    float v[1];
    DEVICE void read(Floats x, u64 at) { v[0] = load(x, at); }
    DEVICE void write(FloatsMut x, u64 at) const { store(x, at, v[0]); }
};

template <>
struct Piece<4> {
    float v[4];
    DEVICE void read(Floats x, u64 at) { load4(x, at, v); }
    DEVICE void write(FloatsMut x, u64 at) const { store4(x, at, v); }
};

// Of bf16.
template <>
struct Piece<8> {
    float v[8];
    DEVICE void read(Floats x, u64 at) {
        uint4 words = static_cast<const uint4*>(x.at)[at / 8];
        v[0] = low_half(words.x), v[1] = high_half(words.x), v[2] = low_half(words.y), v[3] = high_half(words.y);
        v[4] = low_half(words.z), v[5] = high_half(words.z), v[6] = low_half(words.w), v[7] = high_half(words.w);
    }
    DEVICE void write(FloatsMut x, u64 at) const {
        uint4 words = make_uint4(narrow2(v[0], v[1]), narrow2(v[2], v[3]), narrow2(v[4], v[5]), narrow2(v[6], v[7]));
        static_cast<uint4*>(x.at)[at / 8] = words;
    }
};

// Angles, f32.
template <u32 PIECE>
DEVICE void read_angles(const float* table, u64 at, float (&v)[PIECE]) {
    if constexpr (PIECE == 1) {
        v[0] = table[at];
    } else {
#pragma unroll
        for (u32 i = 0; i < PIECE; i += 4) {
            float4 four = reinterpret_cast<const float4*>(table)[(at + i) / 4];
            v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
        }
    }
}

// Turns the heads of `tokens` tokens from the block's first on; a thread turns `PIECE` pairs at a time.
template <u32 PIECE>
DEVICE void turn(
    const float* cos, const float* sin, const u32* positions, FloatsMut x, u64 t, u32 heads, u32 head_size, u32 half,
    u32 tokens, float direction
) {
    u32 of_head = half / PIECE, of_token = heads * of_head;
    u64 first = u64(blockIdx.x) * tokens;
    u32 here = t - first < tokens ? u32(t - first) : tokens;
    for (u32 item = threadIdx.x; item < here * of_token; item += blockDim.x) {
        u32 token = item / of_token, in_token = item % of_token;
        u32 head = in_token / of_head, place = in_token % of_head * PIECE;
        u64 real = ((first + token) * heads + head) * head_size + place, imaginary = real + half;
        Piece<PIECE> x1, x2;
        x1.read(reading(x), real);
        x2.read(reading(x), imaginary);
        u64 angle = u64(positions[first + token]) * half + place;
        float c[PIECE], s[PIECE];
        read_angles(cos, angle, c);
        read_angles(sin, angle, s);
#pragma unroll
        for (u32 i = 0; i < PIECE; i++) {
            float a = x1.v[i], b = x2.v[i], turned = s[i] * direction;
            x1.v[i] = fmaf(a, c[i], -b * turned);
            x2.v[i] = fmaf(b, c[i], a * turned);
        }
        x1.write(x, real);
        x2.write(x, imaginary);
    }
}

// (x1, x2) = (x1 cos - x2 sin, x2 cos + x1 sin), sin times `direction`, for the first two `half` elements of each head of
// x [T, H*E]; cos and sin [P, half], positions [T]. `piece` is 1, 4, or 8 of bf16.
KERNEL rope(
    const float* cos, const float* sin, const u32* positions, FloatsMut x, u64 t, u32 heads, u32 head_size, u32 half,
    u32 tokens, float direction, u32 piece
) {
    if (piece == 8) turn<8>(cos, sin, positions, x, t, heads, head_size, half, tokens, direction);
    else if (piece == 4) turn<4>(cos, sin, positions, x, t, heads, head_size, half, tokens, direction);
    else turn<1>(cos, sin, positions, x, t, heads, head_size, half, tokens, direction);
}
