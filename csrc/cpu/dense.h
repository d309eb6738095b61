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
  int64_t strips() const;
  int64_t steps_of(int64_t strip) const;
  int64_t strip_offset(int64_t strip) const;  // bytes

  int64_t n_;
  const PanelKernel& kernel_;
  Workspace packed_;
};

}  // namespace liar
