// Sums and minima over a warp and over a block, in an order that never changes.
#pragma once

#include "device.cuh"

namespace liar::cuda {

LIAR_DEVICE double warp_sum(double x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// Every thread gets the sum. `scratch` holds one double per warp and may be used again at once.
LIAR_DEVICE double block_sum(double x, double* scratch) {
  x = warp_sum(x);
  __syncthreads();  // the last user of scratch is done
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) sum += scratch[w];
  return sum;
}

LIAR_DEVICE bool is_finite(double x) { return x - x == 0; }

}  // namespace liar::cuda
