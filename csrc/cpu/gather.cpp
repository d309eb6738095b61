#include "gather.h"

#include <algorithm>

namespace liar {
namespace {

constexpr int64_t kTile = 64;  // rows of one task; what is turned stays in cache

int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

}  // namespace

void gather_lower(const Float64View& from, const int64_t* index, int64_t n, double* to,
                  int64_t to_row, const Pool& pool) {
  parallel_tasks(pool, tiles(n), [&](int64_t task) {
    for (int64_t j = task * kTile; j < std::min((task + 1) * kTile, n); ++j) {
      const double* row = from.data + index[j] * from.row_stride;
      for (int64_t i = 0; i <= j; ++i) to[j * to_row + i] = row[index[i]];
    }
  });
}

Workspace gather_block(const Float64View& from, const int64_t* rows, int64_t n, const int64_t* cols,
                       int64_t m, const Pool& pool) {
  Workspace result = Workspace::of_doubles(n * m);
  double* to = result.doubles();
  parallel_tasks(pool, tiles(n), [&](int64_t task) {
    const int64_t end = std::min((task + 1) * kTile, n);
    for (int64_t first = 0; first < m; first += kLine) {
      for (int64_t k = task * kTile; k < end; ++k) {
        for (int64_t p = first; p < std::min(first + kLine, m); ++p) {
          const int64_t low = std::min(rows[k], cols[p]), high = std::max(rows[k], cols[p]);
          to[k * m + p] = from.data[high * from.row_stride + low];
        }
      }
    }
  });
  return result;
}

Workspace gather_rows(const Float64View& from, const int64_t* index, int64_t n, int64_t cols) {
  Workspace to = Workspace::of_doubles(n * cols);
  for (int64_t k = 0; k < n; ++k) {
    std::copy_n(from.data + index[k] * from.row_stride, cols, to.doubles() + k * cols);
  }
  return to;
}

Workspace gather_columns_turned(const Float64View& from, int64_t rows, const int64_t* index,
                                int64_t n) {
  Workspace to = Workspace::of_doubles(n * rows);
  for (int64_t begin = 0; begin < n; begin += kTile) {
    for (int64_t o = 0; o < rows; ++o) {
      const double* row = from.data + o * from.row_stride;
      for (int64_t k = begin; k < std::min(begin + kTile, n); ++k) {
        to.doubles()[k * rows + o] = row[index[k]];
      }
    }
  }
  return to;
}

void copy_lower_to_upper(double* square, int64_t n, int64_t row, const Pool& pool) {
  parallel_tasks(pool, tiles(n), [&](int64_t task) {
    const int64_t end = std::min((task + 1) * kTile, n);
    for (int64_t first = task * kTile; first < end; first += kLine) {
      for (int64_t j = first + 1; j < n; ++j) {
        const int64_t limit = std::min({first + kLine, end, j});
        for (int64_t i = first; i < limit; ++i) square[i * row + j] = square[j * row + i];
      }
    }
  });
}

}  // namespace liar
