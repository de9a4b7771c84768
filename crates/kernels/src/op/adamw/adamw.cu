// AdamW, in the specification's order of operations: the same bits.

#include "cuda/elements.cuh"

// What the numbers of a step come to for every element; `Factors` on the other side of the launch.
//   p = p decay - rate m' / (sqrt(v') / correction2 + epsilon)
//   m' = m first_kept + g first_taken        v' = v second_kept + g^2 second_taken
KERNEL adamw(float gradient, float first_kept, float first_taken, float second_kept, float second_taken, float decay,
             float rate, float correction2, float epsilon, float* g, float* p, float* m, float* v, u64 count) {
    auto update = [=](float g, float& p, float& m, float& v) {
        g = __fmul_rn(g, gradient);
        m = __fadd_rn(__fmul_rn(m, first_kept), __fmul_rn(g, first_taken));
        v = __fadd_rn(__fmul_rn(v, second_kept), __fmul_rn(__fmul_rn(g, g), second_taken));
        float divisor = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), correction2), epsilon);
        p = __fsub_rn(__fmul_rn(p, decay), __fdiv_rn(__fmul_rn(rate, m), divisor));
    };
    apply(count, update, Floats{g, F32, 0}, FloatsMut{p, F32, 0}, FloatsMut{m, F32, 0}, FloatsMut{v, F32, 0});
}
