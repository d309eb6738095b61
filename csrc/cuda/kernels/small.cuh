// (G + Λ) X = Q for a ladder of Λ and up to 128 rows, a block each: factor and both solves in one
// launch. Larger systems are for cuSOLVER; liar_ext/ops/reference.py has the formulas around both.
//
// G + Λ = L Lᵀ lies in shared memory as a packed triangle, element (i, j) at i(i+1)/2 + j: 66 KB
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
// The columns are cut into slices of 128, each a block that factors anew: n³/3 beside 256 n² of the
// solves. So a ladder of few λ with many outputs fills a machine too.
#pragma once

#include "../calls.h"
#include "block.cuh"

namespace liar::cuda {

constexpr unsigned kSmallThreads = 256;
constexpr int kLaneRows = kSmall / int(kWarp), kWarpSolves = 4, kSlice = 128;

struct SmallShared {
  double inverse[kSmall];  // 1 / L_kk

  // The triangle lies behind.
  LIAR_DEVICE double* triangle() { return reinterpret_cast<double*>(this + 1); }
  static std::size_t bytes(std::int64_t n) {
    return sizeof(SmallShared) + static_cast<std::size_t>(n * (n + 1) / 2) * sizeof(double);
  }
};

LIAR_DEVICE int packed(int i, int j) { return i * (i + 1) / 2 + j; }

static_assert(sizeof(SmallShared) + kSmall * (kSmall + 1) / 2 * sizeof(double) <= 99 << 10);

// Overwrites the triangle below the diagonal by L; `diagonal`, if given, receives L_kk. Thread 0
// gets LAPACK's info. A pivot that is not positive counts as 1: what follows means nothing, but
// ends.
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
LIAR_DEVICE void solve_columns(SmallShared& shared, int n, int lane, Columns& x) {
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

// Block (slice, λ). An infinite Λ is the system [I | 0].
static __global__ void __launch_bounds__(kSmallThreads, 2) small_kernel(const SmallCall q) {
  auto& shared = shared_memory<SmallShared>();
  const std::int64_t slice = blockIdx.x, system = blockIdx.y;
  const int n = static_cast<int>(q.n), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const double shift = q.shifts[system];
  const bool drop = shift - shift != 0;
  double* l = shared.triangle();
  for (int i = warp; i < n; i += kSmallThreads / kWarp)
    for (int j = lane; j <= i; j += kWarp)
      l[packed(i, j)] = drop ? double(i == j) : q.block[i * q.n + j] + (i == j ? shift : 0);
  __syncthreads();
  const int code = factor_small(shared, n, slice == 0 ? q.diagonal + system * n : nullptr);
  if (threadIdx.x == 0 && slice == 0) q.code[system] = code;

  for (int pass = 0; pass < kSlice; pass += kSmallThreads / kWarp * kWarpSolves) {
    const std::int64_t first = slice * kSlice + pass + warp * kWarpSolves;
    if (first >= q.columns) break;
    const int columns = static_cast<int>(smaller<std::int64_t>(kWarpSolves, q.columns - first));
    const auto for_each = [&](auto f) {
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
        for (int c = 0; c < kWarpSolves; ++c) {
          const int i = lane + r * kWarp;
          if (i < n && c < columns) f(r, c, i * q.columns + first + c);
        }
    };
    Columns x = {};
    if (!drop) {
      for_each([&](int r, int c, std::int64_t e) { x[r][c] = q.side[e]; });
      solve_columns(shared, n, lane, x);
    }
    double* out = q.x + system * q.n * q.columns;
    for_each([&](int r, int c, std::int64_t e) { out[e] = x[r][c]; });
  }
}

inline void solve_small(const SmallCall& q, Stream& stream) {
  const std::int64_t slices = larger<std::int64_t>(1, divide_up(q.columns, kSlice));
  launch(small_kernel, {static_cast<unsigned>(slices), static_cast<unsigned>(q.ladder), 1},
         kSmallThreads, SmallShared::bytes(q.n), stream, q);
}

}  // namespace liar::cuda
