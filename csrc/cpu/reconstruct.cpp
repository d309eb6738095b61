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
#include "panels.h"

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
// Kept features that give one more thread enough to do. Counted in tasks, not measured: a
// factorisation has n / 768 on average, and the right-hand sides, which are most of the work, one
// for each thread.
constexpr int64_t kThreadRows = 256;
constexpr double kNotFinite = -2;  // code: an argument or an error is not finite
constexpr int64_t kTile = 64;      // columns of W' written together: X stays in cache
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

class Solver {
 public:
  Solver(const Reconstruct& args, const PanelKernel& panel_kernel, const Pool& thread_pool)
      : a(args), kernel(panel_kernel), pool(thread_pool), kept{args.kept, args.n} {
    std::vector<char> stays(static_cast<size_t>(a.d), 0);
    for (int64_t k = 0; k < a.n; ++k) stays[static_cast<size_t>(a.kept[k])] = 1;
    for (int64_t i = 0; i < a.d; ++i) {
      if (stays[static_cast<size_t>(i)] == 0) removed_at.push_back(i);
    }
    removed = {removed_at.data(), static_cast<int64_t>(removed_at.size())};
    finite = std::count_if(a.damps, a.damps + a.ladder, [](double x) { return !std::isinf(x); });
    dense = a.cross != nullptr;
    transfer = !dense && removed.count < a.d_out;
    width = transfer ? removed.count : a.d_out;
  }

  void run() {
    if (!arguments_are_finite()) {
      for (int64_t l = 0; l < a.ladder; ++l) fail(l, kNotFinite);
      return;
    }
    if (a.holdout != nullptr) holdout.emplace(*a.holdout, kept, kernel, pool);
    if (dense) {
      prepare_dense();
    } else {
      prepare_plain();
    }
    double mean = 0;
    if (finite > 0) {
      gram = gather_triangle(a.gram, kept, kernel, pool);
      for (int64_t k = 0; k < a.n; ++k) mean += gram.at(k, k);
    }
    mean = a.n > 0 ? mean / static_cast<double>(a.n) : 1;
    if (mean == 0) mean = 1;
    for (int64_t l = 0; l < a.ladder; ++l) solve_one(l, a.damps[l], a.damps[l] * mean);
  }

 private:
  bool arguments_are_finite() const {
    const auto finite = [&](const Float64View* m, int64_t rows, int64_t cols) {
      return m == nullptr || all_finite(*m, rows, cols, pool);
    };
    return finite(&a.weight, a.d_out, a.d) && finite(a.cross, a.d, a.d_out) &&
           finite(a.holdout_cross, a.d, a.d_out) && lower_finite(a.gram, a.d, pool) &&
           (a.holdout == nullptr || lower_finite(*a.holdout, a.d, pool));
  }

  /// Says that λ has no solution, and why.
  void fail(int64_t l, double code) {
    a.info_out[2 * l] = code;
    a.info_out[2 * l + 1] = a.error_out[l] = kNan;
    if (a.holdout != nullptr) a.holdout_out[l] = kNan;
    if (a.weight_out != nullptr) std::fill_n(a.weight_out + l * a.d_out * a.n, a.d_out * a.n, kNan);
  }

  /// ⟨S, M_PP⟩ from lower triangles.
  double removed_energy(const Float64View& from) const {
    double sum = 0;
    for (int64_t p = 0; p < removed.count; ++p) {
      const double* row = from.row(removed[p]);
      const double* s = &metric.at(0, p);
      for (int64_t q = 0; q < p; ++q) sum += 2 * s[q * kernel.panel] * row[removed[q]];
      sum += s[p * kernel.panel] * row[removed[p]];
    }
    return sum;
  }

  /// G_KP, or G_KP W_Pᵀ.
  Panels plain_side(const Float64View& from) const {
    if (transfer) return gather_symmetric(from, kept, removed, kernel, pool);
    Panels to(a.n, width, kernel);
    to.fill_zero();
    add_symmetric_product(from, removed, turned_weight, 1, to);
    return to;
  }

  /// to (n, width) += scale · M_K,steps right, a strip of M at a time.
  void add_symmetric_product(const Float64View& from, const Index& steps, const Panels& right,
                             double scale, const Panels& to) const {
    parallel_tasks(pool, (a.n + kStrip - 1) / kStrip, [&](int64_t strip) {
      const int64_t first = strip * kStrip, rows = std::min(kStrip, a.n - first);
      const Panels left = gather_symmetric(from, steps, kept.slice(first, rows), kernel, Pool{});
      multiply(left.packed(), right.packed(), steps.count, {0, rows, 0, width}, scale,
               to.output().from_row(first), Triangle::kAll, kernel);
    });
  }

  void prepare_plain() {
    const Panels weight = gather(a.weight, {nullptr, a.d_out}, removed, kernel, pool);
    turned_weight = weight.turned();
    metric = Panels(removed.count, removed.count, kernel);
    metric.fill_zero();
    add_product(weight, weight, 1, metric.output(), Triangle::kUpper, pool);
    if (transfer) metric.mirror();
    side = plain_side(a.gram);
    removed_error = removed_energy(a.gram);
    if (a.holdout != nullptr) {
      holdout_side = plain_side(*a.holdout);
      removed_holdout = removed_energy(*a.holdout);
    }
    if (transfer && a.weight_out == nullptr && finite > 2) take_root();
  }

  /// Replaces the right-hand sides Q by Q C with S = C Cᵀ: the errors are then those of X C, and no
  /// λ needs the product X S.
  void take_root() {
    const Panels root = square_root(metric, pool);
    if (root.empty()) return;
    for (Panels* rows : {&side, &holdout_side}) {
      if (rows->empty()) continue;
      *rows = turned_product(*rows, root);
    }
    transfer = false;
  }

  /// x s.
  Panels turned_product(const Panels& x, const Panels& s) const {
    Panels to(x.steps(), s.features(), kernel);
    to.fill_zero();
    add_product(x.turned(), s, 1, to.output(), Triangle::kAll, pool);
    return to;
  }

  void prepare_dense() {
    const Index outputs{nullptr, a.d_out};
    kept_weight = gather(a.weight, outputs, kept, kernel, pool).turned();
    cross = gather(*a.cross, kept, outputs, kernel, pool);
    if (a.holdout_cross != nullptr) {
      holdout_side = gather(*a.holdout_cross, kept, outputs, kernel, pool);
    }
    side = cross.copy();
    add_symmetric_product(a.gram, kept, kept_weight, -1, side);
  }

  void solve_one(int64_t l, double damp, double shift) {
    double condition = 1;
    Panels x;  // stays empty where the removed features are just dropped
    if (!std::isinf(damp) && a.n > 0) {
      --finite;
      TrianglePanels shifted = finite > 0 ? gram.copy() : std::move(gram);
      for (int64_t k = 0; k < a.n; ++k) shifted.at(k, k) += shift;
      const Cholesky factor(std::move(shifted), pool);
      if (factor.code() != 0) return fail(l, static_cast<double>(factor.code()));
      condition = std::pow(factor.largest() / factor.least(), 2);
      x = side.copy();
      factor.solve(x, pool);
    }
    a.info_out[2 * l] = 0;
    a.info_out[2 * l + 1] = condition;
    if (dense) {
      certify_dense(l, x, shift);
    } else {
      certify_plain(l, x, shift);
    }
    if (!std::isfinite(a.error_out[l]) ||
        (a.holdout != nullptr && !std::isfinite(a.holdout_out[l])))
      return fail(l, kNotFinite);
    if (a.weight_out != nullptr) write_weight(a.weight_out + l * a.d_out * a.n, x);
  }

  void certify_plain(int64_t l, const Panels& x, double shift) {
    a.error_out[l] = removed_error;
    if (a.holdout != nullptr) a.holdout_out[l] = removed_holdout;
    if (x.empty()) return;
    if (transfer && a.holdout == nullptr) {
      a.error_out[l] = not_below_zero(removed_error - restored(x, shift));
      return;
    }
    Panels product;
    if (transfer) product = turned_product(x, metric);
    const Panels& v = transfer ? product : x;
    a.error_out[l] = not_below_zero(removed_error - dot(v, side) - shift * dot(v, x));
    if (a.holdout != nullptr) {
      a.holdout_out[l] += holdout->evaluate(v, x, pool) - 2 * dot(v, holdout_side);
    }
  }

  /// What rounding took below 0; a NaN stays one.
  static double not_below_zero(double error) { return error < 0 ? 0.0 : error; }

  /// ⟨S, Xᵀ (Q + Λ X)⟩. Both are symmetric: half the work of X S, where that is not needed.
  double restored(const Panels& x, double shift) const {
    Panels inner(width, width, kernel);
    inner.fill_zero();
    add_product(x, side.plus(shift, x), 1, inner.output(), Triangle::kUpper, pool);
    double sum = 2 * dot(metric, inner);
    for (int64_t p = 0; p < width; ++p) sum -= metric.at(p, p) * inner.at(p, p);
    return sum;
  }

  void certify_dense(int64_t l, const Panels& x, double shift) {
    const Panels y = x.empty() ? kept_weight.copy() : kept_weight.plus(1, x);
    // ⟨Y, C_K + Λ X⟩; without X: Q, the limit of Λ X.
    const double pulled = x.empty() ? dot(y, side) : shift * dot(y, x);
    a.error_out[l] = -dot(y, cross) - pulled;
    if (a.holdout != nullptr) {
      a.holdout_out[l] = holdout->evaluate(y, y, pool) - 2 * dot(y, holdout_side);
    }
  }

  /// W' = W_K + D, (d_out, n).
  void write_weight(double* out, const Panels& x) const {
    const Panels turned = x.empty() || !transfer ? Panels() : x.turned();
    parallel_tasks(pool, (a.d_out + kStrip - 1) / kStrip, [&](int64_t strip) {
      const int64_t first = strip * kStrip, end = std::min(first + kStrip, a.d_out);
      const int64_t tile = turned.empty() && !x.empty() ? kTile : std::max<int64_t>(1, a.n);
      for (int64_t begin = 0; begin < a.n; begin += tile) {
        for (int64_t o = first; o < end; ++o) {
          const double* w = a.weight.row(o);
          const double* change = x.empty() || transfer ? nullptr : &x.at(0, o);
          double* to = out + o * a.n;
          const int64_t limit = std::min(begin + tile, a.n);
          for (int64_t k = begin; k < limit; ++k) to[k] = w[a.kept[k]];
          if (change == nullptr) continue;
          for (int64_t k = begin; k < limit; ++k) to[k] += change[k * kernel.panel];
        }
      }
      if (turned.empty()) return;
      multiply(turned_weight.packed(), turned.packed(), width, {first, end, 0, a.n}, 1,
               {out, a.n, kernel.panel}, Triangle::kAll, kernel);
    });
  }

  const Reconstruct& a;
  const PanelKernel& kernel;
  const Pool& pool;
  const Index kept;
  std::vector<int64_t> removed_at;
  Index removed;
  int64_t finite, width;                 // λ still to solve for; right-hand sides
  bool dense, transfer;                  // transfer: X is the transfer turned, and V = X S
  TrianglePanels gram;                   // G_KK
  std::optional<QuadraticForm> holdout;  // H_KK
  Panels side, holdout_side;             // (n, width): Q; Q_H or C_H,K
  Panels turned_weight;                  // (n_P, d_out): W_Pᵀ
  Panels metric;                         // (n_P, n_P): S
  Panels kept_weight, cross;             // (n, d_out): W_Kᵀ, C_K
  double removed_error = 0, removed_holdout = 0;
};

}  // namespace

bool side_by_side(int64_t sites, int64_t n, int64_t threads) {
  if (sites < 2 || n > kSideBySide) return false;
  const int64_t inside = std::clamp<int64_t>(n / kThreadRows, 1, threads);
  const int64_t rounds = (sites + threads - 1) / threads;
  return rounds * inside <= sites;
}

void reconstruct(const Reconstruct* jobs, int64_t sites, const PanelKernel& kernel,
                 const Pool& pool) {
  const WorkspaceCall call;
  if (sites == 0) return;
  if (side_by_side(sites, jobs[0].n, pool.threads)) {
    parallel_tasks(pool, sites, [&](int64_t site) { Solver(jobs[site], kernel, Pool{}).run(); });
    return;
  }
  for (int64_t site = 0; site < sites; ++site) Solver(jobs[site], kernel, pool).run();
}

}  // namespace liar
