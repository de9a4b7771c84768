// Activations without a gate.

#include "op/activation/activation.cuh"

template <typename F>
struct Forward {
    DEVICE void operator()(float x, float& y) const {
        y = F::at(x).value;
    }
};

// y = f(x)
KERNEL activation(u32 code, Floats x, FloatsMut y, u64 count) {
    apply(count, ByActivation<Forward>{code}, x, Written{y});
}

template <typename F>
struct Backward {
    DEVICE void operator()(float& x, float dy) const {
        x = dy * F::at(x).slope;
    }
};

// dx = dy f'(x), over x
KERNEL activation_backward(u32 code, FloatsMut x, Floats dy, u64 count) {
    apply(count, ByActivation<Backward>{code}, x, dy);
}
