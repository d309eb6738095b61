// The substitution in panels, written once over a float64 `Simd` policy, as the products are.
#pragma once

#include <cstdint>

#include "panel_kernel_impl.h"

namespace liar {
namespace {

/// One register tile of a substitution, with the vectors of a panel that are live. `sum` grows from
/// −x, so that no product has to be negated.
template <class Simd, int vectors, bool backward>
void solve_tile(const PanelSolve& p, int64_t i) {
  constexpr int kLanes = Simd::kLanes, kRows = Simd::kRows;
  constexpr int64_t kPanel = PanelProducts<Simd>::kPanel;
  const double* a = reinterpret_cast<const double*>(reinterpret_cast<const char*>(p.a) +
                                                    i / kPanel * p.a_panel_stride) +
                    i % kPanel;
  double* x = p.x + i * kPanel;
  typename Simd::Vector sum[kRows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      sum[r][v] = Simd::scale(Simd::load(x + r * kPanel + v * kLanes), -1.0);
    }
  }
  const int64_t end = backward ? p.last : i;
  for (int64_t k = backward ? i + kRows : p.first; k < end; ++k) {
    typename Simd::Vector right[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) right[v] = Simd::load(p.x + k * kPanel + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const auto left = Simd::splat(a + k * kPanel + r);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        sum[r][v] = Simd::multiply_add(left, right[v], sum[r][v]);
      }
    }
  }
  a += i * kPanel;
#pragma GCC unroll 16
  for (int place = 0; place < kRows; ++place) {
    const int j = backward ? kRows - 1 - place : place;
    const double by = -p.inverse[i + j];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[j][v] = Simd::scale(sum[j][v], by);
#pragma GCC unroll 16
    for (int later = place + 1; later < kRows; ++later) {
      const int r = backward ? kRows - 1 - later : later;
      const auto left = Simd::splat(a + j * kPanel + r);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        sum[r][v] = Simd::multiply_add(left, sum[j][v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) Simd::store(x + r * kPanel + v * kLanes, sum[r][v]);
  }
}

template <class Simd, int vectors>
void solve_rows(const PanelSolve& p) {
  constexpr int64_t kRows = Simd::kRows;
  if (p.backward) {
    for (int64_t i = (p.i1 - 1) / kRows * kRows; i >= p.i0; i -= kRows) {
      solve_tile<Simd, vectors, true>(p, i);
    }
  } else {
    for (int64_t i = p.i0; i < p.i1; i += kRows) solve_tile<Simd, vectors, false>(p, i);
  }
}

/// solve_rows with the vectors that are live, of `vectors`.
template <class Simd, int vectors = Simd::kVectors>
void solve(const PanelSolve& p) {
  if constexpr (vectors > 1) {
    if (p.columns <= (vectors - 1) * Simd::kLanes) return solve<Simd, vectors - 1>(p);
  }
  solve_rows<Simd, vectors>(p);
}

}  // namespace
}  // namespace liar
