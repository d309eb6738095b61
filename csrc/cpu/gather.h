// Parts of row-major float64 matrices by index, gathered into panels.
#pragma once

#include <cstdint>

#include "panels.h"
#include "parallel.h"

namespace liar {

/// A float64 matrix whose columns are contiguous.
struct Float64View {
  const double* data;
  int64_t row_stride;

  const double* row(int64_t i) const { return data + i * row_stride; }
};

/// Ascending places.
struct Index {
  const int64_t* at;  // null: 0, 1, 2, ...
  int64_t count;

  int64_t operator[](int64_t k) const { return at != nullptr ? at[k] : k; }
  Index slice(int64_t first, int64_t size) const { return {at + first, size}; }
};

/// Rows and columns `index` of a symmetric matrix of which the lower triangle is read.
TrianglePanels gather_triangle(const Float64View& lower, const Index& index,
                               const PanelKernel& kernel, const Pool& pool);

/// Rows `steps` and columns `features` of such a matrix.
Panels gather_symmetric(const Float64View& lower, const Index& steps, const Index& features,
                        const PanelKernel& kernel, const Pool& pool);

/// Whether every value is finite; of the second, the lower triangle of a (d, d) matrix.
bool all_finite(const Float64View& from, int64_t rows, int64_t cols, const Pool& pool);
bool lower_finite(const Float64View& from, int64_t d, const Pool& pool);

/// Rows `steps` and columns `features` of any matrix.
Panels gather(const Float64View& from, const Index& steps, const Index& features,
              const PanelKernel& kernel, const Pool& pool);

}  // namespace liar
