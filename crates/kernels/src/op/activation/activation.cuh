// The activations' formulas for one element: the value and the slope; what is not used is not computed.
//
// They are those of the processor (cpu.rs beside this), where the errors are stated.

#pragma once

#include "cuda/elements.cuh"

struct ValueAndSlope {
    float value, slope;
};

struct Silu {
    static DEVICE ValueAndSlope at(float z) {
        float s = 1.0f / (1.0f + expf(-z));
        return {z * s, s * (1.0f + z * (1.0f - s))};
    }
};

// `Q(a) / exp(-a^2 / 2)` for `a >= 0`, where Q is the normal distribution's upper tail.
DEVICE float normal_tail_ratio(float a) {
    float t = 1.0f / fmaf(a, 0.34375f, 1.0f);
    float p = fmaf(t, -0.027538534f, 0.14260283f);
    p = fmaf(p, t, -0.26928905f);
    p = fmaf(p, t, 0.1883241f);
    p = fmaf(p, t, -0.037638683f);
    p = fmaf(p, t, 0.11200165f);
    p = fmaf(p, t, 0.11689433f);
    p = fmaf(p, t, 0.13752267f);
    p = fmaf(p, t, 0.13712071f);
    return p * t;
}

struct Gelu {
    static DEVICE ValueAndSlope at(float z) {
        constexpr float INVERSE_SQRT_2_PI = 0.3989423f;
        float a = fabsf(z), bell = expf(-0.5f * a * a), tail = bell * normal_tail_ratio(a);
        float phi = z < 0.0f ? tail : 1.0f - tail;
        return {z * phi, fmaf(z * INVERSE_SQRT_2_PI, bell, phi)};
    }
};

// With `(1 + tanh u) / 2 = sigmoid(2 u)`; the exponential function is taken of the negative side.
struct GeluTanh {
    static DEVICE ValueAndSlope at(float z) {
        // 2 sqrt(2 / pi), and the same times 0.044715.
        constexpr float LINEAR = 1.595769f, CUBIC = 0.07135482f;
        float square = z * z, twice_u = z * fmaf(square, CUBIC, LINEAR);
        float e = expf(-fabsf(twice_u)), large = 1.0f / (1.0f + e);
        float s = twice_u < 0.0f ? e * large : large;
        float slope = e * large * large * fmaf(square, 3.0f * CUBIC, LINEAR);
        return {z * s, fmaf(z, slope, s)};
    }
};

struct Tanh {
    static DEVICE ValueAndSlope at(float z) {
        float y = tanhf(z);
        return {y, fmaf(-y, y, 1.0f)};
    }
};

// For `apply`: the work of the activation of a number, which is asked for once every four elements. The numbers are those of
// `Activation::code` on the other side of the launch.
template <template <typename> class Work>
struct ByActivation {
    u32 code;
};

template <template <typename> class Work, typename... Values>
DEVICE void on_four(ByActivation<Work> work, Values&... v) {
    switch (work.code) {
        case 0: return on_four(Work<Silu>{}, v...);
        case 1: return on_four(Work<Gelu>{}, v...);
        case 2: return on_four(Work<GeluTanh>{}, v...);
        default: return on_four(Work<Tanh>{}, v...);
    }
}
