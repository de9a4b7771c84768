// Attention forward with f32 operands: apart from bf16, so that no GPU compiles what it does not run.

#include "cuda/prelude.cuh"
#include "op/attention/forward.cuh"

using namespace attention;

FORWARD(attention_forward_f32_64, float, 64, 1, 32)
FORWARD(attention_forward_f32_128, float, 128, 1, 32)
FORWARD(attention_forward_f32_256, float, 256, 1, 16)
