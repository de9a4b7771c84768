// Gated activations.

#include "op/activation/activation.cuh"

template <typename F>
struct GatedForward {
    DEVICE void operator()(float gate, float up, float& h) const {
        h = F::at(gate).value * up;
    }
};

// h = f(gate) up
KERNEL gated_activation(u32 code, Floats gate, Floats up, FloatsMut h, u64 count) {
    apply(count, ByActivation<GatedForward>{code}, gate, up, Written{h});
}

template <typename F>
struct GatedBackward {
    DEVICE void operator()(float& gate, float& up, float dh) const {
        ValueAndSlope f = F::at(gate);
        gate = dh * up * f.slope;
        up = dh * f.value;
    }
};

// dgate = dh up f'(gate), over gate; dup = dh f(gate), over up
KERNEL gated_activation_backward(u32 code, FloatsMut gate, FloatsMut up, Floats dh, u64 count) {
    apply(count, ByActivation<GatedBackward>{code}, gate, up, dh);
}
