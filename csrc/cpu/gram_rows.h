// Which rows an update of a Gram matrix takes, and where they lie.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gram.h"

namespace liar {

/// The rows whose weight lets them in; what they hold has not been looked at.
struct ChosenRows {
  std::vector<int64_t> index;  // rows to read; empty and `all` set: every row
  std::vector<double> weight;  // per entry of index; empty: all 1
  bool all = false;
  int64_t size = 0;
  double weight_sum = 0, dropped = 0;
};

ChosenRows choose_rows(const GramUpdate& update);

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

/// Pointers to contiguous rows: into the matrix itself, or into `scratch` where columns are
/// strided.
struct RowReader {
  RowReader(const MatrixView& matrix) : m(matrix), bytes(bytes_of(matrix.dtype)) {
    if (m.col_stride != 1 && m.cols > 1)
      scratch.resize(static_cast<size_t>(kPackRows * m.cols * bytes));
  }
  const void* read(int64_t row, int64_t place) {
    const char* source = static_cast<const char*>(m.data) + row * m.row_stride * bytes;
    if (scratch.empty()) return source;
    char* target = scratch.data() + place * m.cols * bytes;
    for (int64_t c = 0; c < m.cols; ++c) {
      std::copy_n(source + c * m.col_stride * bytes, bytes, target + c * bytes);
    }
    return target;
  }
  const MatrixView& m;
  int64_t bytes;
  std::vector<char> scratch;
};

}  // namespace liar
