// gram_update_: gram += Xᵀ diag(w) (Y or X), total += Xᵀ w, count += [Σ w, rows dropped].
//
//   scan_rows ──▶ weight of each row: 0 if skipped, -1 if dropped
//   compact   ──▶ list of the rows that count, their weights, and `count`
//   product   ──▶ gram, total                        (product.cuh; rows not listed are never read)
//
// A row counts only if all of it is within a limit, which no tile of columns can see: hence one
// pass over X before the product. It reads d elements a token where the product's tiles read
// d²/128: at d = 4096 one part in 33 of the loads.
#pragma once

#include "../calls.h"
#include "block.cuh"
#include "product.cuh"
#include "workspace.cuh"

namespace liar::cuda {

template <class T>
struct RowListParams {
  GramCall call;
  Operand<T> x, y;     // no y: the lower triangle of XᵀX
  double* row_weight;  // tokens: 0 skipped, -1 dropped
  std::int64_t* rows;  // tokens: the rows that count, in order
  double* weights;     // tokens: their weights
  std::int64_t* row_count;
};

LIAR_DEVICE double weight_of(const GramCall& call, std::int64_t row) {
  switch (call.weights) {
    case Weights::kBool:
      return static_cast<const unsigned char*>(call.weight)[row] ? 1 : 0;
    case Weights::kFloat32:
      return static_cast<const float*>(call.weight)[row];
    case Weights::kFloat64:
      return static_cast<const double*>(call.weight)[row];
    default:
      return 1;
  }
}

// Sizes are compared in float32, but for those of float64. A NaN is within nothing.
template <class T>
struct Size {
  using Type = float;
  LIAR_DEVICE static float of(T x) { return fabsf(to_float(x)); }
};
template <>
struct Size<double> {
  using Type = double;
  LIAR_DEVICE static double of(double x) { return fabs(x); }
};

template <class T>
LIAR_DEVICE bool row_is_within(const Operand<T>& x, std::int64_t row, double largest,
                               unsigned lane) {
  const auto limit = static_cast<typename Size<T>::Type>(largest);
  constexpr std::int64_t kElements = 16 / sizeof(T);
  const T* p = x.data + row * x.stride;
  bool within = true;
  std::int64_t done = 0;
  if (reinterpret_cast<std::uintptr_t>(p) % 16 == 0) {
    done = x.columns / kElements * kElements;
#pragma unroll 4
    for (std::int64_t i = lane * kElements; i < done; i += kWarp * kElements) {
      std::uint32_t words[4];
      T element[kElements];
      load_16_bytes(words, p + i);
      memcpy(element, words, 16);
#pragma unroll
      for (int e = 0; e < kElements; ++e) within &= Size<T>::of(element[e]) <= limit;
    }
  }
  for (std::int64_t i = done + lane; i < x.columns; i += kWarp)
    within &= Size<T>::of(p[i]) <= limit;
  return !__any_sync(kAllLanes, !within);
}

// One warp a row.
template <class T>
__global__ void scan_rows_kernel(const RowListParams<T> p) {
  const unsigned lane = threadIdx.x % kWarp;
  const std::int64_t step = std::int64_t(gridDim.x) * (blockDim.x / kWarp);
  for (std::int64_t row = std::int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
       row < p.call.tokens; row += step) {
    double weight = weight_of(p.call, row);
    if (weight != 0) {  // uniform in the warp; a row of weight 0 may hold anything
      bool good = weight > 0 && weight <= p.call.limit;
      if (good) good = row_is_within(p.x, row, p.call.limit / larger(1.0, weight), lane);
      if (good && p.y.data) good = row_is_within(p.y, row, p.call.limit, lane);
      if (!good) weight = -1;
    }
    if (lane == 0) p.row_weight[row] = weight;
  }
}

constexpr int kCompactThreads = 512, kCompactRows = 8;  // 4096 rows a turn

struct CompactShared {
  std::int64_t warp_rows[kCompactThreads / kWarp];
  double sums[kCompactThreads / kWarp];
};

// One block lists the rows in order: a prefix sum over threads that hold eight rows each.
template <class T>
__global__ void __launch_bounds__(kCompactThreads) compact_kernel(const RowListParams<T> p) {
  auto& shared = shared_memory<CompactShared>();
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  std::int64_t base = 0;
  double weight_sum = 0, dropped = 0;
  for (std::int64_t start = 0; start < p.call.tokens; start += kCompactThreads * kCompactRows) {
    const std::int64_t mine = start + threadIdx.x * kCompactRows;
    std::int64_t kept = 0;
    for (int i = 0; i < kCompactRows; ++i) {
      const double w = mine + i < p.call.tokens ? p.row_weight[mine + i] : 0;
      kept += w > 0;
      dropped += w < 0;
      weight_sum += w > 0 ? w : 0;
    }
    std::int64_t before = kept;  // inclusive prefix within the warp
#pragma unroll
    for (int delta = 1; delta < int(kWarp); delta *= 2) {
      const std::int64_t other = __shfl_up_sync(kAllLanes, before, delta);
      if (int(lane) >= delta) before += other;
    }
    if (lane == kWarp - 1) shared.warp_rows[warp] = before;
    __syncthreads();
    std::int64_t place = base + before - kept;
    for (unsigned w = 0; w < kCompactThreads / kWarp; ++w) {
      if (w < warp) place += shared.warp_rows[w];
      base += shared.warp_rows[w];
    }
    for (int i = 0; i < kCompactRows; ++i) {
      const double w = mine + i < p.call.tokens ? p.row_weight[mine + i] : 0;
      if (w > 0) {
        p.rows[place] = mine + i;
        p.weights[place++] = w;
      }
    }
    __syncthreads();  // warp_rows is free for the next turn
  }
  weight_sum = block_sum(weight_sum, shared.sums);
  dropped = block_sum(dropped, shared.sums);
  if (threadIdx.x == 0) {
    *p.row_count = base;
    p.call.count[0] += weight_sum;
    p.call.count[1] += dropped;
  }
}

// 16-bit rows that are either in or out need no products with weights.
template <class T>
struct GramMma {
  using Plain = MmaHalf<T>;
  using Weighted = MmaTf32<T>;
};
template <>
struct GramMma<float> {
  using Plain = MmaTf32<float>;
  using Weighted = MmaTf32<float>;
};
template <>
struct GramMma<double> {
  using Plain = MmaF64;
  using Weighted = MmaF64;
};

// Lays out the workspace and, if there is any, launches. Returns its bytes.
template <class Mma, class T = typename Mma::Element>
std::int64_t gram_update_with(const GramCall& g, void* memory, Stream& stream) {
  Workspace workspace(memory);
  RowListParams<T> list{g, {static_cast<const T*>(g.x), g.x_stride, g.d}};
  if (g.y) list.y = {static_cast<const T*>(g.y), g.y_stride, g.d_right};
  list.row_weight = workspace.take<double>(g.tokens);
  list.rows = workspace.take<std::int64_t>(g.tokens);
  list.weights = workspace.take<double>(g.tokens);
  list.row_count = workspace.take<std::int64_t>(1);

  ProductParams<T> p;
  p.a = list.x;
  p.b = list.y;
  p.rows = list.rows;
  p.weights = list.weights;
  p.row_count = list.row_count;
  p.out = g.gram;
  p.out_stride = g.gram_stride;
  p.out_f64 = g.wide;
  p.sums = g.total;
  p.splits = choose_splits<Mma>(p, g.tokens, stream);
  p.partial = workspace.take<double>(partial_size<Mma>(p, p.splits));
  if (!memory || g.tokens == 0) return workspace.bytes();

  constexpr unsigned kThreads = 256;
  const std::int64_t blocks = divide_up(g.tokens, kThreads / kWarp);
  const auto grid = static_cast<unsigned>(smaller<std::int64_t>(blocks, 8 * stream.processors));
  launch(scan_rows_kernel<T>, {grid, 1, 1}, kThreads, 0, stream, list);
  launch(compact_kernel<T>, {1, 1, 1}, kCompactThreads, sizeof(CompactShared), stream, list);
  product<Mma>(p, stream);
  return workspace.bytes();
}

template <class T>
std::int64_t gram_update(const GramCall& g, void* memory, Stream& stream) {
  const bool weighted = g.weights == Weights::kFloat32 || g.weights == Weights::kFloat64;
  return weighted ? gram_update_with<typename GramMma<T>::Weighted>(g, memory, stream)
                  : gram_update_with<typename GramMma<T>::Plain>(g, memory, stream);
}

}  // namespace liar::cuda
