// Packing rows into panels, written once over a `Simd` policy; see panel_kernel_impl.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "panel_kernel.h"

namespace liar {
namespace {

template <class Simd>
struct PanelPacking {
  using Slot = typename Simd::Slot;
  using Vector = typename Simd::Vector;
  static constexpr int kLanes = Simd::kLanes;
  static constexpr int kPanel = kLanes * Simd::kVectors;

  /// Whether every |x| of a row is at most `limit`; a NaN is not.
  template <class Source>
  static bool row_within(const void* raw, int64_t n, double limit) {
    const auto* row = static_cast<const typename Source::Value*>(raw);
    for (int64_t c = 0; c < n; c += kLanes) {
      typename Source::Value rest[kLanes] = {};
      const int64_t live = n - c < kLanes ? n - c : kLanes;
      std::memcpy(rest, row + c, static_cast<size_t>(live) * sizeof(*rest));
      if (!lanes_within(Source::load(rest), limit)) return false;
    }
    return true;
  }

  static bool lanes_within(Vector v, double limit) {
    typename Simd::Sum lanes[kLanes];
    Simd::store(lanes, v);
    for (int i = 0; i < kLanes; ++i) {
      if (!(lanes[i] <= limit && lanes[i] >= -limit)) return false;
    }
    return true;
  }

  /// Packs one vector's width of `count` rows, and adds up their values and squares; `rows[r]` is
  /// already at the right column.
  template <class Source>
  static void pack_column(const typename Source::Value* const* rows, int64_t count,
                          const double* weight, Slot* out, Vector& sum, Vector& squares) {
    for (int64_t r = 0; r < count; r += Simd::kTokensPerStep) {
      Source::pack(rows, r, count, weight, out, sum, squares);
      out += kPanel;
    }
  }

  template <class Source>
  static bool pack_rows(const PackRows& p) {
    using Value = typename Source::Value;
    const Value* rows[kPackRows];
    auto* scratch = static_cast<typename Simd::Sum*>(p.scratch);
    Vector squares = Simd::zero();
    for (int64_t c = 0; c < p.features; c += kLanes) {
      auto* out =
          reinterpret_cast<Slot*>(static_cast<char*>(p.panels) + c / kPanel * p.panel_stride) +
          p.step * kPanel + c % kPanel;
      for (int64_t r = 0; r < p.count; ++r) {
        rows[r] = static_cast<const Value*>(p.rows[r]) + c;
        __builtin_prefetch(reinterpret_cast<const char*>(rows[r]) + p.ahead);
      }
      Value padded[kPackRows][kLanes];
      if (p.features - c < kLanes) {
        const auto live = static_cast<size_t>(p.features - c);
        std::memset(padded, 0, sizeof(padded));
        for (int64_t r = 0; r < p.count; ++r) {
          std::memcpy(padded[r], rows[r], live * sizeof(Value));
          rows[r] = padded[r];
        }
      }
      Vector sum = Simd::zero(), own = Simd::zero();  // short chains: columns overlap
      pack_column<Source>(rows, p.count, p.weight, out, sum, own);
      squares = Simd::add(squares, own);
      if (p.sums != nullptr) Simd::store(scratch + c, sum);
    }
    zero_padding(p);
    const bool within = lanes_within(squares, p.limit * p.limit / 4);
    if (p.sums != nullptr && (within || p.trusted)) {
      for (int64_t c = 0; c < p.features; c += kLanes) {
        Simd::accumulate(p.sums + c, Simd::load(scratch + c));
      }
    }
    return within;
  }

  /// The vectors of the last panel beyond the last feature.
  static void zero_padding(const PackRows& p) {
    const int64_t first = (p.features + kLanes - 1) / kLanes * kLanes;
    for (int64_t c = first; c % kPanel != 0; c += kLanes) {
      auto* out =
          reinterpret_cast<Slot*>(static_cast<char*>(p.panels) + c / kPanel * p.panel_stride) +
          p.step * kPanel + c % kPanel;
      for (int64_t r = 0; r < p.count; r += Simd::kTokensPerStep, out += kPanel) {
        std::memset(out, 0, kLanes * sizeof(Slot));
      }
    }
  }
};
/// Rows of `ValueType` that are widened to what the sums are kept in, one token a step.
template <class Simd, class ValueType>
struct Rows {
  using Value = ValueType;
  using Vector = typename Simd::Vector;
  static Vector load(const Value* p) { return Simd::load(p); }
  static void pack(const Value* const* rows, int64_t r, int64_t /*count*/, const double* weight,
                   typename Simd::Slot* out, Vector& sum, Vector& squares) {
    Vector x = Simd::load(rows[r]);
    if (weight != nullptr) x = Simd::scale(x, weight[r]);
    Simd::store(out, x);
    sum = Simd::add(sum, x);
    squares = Simd::multiply_add(x, x, squares);
  }
};

}  // namespace
}  // namespace liar
