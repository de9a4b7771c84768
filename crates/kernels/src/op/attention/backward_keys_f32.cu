// Attention backward, gradients of keys and values with f32 operands.

#include "cuda/prelude.cuh"
#include "op/attention/backward_keys.cuh"

using namespace attention;

KEYS(attention_keys_f32_64, float, 64, 1, 32, true)
KEYS(attention_keys_f32_128, float, 128, 1, 32, true)
KEYS(attention_keys_f32_256, float, 256, 1, 16, false)
