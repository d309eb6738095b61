// Products of float64 matrices on the packed micro-kernels.
#pragma once

#include <cstdint>

#include "gather.h"
#include "panels.h"
#include "parallel.h"

namespace liar {

/// The left or right side of a product: value (k, i) for step k of the sum and feature i of the
/// result, by steps.
struct Operand {
  const double* data;
  int64_t step_stride;

  bool same(const Operand& other) const {
    return data == other.data && step_stride == other.step_stride;
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

void add_product(const Product& product, const PanelKernel& kernel, const Pool& pool);

/// out[i, j] += scale · Σ_k a(k, i) b(k, j) for all steps and features, or the part that `triangle`
/// names.
void add_product(const Panels& a, const Panels& b, double scale, const Output& out,
                 Triangle triangle, const Pool& pool);

/// A symmetric matrix H, packed once for many quadratic forms ⟨v, H x⟩: its lower triangle with
/// half the diagonal, because ⟨v, H x⟩ = 2 ⟨v, L x⟩ for the v and x that are asked for (v = x S
/// with a symmetric S), which is half the work.
class QuadraticForm {
 public:
  /// H is the rows and columns `index` of a matrix of which the lower triangle is read.
  QuadraticForm(const Float64View& lower, const Index& index, const PanelKernel& kernel,
                const Pool& pool);

  /// ⟨v, H x⟩ = tr(vᵀ H x) of matrices (n, columns) without storing the product.
  double evaluate(const Panels& v, const Panels& x, const Pool& pool) const;

 private:
  TrianglePanels half_;
};

}  // namespace liar
