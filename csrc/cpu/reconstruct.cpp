#include "reconstruct.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "cholesky.h"
#include "dense.h"
#include "gather.h"

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
// Where only errors are wanted for several λ, S = C Cᵀ and X C takes the place of X: then V = X,
// and no λ needs a product with S.

namespace liar {
namespace {

constexpr int64_t kSideBySide = 2048;  // sites that keep more than this are solved in turn
constexpr int64_t kTile = 64;          // turned at a time: both sides stay in cache
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

Workspace zeros(int64_t count) {
  Workspace to = Workspace::of_doubles(count);
  std::fill_n(to.doubles(), count, 0.0);
  return to;
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
    read_gram();
    if (a.holdout != nullptr) {
      holdout.emplace(a.holdout->data, a.holdout->row_stride, a.kept, a.n, kernel, pool);
    }
    if (dense) {
      prepare_dense();
    } else {
      prepare_plain();
    }
    double mean = 0;
    for (double value : diagonal) mean += value;
    mean = a.n > 0 ? mean / static_cast<double>(a.n) : 1;
    if (mean == 0) mean = 1;
    for (int64_t l = 0; l < a.ladder; ++l) solve_one(l, a.damps[l], a.damps[l] * mean);
  }

 private:
  /// The kept block of G, its lower triangle by rows.
  void read_gram() {
    // Rows begin at cache lines and, where n is a power of two, not all in the same cache set.
    square_row = (a.n + kLine - 1) / kLine * kLine + kLine;
    square = Workspace::of_doubles(a.n * square_row);
    gather_lower(a.gram, a.kept, a.n, square.doubles(), square_row, pool);
    for (int64_t k = 0; k < a.n; ++k) diagonal.push_back(square.doubles()[k * (square_row + 1)]);
  }

  /// Writes the upper triangle of `square`, with `shift` added to the diagonal; the strictly lower
  /// one stays G for the next λ.
  void turn_up(double shift) {
    copy_lower_to_upper(square.doubles(), a.n, square_row, pool);
    for (int64_t k = 0; k < a.n; ++k) {
      square.doubles()[k * (square_row + 1)] = diagonal[static_cast<size_t>(k)] + shift;
    }
  }

  /// ⟨S, M_PP⟩ from lower triangles.
  double removed_energy(const Float64View& from) const {
    double sum = 0;
    for (int64_t p = 0; p < n_removed; ++p) {
      const double* row = from.data + removed[static_cast<size_t>(p)] * from.row_stride;
      const double* s = metric.doubles() + p * n_removed;
      for (int64_t q = 0; q < p; ++q) sum += 2 * s[q] * row[removed[static_cast<size_t>(q)]];
      sum += s[p] * row[removed[static_cast<size_t>(p)]];
    }
    return sum;
  }

  /// G_KP, or G_KP W_Pᵀ.
  Workspace plain_side(const Float64View& from) const {
    Workspace block = gather_block(from, a.kept, a.n, removed.data(), n_removed, pool);
    if (transfer) return block;
    Workspace to = zeros(a.n * width);
    add_product({{block.doubles(), 1, n_removed},
                 {removed_weight.doubles(), 1, n_removed},
                 n_removed,
                 a.n,
                 width,
                 1,
                 to.doubles(),
                 width},
                kernel, pool);
    return to;
  }

  void prepare_plain() {
    removed_weight = Workspace::of_doubles(a.d_out * n_removed);
    for (int64_t o = 0; o < a.d_out; ++o) {
      const double* row = a.weight.data + o * a.weight.row_stride;
      double* to = removed_weight.doubles() + o * n_removed;
      for (int64_t p = 0; p < n_removed; ++p) to[p] = row[removed[static_cast<size_t>(p)]];
    }
    metric = zeros(n_removed * n_removed);
    double* s = metric.doubles();
    const Operand rows{removed_weight.doubles(), n_removed};
    add_product({rows, rows, a.d_out, n_removed, n_removed, 1, s, n_removed, Triangle::kLower},
                kernel, pool);
    for (int64_t p = 0; p < n_removed; ++p) {
      for (int64_t q = 0; q < p; ++q) s[q * n_removed + p] = s[p * n_removed + q];
    }
    side = plain_side(a.gram);
    removed_error = removed_energy(a.gram);
    if (a.holdout != nullptr) {
      holdout_side = plain_side(*a.holdout);
      removed_holdout = removed_energy(*a.holdout);
    }
    const auto finite =
        std::count_if(a.damps, a.damps + a.ladder, [](double damp) { return !std::isinf(damp); });
    if (transfer && a.weight_out == nullptr && finite > 2) take_root();
  }

  /// Replaces the right-hand sides Q by Q C with S = C Cᵀ: the errors are then those of X C, and no
  /// λ needs the product X S.
  void take_root() {
    const int64_t r = width;
    const Workspace root = square_root(metric.doubles(), r, kernel, pool);
    if (root.empty()) return;
    for (Workspace* rows : {&side, &holdout_side}) {
      if (rows->empty()) continue;
      Workspace to = zeros(a.n * r);
      add_product({{rows->doubles(), 1, r}, {root.doubles(), 1, r}, r, a.n, r, 1, to.doubles(), r},
                  kernel, pool);
      *rows = std::move(to);
    }
    transfer = false;
  }

  void prepare_dense() {
    kept_weight = gather_columns_turned(a.weight, a.d_out, a.kept, a.n);
    cross = gather_rows(*a.cross, a.kept, a.n, a.d_out);
    if (a.holdout_cross != nullptr)
      holdout_side = gather_rows(*a.holdout_cross, a.kept, a.n, a.d_out);
    side = gather_rows(*a.cross, a.kept, a.n, a.d_out);
    turn_up(0);  // now `square` is all of G_KK
    add_product({{square.doubles(), square_row},
                 {kept_weight.doubles(), width},
                 a.n,
                 a.n,
                 width,
                 -1,
                 side.doubles(),
                 width},
                kernel, pool);
  }

  void solve_one(int64_t l, double damp, double shift) {
    double code = 0, condition = 1;
    const double* solution = nullptr;  // stays null where the removed features are just dropped
    if (!std::isinf(damp) && a.n > 0) {
      turn_up(shift);
      double* u = square.doubles();
      const Cholesky factor(u, a.n, square_row, kernel, pool);
      code = static_cast<double>(factor.code());
      if (code == 0) {
        double low = u[0], high = u[0];
        for (int64_t k = 0; k < a.n; ++k) {
          low = std::min(low, u[k * (square_row + 1)]);
          high = std::max(high, u[k * (square_row + 1)]);
        }
        condition = high / low * (high / low);
        if (x.empty()) x = Workspace::of_doubles(a.n * width);
        if (width > 0) {
          std::copy_n(side.doubles(), a.n * width, x.doubles());
          factor.solve(x.doubles(), width, width, pool);
          solution = x.doubles();
        }
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
      certify_dense(l, solution, shift);
    } else {
      certify_plain(l, solution, shift);
    }
    if (a.weight_out != nullptr) write_weight(a.weight_out + l * a.d_out * a.n, solution);
  }

  void certify_plain(int64_t l, const double* solution, double shift) {
    a.error_out[l] = removed_error;
    if (a.holdout != nullptr) a.holdout_out[l] = removed_holdout;
    if (solution == nullptr) return;
    const int64_t count = a.n * width;
    if (transfer && other.empty()) other = Workspace::of_doubles(count);
    if (transfer && a.holdout == nullptr) {
      a.error_out[l] = std::max(0.0, removed_error - restored(solution, shift));
      return;
    }
    const double* v = solution;
    if (transfer) {
      std::fill_n(other.doubles(), count, 0.0);
      add_product({{solution, 1, width},
                   {metric.doubles(), width},
                   width,
                   a.n,
                   width,
                   1,
                   other.doubles(),
                   width},
                  kernel, pool);
      v = other.doubles();
    }
    a.error_out[l] = std::max(
        0.0, removed_error - dot(v, side.doubles(), count) - shift * dot(v, solution, count));
    if (a.holdout != nullptr) {
      a.holdout_out[l] +=
          holdout->evaluate(v, solution, width, pool) - 2 * dot(v, holdout_side.doubles(), count);
    }
  }

  /// ⟨S, Xᵀ (Q + Λ X)⟩. Both are symmetric: half the work of X S, where that is not needed.
  double restored(const double* solution, double shift) const {
    double* y = other.doubles();
    for (int64_t i = 0; i < a.n * width; ++i) y[i] = side.doubles()[i] + shift * solution[i];
    const Workspace square_of = zeros(width * width);
    double* m = square_of.doubles();
    add_product({{solution, width}, {y, width}, a.n, width, width, 1, m, width, Triangle::kLower},
                kernel, pool);
    double sum = 0;
    for (int64_t p = 0; p < width; ++p) {
      const double* s = metric.doubles() + p * width;
      sum += 2 * dot(s, m + p * width, p) + s[p] * m[p * width + p];
    }
    return sum;
  }

  void certify_dense(int64_t l, const double* solution, double shift) {
    const int64_t count = a.n * width;
    if (other.empty()) other = Workspace::of_doubles(count);
    double* y = other.doubles();
    std::copy_n(kept_weight.doubles(), count, y);
    for (int64_t i = 0; solution != nullptr && i < count; ++i) y[i] += solution[i];
    // ⟨Y, C_K + Λ X⟩; without X: Q, the limit of Λ X.
    const double pulled =
        solution == nullptr ? dot(y, side.doubles(), count) : shift * dot(y, solution, count);
    a.error_out[l] = -dot(y, cross.doubles(), count) - pulled;
    if (a.holdout != nullptr) {
      a.holdout_out[l] =
          holdout->evaluate(y, y, width, pool) - 2 * dot(y, holdout_side.doubles(), count);
    }
  }

  /// W' = W_K + D, (d_out, n).
  void write_weight(double* out, const double* solution) const {
    for (int64_t o = 0; o < a.d_out; ++o) {
      const double* w = a.weight.data + o * a.weight.row_stride;
      for (int64_t k = 0; k < a.n; ++k) out[o * a.n + k] = w[a.kept[k]];
    }
    if (solution == nullptr) return;
    if (transfer) {
      add_product({{removed_weight.doubles(), 1, n_removed},
                   {solution, 1, width},
                   width,
                   a.d_out,
                   a.n,
                   1,
                   out,
                   a.n},
                  kernel, pool);
      return;
    }
    for (int64_t begin = 0; begin < a.n; begin += kTile) {
      for (int64_t o = 0; o < a.d_out; ++o) {
        for (int64_t k = begin; k < std::min(begin + kTile, a.n); ++k) {
          out[o * a.n + k] += solution[k * width + o];
        }
      }
    }
  }

  const Reconstruct& a;
  const PanelKernel& kernel;
  const Pool& pool;
  std::vector<int64_t> removed;
  int64_t n_removed, square_row, width;  // width: right-hand sides
  bool dense, transfer;                  // transfer: X is the transfer turned, and V = X S
  Workspace square;                      // (n, n): G_KK strictly below, U of the λ at hand above
  std::vector<double> diagonal;          // (n,): of G_KK
  std::optional<QuadraticForm> holdout;  // H_KK
  Workspace side, holdout_side;          // (n, width): Q; Q_H or C_H,K
  Workspace x, other;                    // (n, width): X; V or Y
  Workspace removed_weight;              // (d_out, n_P)
  Workspace metric;                      // (n_P, n_P): S
  Workspace kept_weight, cross;          // (n, d_out): W_Kᵀ, C_K
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
