// Products of float64 matrices on the packed micro-kernels.
#pragma once

#include <cstdint>

#include "panel_kernel.h"
#include "parallel.h"
#include "workspace.h"

namespace liar {

/// The left or right side of a product: value (k, i) for step k of the sum and feature i of the
/// result. One of the two strides is 1.
struct Operand {
  const double* data;
  int64_t step_stride;
  int64_t feature_stride = 1;

  Operand from_step(int64_t k) const {
    return {data + k * step_stride, step_stride, feature_stride};
  }
  Operand from_feature(int64_t i) const {
    return {data + i * feature_stride, step_stride, feature_stride};
  }
  bool same(const Operand& other) const {
    return data == other.data && step_stride == other.step_stride &&
           feature_stride == other.feature_stride;
  }
};

/// out[i, j] += scale · Σ_k a(k, i) b(k, j) for k < steps, i < rows, j < cols; `out` is row-major.
struct Product {
  Operand a, b;
  int64_t steps, rows, cols;
  double scale;
  double* out;
  int64_t out_row;
  Triangle triangle = Triangle::kAll;
};

/// Σ_i a[i] b[i], in several chains so that no sum waits for the one before it.
double dot(const double* a, const double* b, int64_t count);

void add_product(const Product& product, const PanelKernel& kernel, const Pool& pool);

constexpr int64_t kStrip = 96;   // features: a multiple of every panel width
constexpr int64_t kSteps = 256;  // multiplied at once: 96 · 256 doubles are 192 KiB

/// Where the panels of a triangle are, (n, n), packed in strips of kStrip features with the steps
/// up to the end of the diagonal block:
///
///        strip 0   [ 00 ]
///        strip 1   [ 10  11 ]
///        strip 2   [ 20  21  22 ]
struct StripLayout {
  int64_t n;
  const PanelKernel& kernel;

  int64_t count() const { return (n + kStrip - 1) / kStrip; }
  int64_t begin(int64_t strip) const { return strip * kStrip; }
  int64_t end(int64_t strip) const { return begin(strip + 1) < n ? begin(strip + 1) : n; }
  int64_t size(int64_t strip) const { return end(strip) - begin(strip); }
  int64_t stride(int64_t strip) const;  // bytes from a panel to the next one
  int64_t offset(int64_t strip) const;  // bytes before a strip
  int64_t bytes() const { return offset(count()); }
};

/// Bytes from a panel of `steps` to the next; a line more keeps panels off the same cache sets.
int64_t panel_stride(int64_t steps, const PanelKernel& kernel);

/// Packs features [0, features) of `source` as the steps from `step` on.
void pack(const Operand& source, int64_t steps, int64_t features, char* panels, int64_t stride,
          int64_t step, const PanelKernel& kernel);

/// The panels of one side of a product.
struct Packed {
  const char* panels;
  int64_t stride;

  Packed from_step(int64_t step, const PanelKernel& kernel) const {
    return {panels + step * kernel.panel * kernel.slot_bytes, stride};
  }
};

/// out[i, j] += scale · Σ_k a(k, i) b(k, j) over panels, for i < rows, j < cols.
void multiply(const Packed& a, const Packed& b, int64_t steps, int64_t rows, int64_t cols,
              double scale, double* out, int64_t out_row, Triangle triangle,
              const PanelKernel& kernel);

/// A symmetric matrix H, packed once for many quadratic forms ⟨v, H x⟩: its lower triangle with
/// half the diagonal, because ⟨v, H x⟩ = 2 ⟨v, L x⟩ for the v and x that are asked for (v = x S
/// with a symmetric S), which is half the work.
class QuadraticForm {
 public:
  /// H is (n, n) of the rows and columns `index` of a matrix of which the lower triangle is read.
  QuadraticForm(const double* lower, int64_t row, const int64_t* index, int64_t n,
                const PanelKernel& kernel, const Pool& pool);

  /// ⟨v, H x⟩ = tr(vᵀ H x) of row-major (n, columns) matrices without storing the product.
  double evaluate(const double* v, const double* x, int64_t columns, const Pool& pool) const;

 private:
  StripLayout layout_;
  Workspace packed_;
};

}  // namespace liar
