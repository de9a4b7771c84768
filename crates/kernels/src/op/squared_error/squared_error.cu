// The squared error of predictions: one number per example, so one block.

#include "cuda/prelude.cuh"

// loss = sum_i w_i (z_i - t_i)^2, and z_i becomes 2 w_i (z_i - t_i)
KERNEL squared_error(float* z, const float* targets, const float* weights, u64 count, double* loss) {
    __shared__ double space[WARP];
    double sum = 0;
    for (u64 i = threadIdx.x; i < count; i += blockDim.x) {
        // The difference is exact in f64: its rounding would be squared into the loss.
        double error = double(z[i]) - double(targets[i]);
        sum += double(weights[i]) * error * error;
        z[i] = 2.0f * weights[i] * float(error);
    }
    sum = block_sum(sum, space);
    if (threadIdx.x == 0) *loss = sum;
}
