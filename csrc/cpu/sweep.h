// The inverse of a symmetric positive definite matrix, in place.
#pragma once

#include <cstdint>

#include "panel_kernel.h"
#include "parallel.h"

namespace liar {

/// The first n values of row i of a symmetric matrix, row-major with rows of `width`, of which the
/// lower triangle is read.
void read_symmetric_row(const double* lower, int64_t width, int64_t i, int64_t n, double* row);

/// Overwrites the lower triangle of a, (d, d) and row-major, by that of its inverse, and sets the
/// square of the ratio of the extreme values on the diagonal of the Cholesky factor of a. Returns
/// the order of the first leading minor that is not positive definite, or 0; a is then spoilt.
int64_t invert_lower(double* a, int64_t d, double* condition, const PanelKernel& kernel,
                     const Pool& pool);

}  // namespace liar
