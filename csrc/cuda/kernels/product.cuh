// C += Aᵀ diag(w) B over a list of rows: the main loop of Gram updates and cross moments.
//
//   rows k ──▶ ┌────────┐ cp.async  ┌─────────┐ ldmatrix / ld.shared ┌──────────┐ every kFlush rows
//              │ global │ ────────▶ │ kStages │ ───────────────────▶ │ registers│ ──────▶ C +=
//              └────────┘           └─────────┘         mma          └──────────┘
//
// While stage i is multiplied, stages i+1 … i+kStages-1 are on their way. One barrier a stage does
// both jobs: stage i has arrived for everybody, and everybody has left stage i-1, which is
// refilled.
#pragma once

#include <type_traits>

#include "loader.cuh"

namespace liar::cuda {

LIAR_DEVICE int clip(std::int64_t size, int tile) {
  return static_cast<int>(smaller<std::int64_t>(size, tile));
}

LIAR_BOTH void* at(void* out, bool f64, std::int64_t i) {
  return f64 ? static_cast<void*>(static_cast<double*>(out) + i) : static_cast<float*>(out) + i;
}

// out[i] (+)= value, in float or double.
LIAR_DEVICE void store(void* out, bool f64, std::int64_t i, double value, bool accumulate = true) {
  if (f64) {
    double* p = static_cast<double*>(out) + i;
    *p = accumulate ? *p + value : value;
  } else {
    float* p = static_cast<float*>(out) + i;
    *p = static_cast<float>(accumulate ? *p + value : value);
  }
}

template <class Mma>
__global__ void __launch_bounds__(Mma::kThreads, Mma::kBlocks)
    product_kernel(const ProductParams<typename Mma::Element> p) {
  using Scalar = typename Mma::Scalar;
  // f32 sums stay short, then go on into the output, so that the error of a long calibration
  // doesn't grow with it. Tensor cores truncate when they accumulate, which makes the diagonal of a
  // Gram matrix too small, and less of them: at most 512 tokens of it. Sums that are rounded run to
  // 2048. The epilogue's 2 × 128 KB of f64 sums are as much as 512 tokens of 16 bits are.
  constexpr int kFlushSteps = Mma::kMostTokens / Mma::kDepth;

  auto& shared = shared_memory<ProductShared<Mma>>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row0 = warp / Mma::kWarpColumns * (Mma::kTile / Mma::kWarpRows);
  const int column0 = warp % Mma::kWarpColumns * (Mma::kTile / Mma::kWarpColumns);
  const bool triangular = !p.b.data;
  const auto shape = ProductShape::of(p, Mma::kTile);
  const std::int64_t columns = p.b.data ? p.b.columns : p.a.columns;
  const std::int64_t count = *p.row_count;
  const std::int64_t part = divide_up(divide_up(count, p.splits), Mma::kDepth) * Mma::kDepth;

  for (std::int64_t item = blockIdx.x; item < shape.tiles * p.splits; item += gridDim.x) {
    const std::int64_t split = item / shape.tiles;
    const Tile tile = shape.tile(item % shape.tiles, triangular);
    const bool diagonal = triangular && tile.row == tile.column;
    const bool sums_here = p.sums && (triangular ? diagonal : tile.column == 0);
    const std::int64_t begin = smaller(split * part, count), end = smaller(begin + part, count);
    // At least one step: an empty part still has a result, zero.
    const int steps =
        static_cast<int>(larger<std::int64_t>(1, divide_up(end - begin, Mma::kDepth)));

    Loader<Mma> loader(p, tile, diagonal, begin, end);
    typename Mma::Accumulator c = {};
    double sum = 0;
    bool first = true;

    const auto flush = [&] {
      // Where this tile's values go: its own partial tile, or their place in the output.
      const bool split_rows = p.splits > 1;
      const bool add = !first || !split_rows;
      const std::int64_t row = tile.row * Mma::kTile, column = tile.column * Mma::kTile;
      const std::int64_t stride = split_rows ? Mma::kTile : p.out_stride;
      const int row_end = split_rows ? Mma::kTile : clip(p.a.columns - row, Mma::kTile);
      const int column_end = split_rows ? Mma::kTile : clip(columns - column, Mma::kTile);
      const bool lower = diagonal && !split_rows;
      const bool f64 = split_rows || p.out_f64;
      void* out = split_rows ? p.partial + item * Mma::kTile * Mma::kTile
                             : at(p.out, f64, row * stride + column);
      // Inside, all old values of a row are on their way before the first is needed. On an edge or
      // on the diagonal each is asked for by itself.
      const bool inside = row_end == Mma::kTile && column_end == Mma::kTile && !lower;
      const auto write_inside = [&](auto* base) {
        using Out = std::remove_pointer_t<decltype(base)>;
        constexpr int kHalves = sizeof(c[0][0]) / sizeof(Scalar) / 2;
        auto* line = base + (row0 + lane / 4) * stride + column0 + 2 * (lane % 4);
#pragma unroll
        for (int m = 0; m < Mma::kM; ++m)
#pragma unroll
          for (int h = 0; h < kHalves; ++h) {
            Out was[Mma::kN][2] = {};
            if (add) {
#pragma unroll
              for (int n = 0; n < Mma::kN; ++n)
                was[n][0] = line[8 * n], was[n][1] = line[8 * n + 1];
            }
#pragma unroll
            for (int n = 0; n < Mma::kN; ++n)
#pragma unroll
              for (int e = 0; e < 2; ++e)
                line[8 * n + e] =
                    static_cast<Out>(was[n][e] + static_cast<double>(c[m][n][2 * h + e]));
            line += 8 * stride;
          }
      };
      if (inside && f64)
        write_inside(static_cast<double*>(out));
      else if (inside)
        write_inside(static_cast<float*>(out));
      else
        for_each_value<Mma>(c, row0, column0, lane, [&](int r, int s, Scalar value) {
          if (r < row_end && s < column_end && !(lower && s > r))
            store(out, f64, r * stride + s, value, add);
        });
      const std::int64_t mine = row + threadIdx.x;
      if (sums_here && threadIdx.x < Mma::kTile && mine < p.a.columns) {
        if (split_rows)
          store(p.partial_sums, true, split * p.a.columns + mine, sum, add);
        else
          store(p.sums, p.out_f64, mine, sum);
      }
      sum = 0;
      first = false;
#pragma unroll
      for (int m = 0; m < Mma::kM; ++m)
#pragma unroll
        for (int n = 0; n < Mma::kN; ++n)
#pragma unroll
          for (int r = 0; r < int(sizeof(c[0][0]) / sizeof(Scalar)); ++r) c[m][n][r] = 0;
    };

#pragma unroll
    for (int s = 0; s < Mma::kStages - 1; ++s) loader.load(shared.stages[s]);
    int since_flush = 0, stage = 0;
    for (int step = 0; step < steps; ++step) {
      copy_wait<Mma::kStages - 2>();
      __syncthreads();  // this stage is here, and the one before is free
      loader.load(shared.stages[stage == 0 ? Mma::kStages - 1 : stage - 1]);
      const auto& now = shared.stages[stage];
      const auto* right = diagonal ? now.a : now.b;
      Mma::multiply(c, now.a, right, now.weights, row0, column0, lane);
      // Column sums come off the tiles on the diagonal, which have only half the loads to wait for.
      if (sums_here && threadIdx.x < Mma::kTile) {
        Scalar part = 0;
#pragma unroll 4
        for (int k = 0; k < Mma::kDepth; ++k) {
          const auto x = static_cast<Scalar>(to_double(now.a[k * Mma::kStride + threadIdx.x]));
          if constexpr (Mma::kWeighted)
            part += static_cast<Scalar>(now.weights[k]) * x;
          else
            part += x;
        }
        sum += part;
      }
      if (++stage == Mma::kStages) stage = 0;
      if (++since_flush == kFlushSteps || step == steps - 1) {
        flush();
        since_flush = 0;
      }
    }
    copy_wait<0>();
    __syncthreads();  // nobody refills a stage that another warp still reads
  }
}

// out += Σ over splits of the partial tiles, always in the same order.
template <class Mma>
__global__ void reduce_kernel(const ProductParams<typename Mma::Element> p) {
  const auto shape = ProductShape::of(p, Mma::kTile);
  const bool triangular = !p.b.data;
  constexpr std::int64_t kArea = Mma::kTile * Mma::kTile;
  const std::int64_t columns = p.b.data ? p.b.columns : p.a.columns;
  for (std::int64_t index = blockIdx.x; index < shape.tiles; index += gridDim.x) {
    const Tile tile = shape.tile(index, triangular);
    for (int e = threadIdx.x; e < kArea; e += blockDim.x) {
      const std::int64_t row = tile.row * Mma::kTile + e / Mma::kTile;
      const std::int64_t column = tile.column * Mma::kTile + e % Mma::kTile;
      if (row >= p.a.columns || column >= columns) continue;
      if (triangular && column > row) continue;
      double value = 0;
      for (int s = 0; s < p.splits; ++s) value += p.partial[(s * shape.tiles + index) * kArea + e];
      store(p.out, p.out_f64, row * p.out_stride + column, value);
    }
  }
  if (!p.sums) return;
  for (std::int64_t i = blockIdx.x * std::int64_t(blockDim.x) + threadIdx.x; i < p.a.columns;
       i += std::int64_t(gridDim.x) * blockDim.x) {
    double value = 0;
    for (int s = 0; s < p.splits; ++s) value += p.partial_sums[s * p.a.columns + i];
    store(p.sums, p.out_f64, i, value);
  }
}

// How many parts to cut the rows into, so that few tiles still fill the machine; each part keeps at
// least 1024 rows, below which loading and adding partial tiles costs more than it spreads.
template <class Mma>
int choose_splits(const ProductParams<typename Mma::Element>& p, std::int64_t rows,
                  Stream& stream) {
  const auto shape = ProductShape::of(p, Mma::kTile);
  const std::int64_t slots = stream.processors * std::int64_t(Mma::kBlocks);
  const std::int64_t most = smaller(slots / larger<std::int64_t>(1, shape.tiles), rows / 1024);
  return static_cast<int>(larger<std::int64_t>(1, most));
}

// Doubles of workspace that `splits` parts need.
template <class Mma>
std::int64_t partial_size(const ProductParams<typename Mma::Element>& p, int splits) {
  if (splits < 2) return 0;
  const auto shape = ProductShape::of(p, Mma::kTile);
  return splits * (shape.tiles * Mma::kTile * Mma::kTile + p.a.columns);
}

template <class Mma>
void product(ProductParams<typename Mma::Element> p, Stream& stream) {
  const auto shape = ProductShape::of(p, Mma::kTile);
  if (shape.tiles == 0) return;
  p.vector = can_vectorize(p.a) && (!p.b.data || can_vectorize(p.b));
  if (p.splits > 1) p.partial_sums = p.partial + p.splits * shape.tiles * Mma::kTile * Mma::kTile;
  constexpr std::size_t kShared = sizeof(ProductShared<Mma>);
  const std::int64_t slots =
      std::int64_t(stream.processors) *
      blocks_per_processor(product_kernel<Mma>, Mma::kThreads, kShared, stream);
  const auto grid = static_cast<unsigned>(smaller(shape.tiles * p.splits, slots));
  launch(product_kernel<Mma>, {grid, 1, 1}, Mma::kThreads, kShared, stream, p);
  if (p.splits > 1)
    launch(reduce_kernel<Mma>, {static_cast<unsigned>(shape.tiles), 1, 1}, 256, 0, stream, p);
}

}  // namespace liar::cuda
