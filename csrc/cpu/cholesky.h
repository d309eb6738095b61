// Cholesky factorisation and triangular solves in float64, on the packed micro-kernels.
#pragma once

#include <cstdint>

#include "panel_kernel.h"
#include "parallel.h"

namespace liar {

/// Overwrites the upper triangle of the row-major (n, n) matrix `a` with U, a = Uᵀ U. The strictly
/// lower triangle is neither read nor written. Returns 0, or the order of the first leading minor
/// that is not positive definite; `a` is then spoilt.
int64_t cholesky(double* a, int64_t n, int64_t row, const PanelKernel& kernel, const Pool& pool);

/// Overwrites the row-major (n, columns) matrix `x` with the solution of Uᵀ U y = x.
void cholesky_solve(const double* u, int64_t n, int64_t u_row, double* x, int64_t columns,
                    int64_t x_row, const PanelKernel& kernel, const Pool& pool);

}  // namespace liar
