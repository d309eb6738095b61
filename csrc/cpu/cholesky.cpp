#include "cholesky.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

// Both go through U in strips of kStrip rows. A strip takes in one long product what all strips
// before it contribute, and is then solved with its diagonal block:
//
//        [ U00  U01  U02 ]     U11ᵀ U11 = A11 − U01ᵀ U01
//        [      U11  U12 ]     U11ᵀ U12 = A12 − U01ᵀ U02
//        [           U22 ]
//
// A finished strip is packed once, as steps of the strips to come: U01 above is left and right side
// of the products, and the left side again when right-hand sides are solved for (zᵢ = Uᵢᵢ⁻ᵀ (xᵢ −
// Σ Uₖᵢᵀ zₖ)). Only the way back, yᵢ = Uᵢᵢ⁻¹ (zᵢ − Σ Uᵢₖ yₖ), needs U turned.
//
// Within a diagonal block the problem is halved until kSolveRows unknowns are left, which stay in
// registers:
//
//            factor:   U11ᵀ U11 = A11,  U11ᵀ U12 = A12,  U22ᵀ U22 = A22 − U12ᵀ U12
//            forward:  U11ᵀ z1 = x1,    U22ᵀ z2 = x2 − U12ᵀ z1
//            backward: U22 y2 = z2,     U11 y1 = z1 − U12 y2

namespace liar {
namespace {

constexpr int64_t kColumns = 480;   // right-hand sides that one task solves
constexpr int64_t kStripGroup = 4;  // strips to the right of the diagonal that one task updates
constexpr Pool kAlone{};

int64_t half(int64_t n) {
  const int64_t tiles = (n + kSolveRows - 1) / kSolveRows;
  return (tiles + 1) / 2 * kSolveRows;
}

enum class Way { kForward, kBackward };

/// Substitution with the whole of u (n ≤ kSolveRows); padded with unknowns that nothing depends on.
void substitute(const double* u, int64_t n, int64_t u_row, double* x, int64_t columns,
                int64_t x_row, Way way, const PanelKernel& kernel) {
  double factor[kSolveRows * kSolveRows] = {}, inverse[kSolveRows];
  double* rows[kSolveRows];
  std::vector<double> unused(n < kSolveRows ? static_cast<size_t>(columns) : 0, 0.0);
  std::fill_n(inverse, kSolveRows, 1.0);
  std::fill_n(rows, kSolveRows, unused.data());
  for (int64_t place = 0; place < n; ++place) {
    const int64_t j = way == Way::kForward ? place : n - 1 - place;
    rows[place] = x + j * x_row;
    inverse[place] = 1 / u[j * u_row + j];
    for (int64_t later = place + 1; later < n; ++later) {
      const int64_t i = way == Way::kForward ? later : n - 1 - later;
      factor[place * kSolveRows + later] =
          way == Way::kForward ? u[j * u_row + i] : u[i * u_row + j];
    }
  }
  kernel.substitute({factor, inverse, rows, columns});
}

void solve_block(const double* u, int64_t n, int64_t u_row, double* x, int64_t columns,
                 int64_t x_row, Way way, const PanelKernel& kernel) {
  if (n <= kSolveRows) return substitute(u, n, u_row, x, columns, x_row, way, kernel);
  const int64_t h = half(n);
  const double* u22 = u + h * u_row + h;
  double* x2 = x + h * x_row;
  if (way == Way::kForward) {
    solve_block(u, h, u_row, x, columns, x_row, way, kernel);
    add_product({{u + h, u_row}, {x, x_row}, h, n - h, columns, -1, x2, x_row}, kernel, kAlone);
    solve_block(u22, n - h, u_row, x2, columns, x_row, way, kernel);
  } else {
    solve_block(u22, n - h, u_row, x2, columns, x_row, way, kernel);
    add_product({{u + h, 1, u_row}, {x2, x_row}, n - h, h, columns, -1, x, x_row}, kernel, kAlone);
    solve_block(u, h, u_row, x, columns, x_row, way, kernel);
  }
}

int64_t factor_small(double* a, int64_t n, int64_t row) {
  for (int64_t j = 0; j < n; ++j) {
    double* pivot = a + j * row;
    if (!(pivot[j] > 0) || std::isinf(pivot[j])) return j + 1;
    pivot[j] = std::sqrt(pivot[j]);
    for (int64_t c = j + 1; c < n; ++c) pivot[c] /= pivot[j];
    for (int64_t i = j + 1; i < n; ++i) {
      for (int64_t c = i; c < n; ++c) a[i * row + c] -= pivot[i] * pivot[c];
    }
  }
  return 0;
}

int64_t factor(double* a, int64_t n, int64_t row, const PanelKernel& kernel) {
  if (n <= kSolveRows) return factor_small(a, n, row);
  const int64_t h = half(n);
  const int64_t first = factor(a, h, row, kernel);
  if (first != 0) return first;
  double* u12 = a + h;
  double* a22 = a + h * row + h;
  solve_block(a, h, row, u12, n - h, row, Way::kForward, kernel);
  add_product({{u12, row}, {u12, row}, h, n - h, n - h, -1, a22, row, Triangle::kUpper}, kernel,
              kAlone);
  const int64_t second = factor(a22, n - h, row, kernel);
  return second == 0 ? 0 : h + second;
}

}  // namespace

Cholesky::Cholesky(double* a, int64_t n, int64_t row, const PanelKernel& kernel, const Pool& pool)
    : u_(a), row_(row), layout_{n, kernel}, panels_(n > kStrip ? layout_.bytes() : 0) {
  for (int64_t strip = 0; strip < layout_.count() && code_ == 0; ++strip) {
    code_ = factor_strip(strip, pool);
  }
}

int64_t Cholesky::factor_strip(int64_t strip, const Pool& pool) {
  const PanelKernel& kernel = layout_.kernel;
  const int64_t begin = layout_.begin(strip), rows = layout_.size(strip);
  double* first = u_ + begin * row_;
  const auto panels = [&](int64_t s) {
    return Packed{panels_.data() + layout_.offset(s), layout_.stride(s)};
  };
  multiply(panels(strip), panels(strip), begin, rows, rows, -1, first + begin, row_,
           Triangle::kUpper, kernel);
  const int64_t failed = factor(first + begin, rows, row_, kernel);
  if (failed != 0) return begin + failed;
  const int64_t later = layout_.count() - strip - 1;
  parallel_tasks(pool, (later + kStripGroup - 1) / kStripGroup, [&](int64_t task) {
    const int64_t from = strip + 1 + task * kStripGroup;
    const int64_t to = std::min(from + kStripGroup, layout_.count());
    for (int64_t s = from; s < to; ++s) {
      multiply(panels(strip), panels(s), begin, rows, layout_.size(s), -1, first + layout_.begin(s),
               row_, Triangle::kAll, kernel);
    }
    const int64_t column = layout_.begin(from);
    solve_block(first + begin, rows, row_, first + column, layout_.end(to - 1) - column, row_,
                Way::kForward, kernel);
    for (int64_t s = from; s < to; ++s) {
      pack({first + layout_.begin(s), row_}, rows, layout_.size(s),
           panels_.data() + layout_.offset(s), layout_.stride(s), begin, kernel);
    }
  });
  return 0;
}

void Cholesky::solve(double* x, int64_t columns, int64_t x_row, const Pool& pool) const {
  parallel_tasks(pool, (columns + kColumns - 1) / kColumns, [&](int64_t task) {
    const int64_t first = task * kColumns;
    solve_columns(x + first, std::min(kColumns, columns - first), x_row);
  });
}

void Cholesky::solve_columns(double* x, int64_t columns, int64_t x_row) const {
  const PanelKernel& kernel = layout_.kernel;
  const int64_t n = layout_.n, strips = layout_.count();
  const int64_t stride = panel_stride(n, kernel);
  const int64_t left_stride = panel_stride(kSteps, kernel);
  Workspace solved(strips > 1 ? (columns + kernel.panel - 1) / kernel.panel * stride : 0);
  Workspace left(strips > 1 ? kStrip / kernel.panel * left_stride : 0);
  const Packed right{solved.data(), stride};
  const auto finish = [&](int64_t strip, Way way, bool needed) {
    const int64_t begin = layout_.begin(strip), rows = layout_.size(strip);
    solve_block(u_ + begin * (row_ + 1), rows, row_, x + begin * x_row, columns, x_row, way,
                kernel);
    if (needed) {
      pack({x + begin * x_row, x_row}, rows, columns, solved.data(), stride, begin, kernel);
    }
  };
  for (int64_t strip = 0; strip < strips; ++strip) {
    const int64_t begin = layout_.begin(strip);
    multiply({panels_.data() + layout_.offset(strip), layout_.stride(strip)}, right, begin,
             layout_.size(strip), columns, -1, x + begin * x_row, x_row, Triangle::kAll, kernel);
    finish(strip, Way::kForward, strip + 1 < strips);
  }
  for (int64_t strip = strips - 1; strip >= 0; --strip) {
    const int64_t begin = layout_.begin(strip), rows = layout_.size(strip);
    for (int64_t k = layout_.end(strip); k < n; k += kSteps) {
      const int64_t steps = std::min(kSteps, n - k);
      pack({u_ + begin * row_ + k, 1, row_}, steps, rows, left.data(), left_stride, 0, kernel);
      multiply({left.data(), left_stride}, right.from_step(k, kernel), steps, rows, columns, -1,
               x + begin * x_row, x_row, Triangle::kAll, kernel);
    }
    finish(strip, Way::kBackward, strip > 0);
  }
}

Workspace square_root(const double* s, int64_t n, const PanelKernel& kernel, const Pool& pool) {
  std::vector<double> scale;
  for (int64_t i = 0; i < n; ++i) {
    scale.push_back(s[i * (n + 1)] > 0 ? std::sqrt(s[i * (n + 1)]) : 1);
  }
  Workspace root = Workspace::of_doubles(n * n);
  double* u = root.doubles();
  std::fill_n(u, n * n, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i + 1; j < n; ++j) {
      u[i * n + j] = s[i * n + j] / (scale[static_cast<size_t>(i)] * scale[static_cast<size_t>(j)]);
    }
    u[i * (n + 1)] = 1 + static_cast<double>(n) * std::numeric_limits<double>::epsilon();
  }
  if (Cholesky(u, n, n, kernel, pool).code() != 0) return Workspace();
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i; j < n; ++j) u[i * n + j] *= scale[static_cast<size_t>(j)];
  }
  return root;
}

}  // namespace liar
