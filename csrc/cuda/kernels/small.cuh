// Systems of up to 128 rows, a block each: factor, both solves, W' and the errors of both folds in
// one launch, so that the heads of all layers go together.
//
// G_KK + Λ = L Lᵀ lies in shared memory as a packed triangle, element (i, j) at i(i+1)/2 + j: 66 KB
// at 128 rows, within the 99 KB of the smallest card. Sixteen lanes that start at a multiple of 16
// then meet no bank twice, along a row because it is contiguous, and down a column because
// triangular numbers hit every residue of 16. The right-hand side stays in registers: a warp solves
// four columns, and lane t holds their rows t, t + 32, t + 64 and t + 96.
//
//     ┌───────┐    row k of the solve:  x_k from its lane by a shuffle, and
//     │\      │    x_i −= L_ik x_k      one element of L a lane feeds four columns;
//     │ \     │    no barrier after the factorisation
//     │L_ik\  │
//     └───────┘
//
// The columns of one system are cut into slices of 128, each a block that factors anew: n³/3 of its
// 256 n² products and more. So a few systems with many outputs fill a machine too.
#pragma once

#include "reconstruct.cuh"

namespace liar::cuda {

constexpr unsigned kSmallThreads = 256;
constexpr int kLaneRows = kSmall / int(kWarp), kWarpSolves = 4, kSlice = 128;

struct SmallShared {
  double inverse[kSmall];  // 1 / L_kk
  double scratch[kSmallThreads / kWarp];

  // The triangle lies behind.
  LIAR_DEVICE double* triangle() { return reinterpret_cast<double*>(this + 1); }
  static std::size_t bytes(std::int64_t n) {
    return sizeof(SmallShared) + static_cast<std::size_t>(triangle_size(n)) * sizeof(double);
  }
  static std::int64_t triangle_size(std::int64_t n) { return n * (n + 1) / 2; }
};

LIAR_DEVICE int packed(int i, int j) { return i * (i + 1) / 2 + j; }

static_assert(sizeof(SmallShared) + kSmall * (kSmall + 1) / 2 * sizeof(double) <= 99 << 10);

// Overwrites the triangle below the diagonal by L; `diagonal`, if given, receives L_kk. Thread 0
// gets LAPACK's info. A pivot that is not positive counts as 1: see factor_kernel.
LIAR_DEVICE int factor_small(SmallShared& shared, int n, double* diagonal) {
  double* l = shared.triangle();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int code = 0;
  for (int k = 0; k < n; ++k) {
    const double pivot = l[packed(k, k)];
    const bool good = pivot > 0 && is_finite(pivot);
    const double root = good ? sqrt(pivot) : 1.0;
    if (threadIdx.x == 0) {
      if (!good && code == 0) code = k + 1;
      shared.inverse[k] = 1 / root;
      if (diagonal) diagonal[k] = root;
    }
    for (int i = k + 1 + threadIdx.x; i < n; i += blockDim.x) l[packed(i, k)] /= root;
    __syncthreads();
    for (int i = k + 1 + warp; i < n; i += kSmallThreads / kWarp) {
      const double scale = l[packed(i, k)];
      for (int j = k + 1 + lane; j <= i; j += kWarp) l[packed(i, j)] -= scale * l[packed(j, k)];
    }
    __syncthreads();
  }
  return code;
}

using Columns = double[kLaneRows][kWarpSolves];

// x ← (L Lᵀ)⁻¹ x, a warp's four columns.
LIAR_DEVICE void solve_small(SmallShared& shared, int n, int lane, Columns& x) {
  const double* l = shared.triangle();
#pragma unroll
  for (int b = 0; b < kLaneRows; ++b)
    for (int k = b * kWarp; k < smaller(n, (b + 1) * int(kWarp)); ++k) {
      const double inverse = shared.inverse[k];
      double y[kWarpSolves];
#pragma unroll
      for (int c = 0; c < kWarpSolves; ++c) {
        y[c] = __shfl_sync(kAllLanes, x[b][c], k % kWarp) * inverse;
        if (lane == k % int(kWarp)) x[b][c] = y[c];
      }
#pragma unroll
      for (int r = b; r < kLaneRows; ++r) {
        const int i = lane + r * kWarp;
        if (i <= k || i >= n) continue;
        const double scale = l[packed(i, k)];
#pragma unroll
        for (int c = 0; c < kWarpSolves; ++c) x[r][c] -= scale * y[c];
      }
    }
#pragma unroll
  for (int b = kLaneRows - 1; b >= 0; --b)
    for (int k = smaller(n, (b + 1) * int(kWarp)) - 1; k >= b * int(kWarp); --k) {
      const double inverse = shared.inverse[k];
      double y[kWarpSolves];
#pragma unroll
      for (int c = 0; c < kWarpSolves; ++c) {
        y[c] = __shfl_sync(kAllLanes, x[b][c], k % kWarp) * inverse;
        if (lane == k % int(kWarp)) x[b][c] = y[c];
      }
#pragma unroll
      for (int r = 0; r <= b; ++r) {
        const int i = lane + r * kWarp;
        if (i >= k) continue;
        const double scale = l[packed(k, i)];
#pragma unroll
        for (int c = 0; c < kWarpSolves; ++c) x[r][c] -= scale * y[c];
      }
    }
}

// This lane's part of ⟨X, H X − 2 L⟩; `linear` starts at the warp's first column, of which
// `columns` exist.
LIAR_DEVICE double form_small(const double* square, std::int64_t square_stride,
                              const double* linear, std::int64_t linear_stride, int n, int columns,
                              int lane, const Columns& x) {
  Columns product = {};
#pragma unroll
  for (int b = 0; b < kLaneRows; ++b)
    for (int k = b * kWarp; k < smaller(n, (b + 1) * int(kWarp)); ++k) {
      double y[kWarpSolves];
#pragma unroll
      for (int c = 0; c < kWarpSolves; ++c) y[c] = __shfl_sync(kAllLanes, x[b][c], k % kWarp);
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        const int i = lane + r * kWarp;
        if (i >= n) continue;
        const double scale = square[k * square_stride + i];  // H is symmetric
#pragma unroll
        for (int c = 0; c < kWarpSolves; ++c) product[r][c] += scale * y[c];
      }
    }
  double sum = 0;
#pragma unroll
  for (int r = 0; r < kLaneRows; ++r) {
    const int i = lane + r * kWarp;
    if (i >= n) continue;
#pragma unroll
    for (int c = 0; c < kWarpSolves; ++c)
      if (c < columns) sum += x[r][c] * (product[r][c] - 2 * linear[i * linear_stride + c]);
  }
  return sum;
}

// Block (slice, system).
static __global__ void __launch_bounds__(kSmallThreads, 2) small_kernel(const GroupParams q) {
  auto& shared = shared_memory<SmallShared>();
  const Systems& t = q.s.system;
  const std::int64_t slice = blockIdx.x, system = blockIdx.y, item = system / q.ladder;
  const int n = static_cast<int>(t.n), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const double shift = q.r.damps[system % q.ladder] * q.s.mean[2 * item];
  const bool drop = shift - shift != 0;  // infinite
  const double* square = q.s.folds[0].square + item * q.s.square_batch();
  double* l = shared.triangle();
  for (int i = warp; i < n; i += kSmallThreads / kWarp)
    for (int j = lane; j <= i; j += kWarp)
      l[packed(i, j)] =
          drop ? double(i == j) : square[i * q.s.square_stride + j] + (i == j ? shift : 0);
  __syncthreads();
  const int code = factor_small(shared, n, slice == 0 ? t.diagonal + system * n : nullptr);
  // Every slice finds the same code; the output needs it from all threads.
  if (threadIdx.x == 0) {
    shared.scratch[0] = code;
    if (slice == 0) t.code[system] = code;
  }
  __syncthreads();
  const bool good = shared.scratch[0] == 0 && q.s.mean[2 * item + 1] == 0;
  const bool targets = q.r.cross.data != nullptr;

  double sums[2] = {};
  for (int pass = 0; pass < kSlice; pass += kSmallThreads / kWarp * kWarpSolves) {
    const std::int64_t first = slice * kSlice + pass + warp * kWarpSolves;
    if (first >= t.m) break;
    const int columns = static_cast<int>(smaller<std::int64_t>(kWarpSolves, t.m - first));
    const std::int64_t at = item * q.s.linear_batch() + first;
    const auto for_each = [&](auto f) {
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
        for (int c = 0; c < kWarpSolves; ++c) {
          const int i = lane + r * kWarp;
          if (i < n && c < columns) f(r, c, at + i * q.s.linear_stride + c);
        }
    };
    Columns x = {};
    if (!drop) {
      for_each([&](int r, int c, std::int64_t e) { x[r][c] = q.s.rhs[e]; });
      solve_small(shared, n, lane, x);
    }
    if (targets) for_each([&](int r, int c, std::int64_t e) { x[r][c] += q.s.kept_weight[e]; });
    if (q.r.weight_out)
      for_each([&](int r, int c, std::int64_t e) {
        const double value = targets ? x[r][c] : x[r][c] + q.s.kept_weight[e];
        q.r.weight_out[(system * t.m + first + c) * n + lane + r * kWarp] = good ? value : NAN;
      });
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const Fold& fold = q.s.folds[f];
      if (fold.gram.data)
        sums[f] += form_small(fold.square + item * q.s.square_batch(), q.s.square_stride,
                              fold.linear + at, q.s.linear_stride, n, columns, lane, x);
    }
  }
#pragma unroll
  for (int f = 0; f < 2; ++f) {
    const double sum = block_sum(sums[f], shared.scratch);
    if (threadIdx.x == 0) q.s.partial[(f * t.batches + system) * q.s.parts + slice] = sum;
  }
}

inline void solve_small_systems(const GroupParams& q, Stream& stream) {
  launch(small_kernel,
         {static_cast<unsigned>(q.s.parts), static_cast<unsigned>(q.s.system.batches), 1},
         kSmallThreads, SmallShared::bytes(q.r.n), stream, q);
}

}  // namespace liar::cuda
