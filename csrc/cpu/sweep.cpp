// A block of pivots S is swept at a time:
//
//     A_pp = S → −S⁻¹     A_pr → S⁻¹ A_pr     A_rr → A_rr − A_rp S⁻¹ A_pr
//
// which ends in −A⁻¹. The diagonals of the factors of all S are those of the factor of A.
#include "sweep.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "cholesky.h"
#include "dense.h"
#include "panels.h"

namespace liar {
namespace {

constexpr int64_t kSweepRows = 128;

}  // namespace

void read_symmetric_row(const double* lower, int64_t width, int64_t i, int64_t n, double* row) {
  std::copy_n(lower + i * width, i + 1, row);
  for (int64_t j = i + 1; j < n; ++j) row[j] = lower[j * width + i];
}

int64_t invert_lower(double* a, int64_t d, double* condition, const PanelKernel& kernel,
                     const Pool& pool) {
  double low = 0, high = 0;
  std::vector<double> row(static_cast<size_t>(d));
  for (int64_t first = 0; first < d; first += kSweepRows) {
    const int64_t n = std::min(kSweepRows, d - first);
    Panels rows(n, d, kernel);
    TrianglePanels pivot(n, kernel);
    for (int64_t i = 0; i < n; ++i) {
      read_symmetric_row(a, d, first + i, d, row.data());
      pivot.read_step(i, row.data() + first);
      std::fill_n(row.begin() + first, n, 0.0);
      row[static_cast<size_t>(first + i)] = -1;
      rows.read_step(i, row.data());
    }
    const Cholesky factor(std::move(pivot), pool);
    if (factor.code() != 0) return first + factor.code();
    low = first == 0 ? factor.least() : std::min(low, factor.least());
    high = std::max(high, factor.largest());
    Panels solved = rows.copy();
    factor.solve(solved, pool);
    add_product(rows, solved, -1, {a, d, kernel.panel}, Triangle::kLower, pool);
    for (int64_t i = 0; i < n; ++i) {
      solved.write_step(i, row.data());
      std::copy_n(row.data(), first + i + 1, a + (first + i) * d);
      for (int64_t j = first + n; j < d; ++j) a[j * d + first + i] = row[static_cast<size_t>(j)];
    }
  }
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j <= i; ++j) a[i * d + j] = -a[i * d + j];
  }
  *condition = high / low * (high / low);
  return 0;
}

}  // namespace liar
