// gram += xᵀ diag(w) (y or x), total += xᵀ w, count += [Σ w, rows dropped], on raw pointers.
#pragma once

#include <cstdint>

#include "panel_kernel.h"
#include "parallel.h"

namespace liar {

/// A (rows, cols) matrix with strides in elements.
struct MatrixView {
  DType dtype;
  const void* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
};

enum class WeightType { kNone, kBool, kFloat32, kFloat64 };

struct GramUpdate {
  void* gram;  // (d, d), or (d, dy) with y; columns contiguous
  int64_t gram_row;
  void* total;    // (d,)
  bool wide;      // gram and total are float64 (else float32)
  double* count;  // [Σ w, rows dropped]
  MatrixView x;
  const MatrixView* y;  // null: the Gram matrix of x, lower triangle only
  WeightType weight_type;
  const void* weight;
  int64_t weight_stride;
  double limit = 0x1p48;  // of |x|, |y|, w and |w x|: see largest_entry in launchers/check_ops.h
};

/// Runs the update. Rows of weight 0 are not read; rows that hold a value that is not finite or
/// beyond `limit`, and rows whose weight is negative or beyond it, are left out and counted in
/// count[1]. Products are summed in float32 (float64 for float64 rows) over at most kChunkSteps
/// steps, then added to `gram`.
void gram_update(const GramUpdate& update, const KernelSet& kernels, const Pool& pool);

}  // namespace liar
