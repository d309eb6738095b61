// Scores of units without elimination: unit_energy and fisher_update_.
#pragma once

#include "block.cuh"
#include "product.cuh"
#include "workspace.cuh"

namespace liar::cuda {

constexpr unsigned kScoreThreads = 256;

struct ScoreShared {
  double scratch[kScoreThreads / kWarp];
};

// unit_energy: tr(W_u G_uu W_uᵀ) = ⟨G_uu, W_uᵀW_u⟩. The products W_uᵀW_u of all units are one call
// of the main loop, so that each weight is read once; units of width 1 have no product to make.

struct Energy {
  std::int64_t d = 0, d_out = 0, width = 1;
  const double* weight = nullptr;  // d_out × d
  std::int64_t weight_stride = 0;
  const double* gram = nullptr;  // d × d, lower triangle
  std::int64_t gram_stride = 0;
  double* energy = nullptr;  // d / width
  double* square = nullptr;  // units × width × width: W_uᵀW_u, lower triangle
  int most_batches = 65535;  // see ProductParams
};

// Width 1: a thread per feature, so that a warp reads neighbours.
static __global__ void energy_of_features_kernel(const Energy q) {
  const std::int64_t j = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= q.d) return;
  double sum = 0;
#pragma unroll 8
  for (std::int64_t o = 0; o < q.d_out; ++o) {
    const double w = q.weight[o * q.weight_stride + j];
    sum += w * w;
  }
  q.energy[j] = sum * q.gram[j * q.gram_stride + j];
}

// One block per unit.
static __global__ void energy_of_units_kernel(const Energy q) {
  auto& shared = shared_memory<ScoreShared>();
  const double* gram = q.gram + blockIdx.x * q.width * (q.gram_stride + 1);
  const double* square = q.square + blockIdx.x * q.width * q.width;
  double sum = 0;
  for (std::int64_t i = threadIdx.x / kWarp; i < q.width; i += kScoreThreads / kWarp)
    for (std::int64_t j = threadIdx.x % kWarp; j <= i; j += kWarp)
      sum += (i == j ? 1 : 2) * gram[i * q.gram_stride + j] * square[i * q.width + j];
  sum = block_sum(sum, shared.scratch);
  if (threadIdx.x == 0) q.energy[blockIdx.x] = sum;
}

// Returns the bytes of workspace; with a workspace, launches.
inline std::int64_t unit_energy(Energy q, void* memory, Stream& stream) {
  Workspace workspace(memory);
  const std::int64_t units = q.d / q.width;
  q.square = workspace.take<double>(q.width > 1 ? q.d * q.width : 1);
  if (!memory) return workspace.bytes();
  if (q.width == 1) {
    const auto blocks = static_cast<unsigned>(divide_up(q.d, kScoreThreads));
    launch(energy_of_features_kernel, {blocks, 1, 1}, kScoreThreads, 0, stream, q);
    return workspace.bytes();
  }
  ProductParams<double> p;
  p.a = {q.weight, q.weight_stride, q.width, q.width};
  p.depth = q.d_out;
  p.out = q.square;
  p.out_stride = q.width;
  p.out_batch = q.width * q.width;
  p.accumulate = false;
  p.batches = static_cast<int>(units);
  p.most_batches = q.most_batches;
  product<MmaF64<false>>(p, stream);
  launch(energy_of_units_kernel, {static_cast<unsigned>(units), 1, 1}, kScoreThreads,
         sizeof(ScoreShared), stream, q);
  return workspace.bytes();
}

// fisher_update_: fisher_u += Σ_s (Σ_t Σ_{j∈u} x_stj g_stj)². Sums over tokens come first, feature
// by feature, so that a warp reads neighbours whatever the width.

template <class T>
struct Fisher {
  const T *x = nullptr, *grad = nullptr;  // sequences × tokens × d
  std::int64_t x_sequence = 0, x_stride = 0, grad_sequence = 0, grad_stride = 0;
  std::int64_t sequences = 0, tokens = 0, d = 0, width = 1;
  double* fisher = nullptr;  // d / width
  double* sums = nullptr;    // sequences × d
};

template <class T>
__global__ void mask_gradient_kernel(const Fisher<T> q) {
  const std::int64_t j = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= q.d) return;
  for (std::int64_t s = blockIdx.y; s < q.sequences; s += gridDim.y) {
    const T *x = q.x + s * q.x_sequence + j, *grad = q.grad + s * q.grad_sequence + j;
    double sum = 0;
#pragma unroll 4
    for (std::int64_t t = 0; t < q.tokens; ++t)
      sum += to_double(x[t * q.x_stride]) * to_double(grad[t * q.grad_stride]);
    q.sums[s * q.d + j] = sum;
  }
}

// One warp a unit.
template <class T>
__global__ void fisher_kernel(const Fisher<T> q) {
  const std::int64_t unit = std::int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (unit >= q.d / q.width) return;
  double squares = 0;
  for (std::int64_t s = 0; s < q.sequences; ++s) {
    double sum = 0;
    for (std::int64_t j = threadIdx.x % kWarp; j < q.width; j += kWarp)
      sum += q.sums[s * q.d + unit * q.width + j];
    sum = warp_sum(sum);
    squares += sum * sum;
  }
  if (threadIdx.x % kWarp == 0) q.fisher[unit] += squares;
}

// Returns the bytes of workspace; with a workspace, launches.
template <class T>
std::int64_t fisher_update(Fisher<T> q, void* memory, Stream& stream) {
  Workspace workspace(memory);
  q.sums = workspace.take<double>(q.sequences * q.d);
  if (!memory || q.sequences == 0) return workspace.bytes();
  const auto spans = static_cast<unsigned>(divide_up(q.d, kScoreThreads));
  const auto rows = static_cast<unsigned>(smaller<std::int64_t>(q.sequences, 65535));
  launch(mask_gradient_kernel<T>, {spans, rows, 1}, kScoreThreads, 0, stream, q);
  const std::int64_t blocks = divide_up(q.d / q.width, kScoreThreads / kWarp);
  launch(fisher_kernel<T>, {static_cast<unsigned>(blocks), 1, 1}, kScoreThreads, 0, stream, q);
  return workspace.bytes();
}

}  // namespace liar::cuda
