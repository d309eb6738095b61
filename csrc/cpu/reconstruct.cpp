#include "reconstruct.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cholesky.h"
#include "dense.h"

// Everything that does not depend on λ is computed once; a λ then costs one factorisation, one
// solve with as few right-hand sides as possible, and one triangular product for the held-out
// error.
//
// Plain form. Where fewer features go than the layer has outputs (n_P < d_out), the n_P columns of
// G_KP are the cheaper right-hand side: X = (G_KK + Λ)⁻¹ G_KP is the transfer turned, Dᵀ = X W_Pᵀ.
// Otherwise X = Dᵀ itself. With S = W_Pᵀ W_P, and V = X S or X:
//
//      tr(D G_KK Dᵀ) = ⟨V, Q⟩ − Λ ⟨V, X⟩          Q the right-hand side, because G_KK X = Q − Λ X
//      error         = ⟨S, G_PP⟩ − ⟨V, Q⟩ − Λ ⟨V, X⟩
//      held-out      = ⟨S, H_PP⟩ − 2 ⟨V, Q_H⟩ + ⟨V, H_KK X⟩
//
// Dense targets. Q = C_K − G_KK W_Kᵀ, Y = W_Kᵀ + X, and G_KK Y = C_K − Λ X:
//
//      error         = −⟨Y, C_K + Λ X⟩
//      held-out      = ⟨Y, H_KK Y⟩ − 2 ⟨Y, C_H,K⟩
//
// H is symmetric, so ⟨V, H X⟩ = 2 ⟨V, U X⟩ with U its triangle and half its diagonal whenever V is
// symmetric in X: half the work.

namespace liar {
namespace {

using Values = std::vector<double>;

constexpr int64_t kSideBySide = 1024;  // sites that keep more than this are solved in turn
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

Values zeros(int64_t count) { return Values(static_cast<size_t>(count), 0.0); }

double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

double at(const Float64View& lower, int64_t i, int64_t j) {
  return i >= j ? lower.data[i * lower.row_stride + j] : lower.data[j * lower.row_stride + i];
}

class Solver {
 public:
  Solver(const Reconstruct& args, const PanelKernel& panel_kernel, const Pool& thread_pool)
      : a(args), kernel(panel_kernel), pool(thread_pool) {
    std::vector<char> stays(static_cast<size_t>(a.d), 0);
    for (int64_t k = 0; k < a.n; ++k) stays[static_cast<size_t>(a.kept[k])] = 1;
    for (int64_t i = 0; i < a.d; ++i) {
      if (stays[static_cast<size_t>(i)] == 0) removed.push_back(i);
    }
    n_removed = static_cast<int64_t>(removed.size());
    dense = a.cross != nullptr;
    transfer = !dense && n_removed < a.d_out;
    width = transfer ? n_removed : a.d_out;
  }

  void run() {
    gram = kept_triangle(a.gram, 1.0);
    if (a.holdout != nullptr) holdout = kept_triangle(*a.holdout, 0.5);
    if (dense) {
      prepare_dense();
    } else {
      prepare_plain();
    }
    double mean = 0;
    for (int64_t k = 0; k < a.n; ++k) mean += gram[at_diagonal(k)];
    mean = a.n > 0 ? mean / static_cast<double>(a.n) : 1;
    if (mean == 0) mean = 1;
    for (int64_t l = 0; l < a.ladder; ++l) solve_one(l, a.damps[l], a.damps[l] * mean);
  }

 private:
  size_t at_diagonal(int64_t k) const { return static_cast<size_t>(k * a.n + k); }

  /// The upper triangle by rows of the kept block, its diagonal times `diagonal`; zero below.
  Values kept_triangle(const Float64View& from, double diagonal) const {
    Values to = zeros(a.n * a.n);
    constexpr int64_t kTile = 64;  // both sides of the turn stay in cache
    parallel_tasks(pool, (a.n + kTile - 1) / kTile, [&](int64_t task) {
      const int64_t begin = task * kTile, end = std::min(begin + kTile, a.n);
      for (int64_t other = begin; other < a.n; other += kTile) {
        for (int64_t j = other; j < std::min(other + kTile, a.n); ++j) {
          const double* row = from.data + a.kept[j] * from.row_stride;
          for (int64_t i = begin; i < std::min(end, j + 1); ++i) {
            to[static_cast<size_t>(i * a.n + j)] = row[a.kept[i]];
          }
        }
      }
    });
    for (int64_t k = 0; k < a.n; ++k) to[at_diagonal(k)] *= diagonal;
    return to;
  }

  /// Rows K and columns P of a Gram matrix, (n, n_P).
  Values kept_by_removed(const Float64View& from) const {
    Values to = zeros(a.n * n_removed);
    parallel_tasks(pool, a.n, [&](int64_t k) {
      for (int64_t p = 0; p < n_removed; ++p) {
        to[static_cast<size_t>(k * n_removed + p)] =
            at(from, a.kept[k], removed[static_cast<size_t>(p)]);
      }
    });
    return to;
  }

  /// Columns K of the weights, turned: (n, d_out).
  Values turned_kept_weight() const {
    Values to = zeros(a.n * a.d_out);
    for (int64_t o = 0; o < a.d_out; ++o) {
      for (int64_t k = 0; k < a.n; ++k) {
        to[static_cast<size_t>(k * a.d_out + o)] =
            a.weight.data[o * a.weight.row_stride + a.kept[k]];
      }
    }
    return to;
  }

  /// Rows K of a cross-Gram matrix, (n, d_out).
  Values kept_rows(const Float64View& from) const {
    Values to = zeros(a.n * a.d_out);
    for (int64_t k = 0; k < a.n; ++k) {
      std::copy_n(from.data + a.kept[k] * from.row_stride, a.d_out, to.data() + k * a.d_out);
    }
    return to;
  }

  /// ⟨S, M_PP⟩ from lower triangles.
  double removed_energy(const Float64View& from) const {
    double sum = 0;
    for (int64_t p = 0; p < n_removed; ++p) {
      const double* row = from.data + removed[static_cast<size_t>(p)] * from.row_stride;
      const double* s = metric.data() + p * n_removed;
      for (int64_t q = 0; q < p; ++q) sum += 2 * s[q] * row[removed[static_cast<size_t>(q)]];
      sum += s[p] * row[removed[static_cast<size_t>(p)]];
    }
    return sum;
  }

  /// G_KP, or G_KP W_Pᵀ.
  Values plain_side(const Float64View& from) const {
    Values block = kept_by_removed(from);
    if (transfer) return block;
    Values side = zeros(a.n * width);
    add_product({{block.data(), 1, n_removed},
                 {removed_weight.data(), 1, n_removed},
                 n_removed,
                 a.n,
                 width,
                 1,
                 side.data(),
                 width},
                kernel, pool);
    return side;
  }

  void prepare_plain() {
    removed_weight = zeros(a.d_out * n_removed);
    for (int64_t o = 0; o < a.d_out; ++o) {
      for (int64_t p = 0; p < n_removed; ++p) {
        removed_weight[static_cast<size_t>(o * n_removed + p)] =
            a.weight.data[o * a.weight.row_stride + removed[static_cast<size_t>(p)]];
      }
    }
    metric = zeros(n_removed * n_removed);
    const Operand rows{removed_weight.data(), n_removed};
    add_product(
        {rows, rows, a.d_out, n_removed, n_removed, 1, metric.data(), n_removed, Triangle::kLower},
        kernel, pool);
    for (int64_t p = 0; p < n_removed; ++p) {
      for (int64_t q = 0; q < p; ++q) {
        metric[static_cast<size_t>(q * n_removed + p)] =
            metric[static_cast<size_t>(p * n_removed + q)];
      }
    }
    side = plain_side(a.gram);
    removed_error = removed_energy(a.gram);
    if (a.holdout == nullptr) return;
    holdout_side = plain_side(*a.holdout);
    removed_holdout = removed_energy(*a.holdout);
  }

  void prepare_dense() {
    kept_weight = turned_kept_weight();
    cross = kept_rows(*a.cross);
    if (a.holdout_cross != nullptr) holdout_side = kept_rows(*a.holdout_cross);
    // G_KK W_Kᵀ = U W_Kᵀ + Uᵀ W_Kᵀ with the diagonal halved, U turned by swapping its strides.
    Values triangle = gram;
    for (int64_t k = 0; k < a.n; ++k) triangle[at_diagonal(k)] *= 0.5;
    side = cross;
    const Operand right{kept_weight.data(), width};
    const double* u = triangle.data();
    add_product({{u, a.n, 1}, right, a.n, a.n, width, -1, side.data(), width}, kernel, pool);
    add_product({{u, 1, a.n}, right, a.n, a.n, width, -1, side.data(), width}, kernel, pool);
  }

  void solve_one(int64_t l, double damp, double shift) {
    double code = 0, condition = 1;
    const bool drop = std::isinf(damp) || a.n == 0;
    Values x;
    if (!drop) {
      if (factor.empty()) factor = zeros(a.n * a.n);
      for (int64_t k = 0; k < a.n; ++k) {
        std::copy(gram.begin() + k * a.n + k, gram.begin() + (k + 1) * a.n,
                  factor.begin() + k * a.n + k);
      }
      for (int64_t k = 0; k < a.n; ++k) factor[at_diagonal(k)] += shift;
      code = static_cast<double>(cholesky(factor.data(), a.n, a.n, kernel, pool));
      if (code == 0) {
        double low = factor[0], high = factor[0];
        for (int64_t k = 0; k < a.n; ++k) {
          low = std::min(low, factor[at_diagonal(k)]);
          high = std::max(high, factor[at_diagonal(k)]);
        }
        condition = high / low * (high / low);
        x = side;
        cholesky_solve(factor.data(), a.n, a.n, x.data(), width, width, kernel, pool);
      }
    }
    a.info_out[2 * l] = code;
    a.info_out[2 * l + 1] = code == 0 ? condition : kNan;
    if (code != 0) {
      a.error_out[l] = kNan;
      if (a.holdout != nullptr) a.holdout_out[l] = kNan;
      if (a.weight_out != nullptr)
        std::fill_n(a.weight_out + l * a.d_out * a.n, a.d_out * a.n, kNan);
      return;
    }
    if (dense) {
      certify_dense(l, x, shift);
    } else {
      certify_plain(l, x, shift);
    }
    if (a.weight_out != nullptr) write_weight(a.weight_out + l * a.d_out * a.n, x);
  }

  /// ⟨v, H_KK x⟩.
  double holdout_quadratic(const Values& v, const Values& x) const {
    const Product product{{holdout.data(), a.n}, {x.data(), width}, a.n, a.n, width, 1, nullptr, 0};
    return 2 * dot_product(product, /*a_upper=*/true, v.data(), width, kernel, pool);
  }

  void certify_plain(int64_t l, const Values& x, double shift) const {
    a.error_out[l] = removed_error;
    if (a.holdout != nullptr) a.holdout_out[l] = removed_holdout;
    if (x.empty()) return;
    Values weighted;
    if (transfer) {
      weighted = zeros(a.n * width);
      add_product({{x.data(), 1, width},
                   {metric.data(), width},
                   width,
                   a.n,
                   width,
                   1,
                   weighted.data(),
                   width},
                  kernel, pool);
    }
    const Values& v = transfer ? weighted : x;
    a.error_out[l] = std::max(0.0, removed_error - dot(v, side) - shift * dot(v, x));
    if (a.holdout != nullptr) {
      a.holdout_out[l] += holdout_quadratic(v, x) - 2 * dot(v, holdout_side);
    }
  }

  void certify_dense(int64_t l, const Values& x, double shift) const {
    Values y = kept_weight;
    Values pulled = cross;  // C_K + Λ X; without X: C_K + Q, the limit of Λ X
    for (size_t i = 0; i < y.size(); ++i) {
      pulled[i] += x.empty() ? side[i] : shift * x[i];
      if (!x.empty()) y[i] += x[i];
    }
    a.error_out[l] = -dot(y, pulled);
    if (a.holdout != nullptr) a.holdout_out[l] = holdout_quadratic(y, y) - 2 * dot(y, holdout_side);
  }

  /// W' = W_K + D, (d_out, n).
  void write_weight(double* out, const Values& x) const {
    for (int64_t o = 0; o < a.d_out; ++o) {
      const double* w = a.weight.data + o * a.weight.row_stride;
      for (int64_t k = 0; k < a.n; ++k) out[o * a.n + k] = w[a.kept[k]];
    }
    if (x.empty()) return;
    if (transfer) {
      add_product({{removed_weight.data(), 1, n_removed},
                   {x.data(), 1, width},
                   width,
                   a.d_out,
                   a.n,
                   1,
                   out,
                   a.n},
                  kernel, pool);
      return;
    }
    constexpr int64_t kTile = 64;
    for (int64_t begin = 0; begin < a.n; begin += kTile) {
      for (int64_t o = 0; o < a.d_out; ++o) {
        for (int64_t k = begin; k < std::min(begin + kTile, a.n); ++k) {
          out[o * a.n + k] += x[static_cast<size_t>(k * width + o)];
        }
      }
    }
  }

  const Reconstruct& a;
  const PanelKernel& kernel;
  const Pool& pool;
  std::vector<int64_t> removed;
  int64_t n_removed, width;  // width: right-hand sides
  bool dense, transfer;
  Values gram, holdout;       // (n, n) upper triangles; the diagonal of holdout is halved
  Values side, holdout_side;  // (n, width): Q; Q_H or C_H,K
  Values removed_weight;      // (d_out, n_P)
  Values metric;              // (n_P, n_P): S
  Values factor;              // (n, n): U of the λ at hand
  Values kept_weight, cross;  // (n, d_out): W_Kᵀ, C_K
  double removed_error = 0, removed_holdout = 0;
};

}  // namespace

void reconstruct(const Reconstruct* jobs, int64_t sites, const PanelKernel& kernel,
                 const Pool& pool) {
  if (sites == 0) return;
  if (sites > 1 && jobs[0].n <= kSideBySide) {
    parallel_tasks(pool, sites, [&](int64_t site) { Solver(jobs[site], kernel, Pool{}).run(); });
    return;
  }
  for (int64_t site = 0; site < sites; ++site) Solver(jobs[site], kernel, pool).run();
}

}  // namespace liar
