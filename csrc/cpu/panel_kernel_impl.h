// Packing and the register-tiled micro-kernel, written once over a `Simd` policy.
//
// Each instruction set includes this file in its own translation unit, compiled with its own flags.
// Everything is in an unnamed namespace and calls nothing inline from elsewhere: a function that
// the linker shares between units could otherwise carry AVX-512 code to a CPU that has none.
#pragma once

#include <cstdint>

#include "panel_pack_impl.h"
#include "panel_product_impl.h"

namespace liar {
namespace {

/// The table entry for a policy whose rows are float16, bfloat16 or float32.
template <class Simd>
constexpr PanelKernel single_kernel() {
  using Product = PanelProducts<Simd>;
  using Pack = PanelPacking<Simd>;
  return {Product::kPanel,
          Product::kRows,
          sizeof(float),
          1,
          1,
          [](DType dtype, const void* row, int64_t n, double limit) {
            if (dtype == DType::kFloat16)
              return Pack::template row_within<Rows<Simd, Half>>(row, n, limit);
            if (dtype == DType::kBFloat16)
              return Pack::template row_within<Rows<Simd, Brain>>(row, n, limit);
            return Pack::template row_within<Rows<Simd, float>>(row, n, limit);
          },
          [](const PackRows& p) {
            if (p.dtype == DType::kFloat16) return Pack::template pack_rows<Rows<Simd, Half>>(p);
            if (p.dtype == DType::kBFloat16) return Pack::template pack_rows<Rows<Simd, Brain>>(p);
            return Pack::template pack_rows<Rows<Simd, float>>(p);
          },
          [](const PanelProduct& p) { Product::template multiply<float>(p); },
          [](const PanelProduct& p) { Product::template multiply<double>(p); },
          nullptr};
}

/// The table entry for a policy that takes rows of one type only, read by `Source`.
template <class Simd, class Source, void (*Solve)(const PanelSolve&) = nullptr>
constexpr PanelKernel one_type_kernel() {
  using Product = PanelProducts<Simd>;
  using Pack = PanelPacking<Simd>;
  return {Product::kPanel,
          Product::kRows,
          sizeof(typename Simd::Slot),
          Simd::kTokensPerStep,
          1,
          [](DType, const void* row, int64_t n, double limit) {
            return Pack::template row_within<Source>(row, n, limit);
          },
          [](const PackRows& p) { return Pack::template pack_rows<Source>(p); },
          [](const PanelProduct& p) { Product::template multiply<float>(p); },
          [](const PanelProduct& p) { Product::template multiply<double>(p); },
          Solve};
}

}  // namespace
}  // namespace liar
