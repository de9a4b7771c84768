// Attention backward, gradients of queries with f32 operands.

#include "cuda/prelude.cuh"
#include "op/attention/backward_queries.cuh"

using namespace attention;

QUERIES(attention_queries_f32_64, float, 64, 1, 32, 1)
QUERIES(attention_queries_f32_128, float, 128, 1, 32, 1)
QUERIES(attention_queries_f32_256, float, 256, 1, 16, 1)
