// Parts of row-major float64 matrices by index, of symmetric ones from their lower triangle.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "workspace.h"

namespace liar {

constexpr int64_t kLine = 8;  // doubles in a cache line

/// A float64 matrix whose columns are contiguous.
struct Float64View {
  const double* data;
  int64_t row_stride;
};

/// Lower triangle of rows and columns `index` of a symmetric matrix.
void gather_lower(const Float64View& from, const int64_t* index, int64_t n, double* to,
                  int64_t to_row, const Pool& pool);

/// Rows `rows` and columns `cols`, which have no index in common, of a symmetric matrix: (n, m).
Workspace gather_block(const Float64View& from, const int64_t* rows, int64_t n, const int64_t* cols,
                       int64_t m, const Pool& pool);

/// Rows `index`: (n, cols).
Workspace gather_rows(const Float64View& from, const int64_t* index, int64_t n, int64_t cols);

/// Columns `index`, turned: (n, rows).
Workspace gather_columns_turned(const Float64View& from, int64_t rows, const int64_t* index,
                                int64_t n);

/// The strictly lower triangle, mirrored.
void copy_lower_to_upper(double* square, int64_t n, int64_t row, const Pool& pool);

}  // namespace liar
