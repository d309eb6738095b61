#include "cholesky.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

// Both go through U in strips of kStrip rows. A strip takes in one long product what all strips
// before it contribute, and is then solved with its diagonal block:
//
//        [ U00  U01  U02 ]     U11ᵀ U11 = A11 − U01ᵀ U01
//        [      U11  U12 ]     U11ᵀ U12 = A12 − U01ᵀ U02
//        [           U22 ]
//
// U grows in the panels of A, where the rows of a strip are steps of the strips to come: U01 above
// is left and right side of the products, and the left side again when right-hand sides are solved
// for (zᵢ = Uᵢᵢ⁻ᵀ (xᵢ − Σ Uₖᵢᵀ zₖ)), in their panels too. Nothing is packed but, for the way back,
// yᵢ = Uᵢᵢ⁻¹ (zᵢ − Σ Uᵢₖ yₖ), U turned.

namespace liar {
namespace {

constexpr int64_t kStripGroup = 4;   // strips to the right of the diagonal that one task updates
constexpr int64_t kMostPanels = 40;  // of right-hand sides that one task solves
constexpr int64_t kMostRows = 8;     // of any register tile

/// Uᵀ U = a for a row-major tile; U overwrites the upper triangle.
int64_t factor_tile(double* a, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    double* pivot = a + j * kMostRows;
    if (!(pivot[j] > 0) || std::isinf(pivot[j])) return j + 1;
    pivot[j] = std::sqrt(pivot[j]);
    for (int64_t c = j + 1; c < n; ++c) pivot[c] /= pivot[j];
    for (int64_t i = j + 1; i < n; ++i) {
      for (int64_t c = i; c < n; ++c) a[i * kMostRows + c] -= pivot[i] * pivot[c];
    }
  }
  return 0;
}

/// Rows of a strip of U, turned: left(k, i) = U(begin + i, first + k) for `steps` columns of U from
/// `first`, the first of a panel.
void turn_strip(const TrianglePanels& u, int64_t strip, int64_t first, int64_t steps,
                const Panels& left) {
  const int64_t width = left.width(), begin = u.begin(strip);
  const int64_t rows = whole_tiles(u.size(strip), u.kernel());
  const int64_t columns = whole_tiles(steps, u.kernel());
  for (int64_t k = 0; k < columns; k += width) {
    const double* from = u.panel(first + k) + begin * width;
    for (int64_t i = 0; i < rows; i += width) {
      turn(from + i * width, width, std::min(width, rows - i), std::min(width, columns - k),
           left.panel(i / width) + k * width, width);
    }
  }
}

}  // namespace

Cholesky::Cholesky(TrianglePanels a, const Pool& pool)
    : u_(std::move(a)), inverse_(static_cast<size_t>(whole_tiles(u_.n(), u_.kernel())), 1.0) {
  for (int64_t strip = 0; strip < u_.strips() && code_ == 0; ++strip) {
    code_ = factor_strip(strip, pool);
  }
}

int64_t Cholesky::factor_strip(int64_t strip, const Pool& pool) {
  const PanelKernel& kernel = u_.kernel();
  const int64_t begin = u_.begin(strip), rows = u_.size(strip);
  const Packed left = u_.strip(strip);
  multiply(left, left, begin, {0, rows, 0, rows}, -1, u_.output(strip).from_row(begin),
           Triangle::kUpper, kernel);
  const int64_t failed = factor_diagonal(strip);
  if (failed != 0) return begin + failed;
  const auto* diagonal = reinterpret_cast<const double*>(left.from_step(begin, kernel).panels);
  const int64_t later = u_.strips() - strip - 1;
  parallel_tasks(pool, (later + kStripGroup - 1) / kStripGroup, [&](int64_t task) {
    const int64_t from = strip + 1 + task * kStripGroup;
    for (int64_t s = from; s < std::min(from + kStripGroup, u_.strips()); ++s) {
      multiply(left, u_.strip(s), begin, {0, rows, 0, u_.size(s)}, -1, u_.output(s).from_row(begin),
               Triangle::kAll, kernel);
      for (int64_t j = u_.begin(s); j < u_.end(s); j += kernel.panel) {
        const int64_t live = std::min(kernel.panel, u_.end(s) - j);
        kernel.solve({diagonal, left.stride, &inverse_[static_cast<size_t>(begin)],
                      u_.panel(j) + begin * kernel.panel, live, 0, rows, 0, rows, false});
      }
    }
  });
  return 0;
}

/// A register tile of rows at a time: what the rows above contribute to its own tile on the
/// diagonal, the factor of that, and the rest of the rows by substitution.
int64_t Cholesky::factor_diagonal(int64_t strip) {
  const PanelKernel& kernel = u_.kernel();
  const int64_t begin = u_.begin(strip), size = u_.size(strip), width = kernel.panel;
  const Output block = u_.output(strip).from_row(begin);
  const Packed packed = u_.strip(strip).from_step(begin, kernel);
  double* inverse = &inverse_[static_cast<size_t>(begin)];
  for (int64_t i = 0; i < size; i += kernel.rows) {
    const int64_t rows = std::min(kernel.rows, size - i), first = i / width * width;
    multiply(packed, packed, i, {i, i + rows, first, std::min(first + width, size)}, -1, block,
             Triangle::kUpper, kernel);
    double* corner = block.data + i / width * block.panel + i * width + i % width;
    double tile[kMostRows * kMostRows];
    const auto exchange = [&](bool out) {
      for (int64_t r = 0; r < rows; ++r) {
        double* kept = tile + r * kMostRows + r;
        double* there = corner + r * width + r;
        std::copy_n(out ? kept : there, rows - r, out ? there : kept);
      }
    };
    exchange(false);
    const int64_t failed = factor_tile(tile, rows);
    if (failed != 0) return i + failed;
    for (int64_t r = 0; r < rows; ++r) inverse[i + r] = 1 / tile[r * (kMostRows + 1)];
    exchange(true);
    for (int64_t j = (size - 1) / width * width; j >= first; j -= width) {
      // The tile's own panel comes last and has taken in the rows above already.
      kernel.solve({block.data, packed.stride, inverse, block.data + j / width * block.panel,
                    std::min(width, size - j), i, i + rows, j == first ? i : 0, i, false});
    }
    exchange(true);  // the substitution went over the tile itself
  }
  return 0;
}

double Cholesky::least() const {
  return u_.n() == 0 ? 1 : 1 / *std::max_element(inverse_.begin(), inverse_.begin() + u_.n());
}

double Cholesky::largest() const {
  return u_.n() == 0 ? 1 : 1 / *std::min_element(inverse_.begin(), inverse_.begin() + u_.n());
}

void Cholesky::solve(Panels& x, const Pool& pool) const {
  const int64_t share = std::min(kMostPanels, (x.count() + pool.threads - 1) / pool.threads);
  if (x.count() == 0) return;
  parallel_tasks(pool, (x.count() + share - 1) / share, [&](int64_t task) {
    const int64_t first = task * share;
    solve_panels(x, first, std::min(share, x.count() - first));
  });
}

void Cholesky::solve_panels(Panels& x, int64_t first, int64_t count) const {
  const PanelKernel& kernel = u_.kernel();
  const int64_t n = u_.n(), width = kernel.panel;
  const int64_t columns = std::min(count * width, x.features() - first * width);
  const Packed right = x.packed(first);
  const Output out{x.panel(first), width, x.output().panel};
  const Panels left(std::min(kSteps, n), std::min(kStrip, n), kernel);
  const auto substitute = [&](int64_t strip, const double* diagonal, int64_t stride,
                              bool backward) {
    const int64_t begin = u_.begin(strip), rows = u_.size(strip);
    for (int64_t j = 0; j < columns; j += width) {
      kernel.solve({diagonal, stride, &inverse_[static_cast<size_t>(begin)],
                    out.from_row(begin).data + j / width * out.panel, std::min(width, columns - j),
                    0, rows, 0, rows, backward});
    }
  };
  for (int64_t strip = 0; strip < u_.strips(); ++strip) {
    const int64_t begin = u_.begin(strip);
    const Packed rows = u_.strip(strip);
    multiply(rows, right, begin, {0, u_.size(strip), 0, columns}, -1, out.from_row(begin),
             Triangle::kAll, kernel);
    substitute(strip, reinterpret_cast<const double*>(rows.from_step(begin, kernel).panels),
               rows.stride, false);
  }
  for (int64_t strip = u_.strips() - 1; strip >= 0; --strip) {
    const int64_t begin = u_.begin(strip);
    for (int64_t k = u_.end(strip); k < n; k += kSteps) {
      const int64_t steps = std::min(kSteps, n - k);
      turn_strip(u_, strip, k, steps, left);
      multiply(left.packed(), right.from_step(k, kernel), steps, {0, u_.size(strip), 0, columns},
               -1, out.from_row(begin), Triangle::kAll, kernel);
    }
    turn_strip(u_, strip, begin, u_.size(strip), left);
    substitute(strip, left.panel(0), left.stride(), true);
  }
}

int64_t factor_upper(double* a, int64_t n, const PanelKernel& kernel, const Pool& pool) {
  const Cholesky factor(TrianglePanels(a, n, n, kernel), pool);
  for (int64_t i = 0; i < n; ++i) factor.factor().write_step(i, a + i * n);
  return factor.code();
}

Panels square_root(const Panels& s, const Pool& pool) {
  const int64_t n = s.features(), width = s.width();
  std::vector<double> scale;
  for (int64_t i = 0; i < n; ++i) scale.push_back(std::sqrt(s.at(i, i)));
  TrianglePanels scaled(n, s.kernel());
  for (int64_t j = 0; j < n; ++j) {
    const double* from = &s.at(0, j);
    double* to = &scaled.at(0, j);
    for (int64_t i = 0; i < j; ++i) {
      const double size = scale[static_cast<size_t>(i)] * scale[static_cast<size_t>(j)];
      to[i * width] = size > 0 ? from[i * width] / size : 0;
    }
    to[j * width] = 1 + static_cast<double>(n) * std::numeric_limits<double>::epsilon();
  }
  const Cholesky factor(std::move(scaled), pool);
  if (factor.code() != 0) return Panels();
  Panels upper(n, n, s.kernel());
  upper.fill_zero();
  for (int64_t j = 0; j < n; ++j) {
    const double* from = &factor.factor().at(0, j);
    double* to = &upper.at(0, j);
    for (int64_t i = 0; i <= j; ++i) {
      to[i * width] = from[i * width] * scale[static_cast<size_t>(j)];
    }
  }
  return upper.turned();
}

}  // namespace liar
