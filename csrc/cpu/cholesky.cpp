#include "cholesky.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dense.h"

// Both halve the problem until kSolveRows unknowns are left, so that nearly all work is in
// products:
//
//      U  =  [ U11 U12 ]     factor:   U11ᵀ U11 = A11,  U11ᵀ U12 = A12,  U22ᵀ U22 = A22 − U12ᵀ U12
//            [     U22 ]     forward:  U11ᵀ z1 = x1,    U22ᵀ z2 = x2 − U12ᵀ z1
//                            backward: U22 y2 = z2,     U11 y1 = z1 − U12 y2
//
// U is kept as the upper triangle by rows, because then the rows of U12 and of the right-hand sides
// are packed as they lie. Only the backward solve needs U12 turned.

namespace liar {
namespace {

constexpr int64_t kColumns = 480;  // right-hand sides that one task solves
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

void solve(const double* u, int64_t n, int64_t u_row, double* x, int64_t columns, int64_t x_row,
           Way way, const PanelKernel& kernel) {
  if (n <= kSolveRows) return substitute(u, n, u_row, x, columns, x_row, way, kernel);
  const int64_t h = half(n);
  const double* u22 = u + h * u_row + h;
  double* x2 = x + h * x_row;
  if (way == Way::kForward) {
    solve(u, h, u_row, x, columns, x_row, way, kernel);
    add_product({{u + h, u_row}, {x, x_row}, h, n - h, columns, -1, x2, x_row}, kernel, kAlone);
    solve(u22, n - h, u_row, x2, columns, x_row, way, kernel);
  } else {
    solve(u22, n - h, u_row, x2, columns, x_row, way, kernel);
    add_product({{u + h, 1, u_row}, {x2, x_row}, n - h, h, columns, -1, x, x_row}, kernel, kAlone);
    solve(u, h, u_row, x, columns, x_row, way, kernel);
  }
}

/// Solves for all columns: those of one task do not depend on those of another.
void solve_columns(const double* u, int64_t n, int64_t u_row, double* x, int64_t columns,
                   int64_t x_row, bool forward, bool backward, const PanelKernel& kernel,
                   const Pool& pool) {
  parallel_tasks(pool, (columns + kColumns - 1) / kColumns, [&](int64_t task) {
    double* first = x + task * kColumns;
    const int64_t width = std::min(kColumns, columns - task * kColumns);
    if (forward) solve(u, n, u_row, first, width, x_row, Way::kForward, kernel);
    if (backward) solve(u, n, u_row, first, width, x_row, Way::kBackward, kernel);
  });
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

}  // namespace

int64_t cholesky(double* a, int64_t n, int64_t row, const PanelKernel& kernel, const Pool& pool) {
  if (n <= kSolveRows) return factor_small(a, n, row);
  const int64_t h = half(n);
  const int64_t first = cholesky(a, h, row, kernel, pool);
  if (first != 0) return first;
  double* u12 = a + h;
  double* a22 = a + h * row + h;
  solve_columns(a, h, row, u12, n - h, row, true, false, kernel, pool);
  add_product({{u12, row}, {u12, row}, h, n - h, n - h, -1, a22, row, Triangle::kUpper}, kernel,
              pool);
  const int64_t second = cholesky(a22, n - h, row, kernel, pool);
  return second == 0 ? 0 : h + second;
}

void cholesky_solve(const double* u, int64_t n, int64_t u_row, double* x, int64_t columns,
                    int64_t x_row, const PanelKernel& kernel, const Pool& pool) {
  solve_columns(u, n, u_row, x, columns, x_row, true, true, kernel, pool);
}

}  // namespace liar
