// The register-tiled product of packed panels, written once over a `Simd` policy; see
// panel_kernel_impl.h.
//
// A register tile holds kRows × (kVectors · kLanes) sums while it walks all steps:
//
//                 b panel: kVectors vectors per step
//                 [ v0      | v1      | v2      ]
//      a panel    +---------+---------+---------+
//      a0 splat   | acc 0,0 | acc 0,1 | acc 0,2 |
//      a1 splat   | acc 1,0 | acc 1,1 | acc 1,2 |     8 × 3 of AVX-512's 32 registers, 4 × 6 of
//      ...        |         |         |         |     NEON's 32, 4 × 3 of AVX2's 16
//                 +---------+---------+---------+
#pragma once

#include <cstdint>

#include "panel_kernel.h"

namespace liar {
namespace {

constexpr int64_t kSegmentTokens = 128;

template <class Simd>
struct PanelProducts {
  using Slot = typename Simd::Slot;
  using Vector = typename Simd::Vector;
  static constexpr int kLanes = Simd::kLanes;
  static constexpr int kRows = Simd::kRows;
  static constexpr int kVectors = Simd::kVectors;
  static constexpr int kPanel = kLanes * kVectors;
  // Steps that one register sums up: few, because a float32 sum loses bits with its length.
  static constexpr int64_t kSegment =
      sizeof(typename Simd::Sum) == 8 ? 512 : kSegmentTokens / Simd::kTokensPerStep;
  static_assert(kPanel % kRows == 0, "a register tile must not straddle two panels");

  /// The sums of one register tile over `steps` steps, from zero.
  template <int vectors>
  static inline __attribute__((always_inline)) void add_steps(int64_t steps, const Slot* a,
                                                              const Slot* b,
                                                              Vector (&sum)[kRows][vectors],
                                                              const char* ahead,
                                                              int64_t ahead_step) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] = Simd::zero();
    }
    for (int64_t step = 0; step < steps; ++step) {
      typename Simd::Operand right[vectors];
      __builtin_prefetch(ahead);
      ahead += ahead_step;
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) right[v] = Simd::load_slot(b + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const auto left = Simd::splat(a + r);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          sum[r][v] = Simd::multiply_add(left, right[v], sum[r][v]);
        }
      }
      a += kPanel;
      b += kPanel;
    }
  }

  template <int vectors>
  static void store_tile(const Vector (&sum)[kRows][vectors],
                         typename Simd::Sum (&to)[kRows][vectors * kLanes]) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) Simd::store(&to[r][v * kLanes], sum[r][v]);
    }
  }

  /// Fetches where a tile's sums go, into the L1 cache (locality 3) or the L2 (2).
  template <int vectors, int locality = 3, class Out>
  static inline __attribute__((always_inline)) void fetch(const Out* out, int64_t out_row) {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Out));
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int64_t c = 0; c < vectors * kLanes; c += kLine) {
        __builtin_prefetch(out + r * out_row + c, locality == 3, locality);
      }
    }
  }

  /// One register tile. `vectors` of the panel are live; the tile's rows below `rows` and columns
  /// below `cols` are stored, of those the part that `triangle` names; the diagonal
  /// passes through column `diagonal` of the tile's first row. Every step also fetches what is
  /// at `ahead`, `ahead_step` bytes further each time.
  template <int vectors, class Out>
  static void tile(int64_t steps, const Slot* a, const Slot* b, Out* out, int64_t out_row,
                   int64_t rows, int64_t cols, Triangle triangle, int64_t diagonal, double scale,
                   const char* ahead, int64_t ahead_step) {
    Vector sum[kRows][vectors];
    typename Simd::Sum part[kRows][vectors * kLanes];  // segments so far, in the L1 cache
    // While the last sums grow: what is fetched earlier is gone from the L1 cache by then.
    if (steps <= kSegment) fetch<vectors>(out, out_row);
    add_steps<vectors>(steps < kSegment ? steps : kSegment, a, b, sum, ahead, ahead_step);
    for (int64_t begin = kSegment; begin < steps; begin += kSegment) {
      store_tile<vectors>(sum, part);
      a += kSegment * kPanel;
      b += kSegment * kPanel;
      ahead += kSegment * ahead_step;
      if (steps - begin <= kSegment) fetch<vectors>(out, out_row);
      add_steps<vectors>(steps - begin < kSegment ? steps - begin : kSegment, a, b, sum, ahead,
                         ahead_step);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          sum[r][v] = Simd::add(sum[r][v], Simd::load(&part[r][v * kLanes]));
        }
      }
    }
    if (scale != 1) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[r][v] = Simd::scale(sum[r][v], scale);
      }
    }
    const bool inside = triangle == Triangle::kLower   ? diagonal + 1 >= vectors * kLanes
                        : triangle == Triangle::kUpper ? diagonal + kRows <= 1
                                                       : true;
    const bool whole = inside && rows >= kRows && cols >= vectors * kLanes;
    if (whole) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
          Simd::accumulate(out + r * out_row + v * kLanes, sum[r][v]);
      }
      return;
    }
    store_tile<vectors>(sum, part);
    for (int64_t r = 0; r < (rows < kRows ? rows : kRows); ++r) {
      const int64_t middle = diagonal + r;  // column of the diagonal
      const int64_t first = triangle == Triangle::kUpper && middle > 0 ? middle : 0;
      const int64_t limit = triangle == Triangle::kLower && middle + 1 < cols ? middle + 1 : cols;
      for (int64_t c = first; c < limit; ++c) out[r * out_row + c] += static_cast<Out>(part[r][c]);
    }
  }

  /// tile<live>, for live ≤ vectors.
  template <int vectors, class... Arguments>
  static void tile_of(int64_t live, Arguments... arguments) {
    if constexpr (vectors > 1) {
      if (live < vectors) return tile_of<vectors - 1>(live, arguments...);
    }
    tile<vectors>(arguments...);
  }

  template <class Out>
  static void multiply(const PanelProduct& p) {
    for (int64_t j = p.j0; j < p.j1; j += kPanel) {
      const auto* b = reinterpret_cast<const Slot*>(static_cast<const char*>(p.b) +
                                                    j / kPanel * p.b_panel_stride);
      const bool lower = p.triangle == Triangle::kLower, upper = p.triangle == Triangle::kUpper;
      const int64_t first = lower && j > p.i0 ? j : p.i0;  // j is a multiple of kRows
      const int64_t last = upper && j + kPanel < p.i1 ? j + kPanel : p.i1;
      // Every tile fetches its part of the panel that comes next, which may be in memory still.
      const char* ahead = reinterpret_cast<const char*>(b) + p.b_panel_stride;
      const int64_t tiles = last > first ? (last - first + kRows - 1) / kRows : 1;
      const int64_t ahead_step = kPanel * static_cast<int64_t>(sizeof(Slot)) / tiles;
      for (int64_t i = first; i < last; i += kRows, ahead += ahead_step * p.steps) {
        const auto* a = reinterpret_cast<const Slot*>(static_cast<const char*>(p.a) +
                                                      i / kPanel * p.a_panel_stride) +
                        i % kPanel;
        Out* out = static_cast<Out*>(p.out) + i * p.out_row + j;
        const int64_t rows = p.i1 - i;
        // The next tile's may be in memory still; one of few steps is done before they come.
        if (p.steps > kSegment && rows > kRows)
          fetch<kVectors, 2>(out + kRows * p.out_row, p.out_row);
        int64_t cols = p.j1 - j < kPanel ? p.j1 - j : kPanel;
        if (lower && i + kRows - j < cols) cols = i + kRows - j;
        const int64_t live = (cols + kLanes - 1) / kLanes;
        tile_of<kVectors>(live, p.steps, a, b, out, p.out_row, rows, cols, p.triangle, i - j,
                          p.scale, ahead, ahead_step);
      }
    }
  }
};

}  // namespace
}  // namespace liar
