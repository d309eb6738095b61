// What a product reads, and how a stage of its rows comes into shared memory; see product.cuh.
#pragma once

#include "mma.cuh"
#include "schedule.cuh"

namespace liar::cuda {

template <class T>
struct Operand {
  const T* data = nullptr;
  std::int64_t stride = 0;  // elements from row to row
  std::int64_t columns = 0;
};

template <class T>
struct ProductParams {
  Operand<T> a, b;                          // no b: Aᵀ diag(w) A, and only its lower triangle
  const std::int64_t* rows = nullptr;       // which rows
  const double* weights = nullptr;          // one per listed row
  const std::int64_t* row_count = nullptr;  // on the device
  void* out = nullptr;
  std::int64_t out_stride = 0;
  bool out_f64 = true;
  void* sums = nullptr;            // += Aᵀ w, of out's type
  int splits = 1;                  // parts of the rows, each with a partial result
  double* partial = nullptr;       // splits × tiles × kTile², when splits > 1
  double* partial_sums = nullptr;  // splits × a.columns
  bool vector = false;             // operands allow 16-byte loads; see can_vectorize
};

template <class T>
bool can_vectorize(const Operand<T>& x) {
  constexpr std::int64_t kElements = 16 / sizeof(T);
  return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.stride % kElements == 0;
}

template <class Mma>
struct ProductShared {
  using T = typename Mma::Element;
  struct Stage {
    alignas(16) T a[Mma::kDepth * Mma::kStride];
    alignas(16) T b[Mma::kDepth * Mma::kStride];
    double weights[Mma::kWeighted ? Mma::kDepth : 1];
  } stages[Mma::kStages];
};

struct ProductShape {
  std::int64_t tile_rows, tile_columns, tiles;

  template <class T>
  LIAR_BOTH static ProductShape of(const ProductParams<T>& p, int tile) {
    ProductShape s{divide_up(p.a.columns, tile), 0, 0};
    s.tile_columns = p.b.data ? divide_up(p.b.columns, tile) : s.tile_rows;
    s.tiles = p.b.data ? s.tile_rows * s.tile_columns : triangle(s.tile_rows);
    return s;
  }

  LIAR_BOTH Tile tile(std::int64_t index, bool triangular) const {
    return triangular ? triangular_tile(index, tile_rows)
                      : rectangular_tile(index, tile_rows, tile_columns);
  }
};

// Brings one stage of rows into shared memory. A thread always moves the same column of 16 bytes,
// and reads its row numbers one stage ahead, so that no copy waits for them.
template <class Mma>
struct Loader {
  using T = typename Mma::Element;
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kPerRow = Mma::kTile / kElements;
  static constexpr int kRowStep = Mma::kThreads / kPerRow;
  static constexpr int kPasses = Mma::kDepth / kRowStep;
  static_assert(kRowStep * kPerRow == Mma::kThreads && kPasses * kRowStep == Mma::kDepth);

  const ProductParams<T>& p;
  const T *a, *b;
  std::int64_t next, end;  // this thread's first row of the next stage
  int valid_a, valid_b;    // elements of this thread's 16 bytes that exist
  bool same;               // a tile on the diagonal: B is A
  std::int64_t row[kPasses];

  LIAR_DEVICE Loader(const ProductParams<T>& params, Tile tile, bool same_tile, std::int64_t first,
                     std::int64_t last)
      : p(params), next(first + threadIdx.x / kPerRow), end(last), same(same_tile) {
    const Operand<T>& right = p.b.data ? p.b : p.a;
    a = locate(p.a, tile.row, valid_a);
    b = locate(right, tile.column, valid_b);
    fetch_rows();
  }

  LIAR_DEVICE static const T* locate(const Operand<T>& x, std::int64_t tile, int& valid) {
    const std::int64_t column = tile * Mma::kTile + threadIdx.x % kPerRow * kElements;
    const std::int64_t left = x.columns - column;
    valid = static_cast<int>(larger<std::int64_t>(0, smaller<std::int64_t>(left, kElements)));
    return x.data + (valid ? column : 0);
  }

  LIAR_DEVICE void fetch_rows() {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const std::int64_t k = next + i * kRowStep;
      row[i] = k >= end ? -1 : p.rows[k];
    }
    next += Mma::kDepth;
  }

  LIAR_DEVICE void load(typename ProductShared<Mma>::Stage& stage) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int slot =
          (threadIdx.x / kPerRow + i * kRowStep) * Mma::kStride + threadIdx.x % kPerRow * kElements;
      const bool real = row[i] >= 0;
      const std::int64_t r = real ? row[i] : 0;
      move(stage.a + slot, a + r * p.a.stride, real ? valid_a : 0);
      if (!same)
        move(stage.b + slot, b + r * (p.b.data ? p.b.stride : p.a.stride), real ? valid_b : 0);
    }
    if constexpr (Mma::kWeighted) {
      if (threadIdx.x < Mma::kDepth) {
        // `next` is one stage ahead of the rows that are loaded now.
        const std::int64_t k = next - Mma::kDepth - threadIdx.x / kPerRow + threadIdx.x;
        copy_async<8>(&stage.weights[threadIdx.x], p.weights + (k < end ? k : 0), k < end ? 8 : 0);
      }
    }
    copy_commit();
    fetch_rows();
  }

  LIAR_DEVICE void move(T* to, const T* from, int valid) const {
    if (p.vector) {
      copy_async<16>(to, from, valid * static_cast<int>(sizeof(T)));
    } else {
      for (int e = 0; e < kElements; ++e) to[e] = e < valid ? from[e] : T{};
    }
  }
};

}  // namespace liar::cuda
