// Cholesky factorisation and triangular solves in float64, on the packed micro-kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "panels.h"
#include "parallel.h"

namespace liar {

/// a = Uᵀ U; U takes the place of `a`.
class Cholesky {
 public:
  Cholesky(TrianglePanels a, const Pool& pool);

  /// 0, or the order of the first leading minor that is not positive definite; U is then spoilt.
  int64_t code() const { return code_; }

  /// Of the diagonal of U; 1 where that is empty.
  double least() const;
  double largest() const;

  /// Overwrites x, (n, columns), with the solution of Uᵀ U y = x.
  void solve(Panels& x, const Pool& pool) const;

  const TrianglePanels& factor() const { return u_; }

 private:
  int64_t factor_strip(int64_t strip, const Pool& pool);
  int64_t factor_diagonal(int64_t strip);
  void solve_panels(Panels& x, int64_t first, int64_t count) const;

  TrianglePanels u_;
  std::vector<double> inverse_;  // of the diagonal of U; 1 beyond
  int64_t code_ = 0;
};

/// Overwrites the upper triangle of the row-major matrix a (n, n) by U with a = UᵀU, and returns
/// Cholesky::code().
int64_t factor_upper(double* a, int64_t n, const PanelKernel& kernel, const Pool& pool);

/// C with s = C Cᵀ, (n, n) with zeros above the diagonal, of a symmetric matrix that may be
/// singular, from its upper triangle: the diagonal, scaled to 1, is raised by rounding. Empty if s
/// is not semidefinite.
Panels square_root(const Panels& s, const Pool& pool);

}  // namespace liar
