// Products of float64 matrices on the packed micro-kernels.
#pragma once

#include <cstdint>

#include "panel_kernel.h"
#include "parallel.h"

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
};

/// out[i, j] += sign · Σ_k a(k, i) b(k, j) for k < steps, i < rows, j < cols; `out` is row-major.
struct Product {
  Operand a, b;
  int64_t steps, rows, cols;
  double sign;
  double* out;
  int64_t out_row;
  Triangle triangle = Triangle::kAll;
};

void add_product(const Product& product, const PanelKernel& kernel, const Pool& pool);

/// Σ_ij left[i, j] · (Σ_k a(k, i) b(k, j))_ij without storing the product; a(k, i) is taken as zero
/// for k > i when `a_upper`: then `a` is the upper triangle of a (rows, rows) matrix by rows.
double dot_product(const Product& product, bool a_upper, const double* left, int64_t left_row,
                   const PanelKernel& kernel, const Pool& pool);

}  // namespace liar
