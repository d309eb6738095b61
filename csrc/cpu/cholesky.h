// Cholesky factorisation and triangular solves in float64, on the packed micro-kernels.
#pragma once

#include <cstdint>

#include "dense.h"
#include "panel_kernel.h"
#include "parallel.h"
#include "workspace.h"

namespace liar {

/// a = Uᵀ U. U takes the place of the upper triangle of the row-major (n, n) matrix `a`, which has
/// to live as long as this does; the strictly lower triangle is neither read nor written.
class Cholesky {
 public:
  Cholesky(double* a, int64_t n, int64_t row, const PanelKernel& kernel, const Pool& pool);

  /// 0, or the order of the first leading minor that is not positive definite; `a` is then spoilt.
  int64_t code() const { return code_; }

  /// Overwrites the row-major (n, columns) matrix `x` with the solution of Uᵀ U y = x.
  void solve(double* x, int64_t columns, int64_t x_row, const Pool& pool) const;

 private:
  int64_t factor_strip(int64_t strip, const Pool& pool);
  void solve_columns(double* x, int64_t columns, int64_t x_row) const;

  double* u_;
  int64_t row_;
  StripLayout layout_;
  Workspace panels_;  // U above its diagonal blocks
  int64_t code_ = 0;
};

/// U with s = Uᵀ U, by rows and zero below its diagonal, of a symmetric (n, n) matrix that may be
/// singular: its diagonal, scaled to 1, is raised by rounding. Empty if it is not semidefinite.
Workspace square_root(const double* s, int64_t n, const PanelKernel& kernel, const Pool& pool);

}  // namespace liar
