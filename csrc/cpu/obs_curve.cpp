// Two symmetric matrices over the features that are left say everything:
//
//     H = (G_KK + Λ)⁻¹        M = WᵀW  of the re-solved weights W
//
// Unit u costs δ_u = tr(W_u S⁻¹ W_uᵀ) = tr(M_uu S⁻¹) with S = H_uu = C Cᵀ. Removing it is one step
// of a block Cholesky factorisation with the cheapest unit as pivot:
//
//     L = C⁻¹ H_u:    Q = C⁻¹ M_u:    N = C⁻¹ M_uu C⁻ᵀ    R = Q − ½ N L    δ_u = tr N
//     H ← H − LᵀL     M ← M − LᵀR − RᵀL
//
// M follows from W ← W − W_u S⁻¹ H_u:, so the number of outputs is gone after M = WᵀW. Both updates
// wait until a panel of rows of L and R is full; then they are matrix products. In between only
// what the next choice needs is kept up to date: the diagonal blocks, and the rows of the unit
// that goes.
//
//     slots of units   [ . . x . . . x . | . . ]      x: removed in this panel
//     after a panel    [ . . t . . . t . ]            the last survivors t move into the holes
#include "obs_curve.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cholesky.h"
#include "dense.h"
#include "sweep.h"
#include "workspace.h"

namespace liar {
namespace {

constexpr int64_t kPanelRows = 64;  // rows of L: the panels of L and R fit a second-level cache
constexpr int64_t kFewRows = 8;     // below, packing costs more than it saves
// Multiply-adds over all units that are worth a second thread.
constexpr int64_t kAloneWork = 1 << 22;

/// x ← C⁻¹ x for x (n, cols), where C = Uᵀ and U is upper triangular (n, n); all row-major.
void solve_lower(int64_t n, int64_t cols, const double* u, double* x, int64_t x_row) {
  for (int64_t i = 0; i < n; ++i) {
    double* row = x + i * x_row;
    for (int64_t k = 0; k < i; ++k) {
      const double scale = u[k * n + i];
      for (int64_t j = 0; j < cols; ++j) row[j] -= scale * x[k * x_row + j];
    }
    for (int64_t j = 0; j < cols; ++j) row[j] /= u[i * n + i];
  }
}

class Elimination {
 public:
  Elimination(const ObsCurve& args, const PanelKernel& kernel, const Pool& pool)
      : a_(args),
        kernel_(kernel),
        pool_(pool),
        w_(args.width),
        slots_(args.d / args.width),
        panel_(std::max<int64_t>(1, kPanelRows / args.width) * args.width),
        crew_(args.d * args.width * args.width > kAloneWork ? pool : Pool{}),
        unit_(static_cast<size_t>(slots_)),
        open_(static_cast<size_t>(slots_), 1),
        left_(static_cast<size_t>(panel_ * args.d)),
        right_(static_cast<size_t>(panel_ * args.d)),
        inverse_blocks_(static_cast<size_t>(args.d * w_)),
        energy_blocks_(static_cast<size_t>(args.d * w_)),
        cost_(static_cast<size_t>(slots_)),
        factor_(static_cast<size_t>(w_ * w_)),
        square_(static_cast<size_t>(w_ * w_)) {
    for (int64_t s = 0; s < slots_; ++s) unit_[static_cast<size_t>(s)] = s;
  }

  void run() {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const int64_t removed = slots_ - a_.at_least;
    double mean = 0;
    for (int64_t i = 0; i < a_.d; ++i) mean += a_.inverse[i * (a_.d + 1)];
    mean = mean > 0 ? mean / static_cast<double>(a_.d) : 1;
    for (int64_t i = 0; i < a_.d; ++i) {
      // A dead feature gives nothing to the output: without its column it costs nothing either.
      if (a_.inverse[i * (a_.d + 1)] == 0) {
        for (int64_t o = 0; o < a_.d_out; ++o) a_.weight[o * a_.d + i] = 0;
      }
      a_.inverse[i * (a_.d + 1)] += a_.damp * mean;
    }
    int64_t code = invert_lower(a_.inverse, a_.d, &condition_, kernel_, pool_);
    if (code == 0) {
      std::fill_n(a_.energy, a_.d * a_.d, 0.0);
      add_lower(a_.d, a_.d_out, 1, a_.weight, a_.weight, a_.energy);
      read_blocks();
    }
    a_.error_out[0] = 0;
    for (int64_t k = 0; k < removed && code == 0; ++k) {
      if (k % a_.groups == 0) gone_.assign(static_cast<size_t>(a_.groups), 0);
      const int64_t slot = cheapest();
      double cost = 0;
      if (slot < 0 || !eliminate(slot, &cost)) {
        code = a_.d + k + 1;
        break;
      }
      a_.order_out[k] = unit_[static_cast<size_t>(slot)];
      a_.error_out[k + 1] = a_.error_out[k] + cost;
      if (rows_ + w_ > panel_) flush();
    }
    a_.info_out[0] = static_cast<double>(code);
    a_.info_out[1] = code == 0 ? condition_ : nan;
    if (code == 0) return;
    std::fill_n(a_.error_out, removed + 1, nan);
    for (int64_t k = 0; k < removed; ++k) a_.order_out[k] = k;
  }

 private:
  /// Lower triangle of c (n, n) += sign · aᵀ b, with a and b (steps, n); rows of d everywhere.
  void add_lower(int64_t n, int64_t steps, double sign, const double* a, const double* b,
                 double* c) const {
    liar::add_product({{a, a_.d}, {b, a_.d}, steps, n, n, sign, c, a_.d, Triangle::kLower}, kernel_,
                      pool_);
  }

  /// c (rows, cols) += scale · aᵀ b, with a (steps, rows) and b (steps, cols).
  void add_product(int64_t rows, int64_t cols, int64_t steps, double scale, const double* a,
                   int64_t a_row, const double* b, double* c, int64_t c_row,
                   const Pool& pool) const {
    if (rows >= kFewRows) {
      liar::add_product({{a, a_row}, {b, a_.d}, steps, rows, cols, scale, c, c_row}, kernel_, pool);
      return;
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < steps; ++k) {
        const double value = scale * a[k * a_row + i];
        for (int64_t j = 0; j < cols; ++j) c[i * c_row + j] += value * b[k * a_.d + j];
      }
    }
  }

  /// Overwrites the upper triangle of a (n, n) by U, a = UᵀU; false if there is none.
  bool factor(int64_t n, double* a, const Pool& pool) const {
    if (n > 1) return factor_upper(a, n, kernel_, pool) == 0;
    const bool positive = a[0] > 0;
    a[0] = std::sqrt(a[0]);
    return positive;
  }

  double* inverse_block(int64_t slot) {
    return &inverse_blocks_[static_cast<size_t>(slot * w_ * w_)];
  }
  double* energy_block(int64_t slot) {
    return &energy_blocks_[static_cast<size_t>(slot * w_ * w_)];
  }

  void read_blocks() {
    for (int64_t s = 0; s < slots_; ++s) {
      for (int64_t i = 0; i < w_; ++i) {
        for (int64_t j = 0; j < w_; ++j) {
          inverse_block(s)[i * w_ + j] = at(a_.inverse, s * w_ + i, s * w_ + j);
          energy_block(s)[i * w_ + j] = at(a_.energy, s * w_ + i, s * w_ + j);
        }
      }
    }
  }

  double& at(double* matrix, int64_t i, int64_t j) const {
    return i >= j ? matrix[i * a_.d + j] : matrix[j * a_.d + i];
  }

  bool closed(int64_t slot) const {
    const int64_t group = unit_[static_cast<size_t>(slot)] / (a_.d / w_ / a_.groups);
    return !open_[static_cast<size_t>(slot)] || gone_[static_cast<size_t>(group)];
  }

  /// The slot of least cost in a group that has not lost a unit in this round; -1 if H is spoilt.
  int64_t cheapest() {
    parallel_tasks(crew_, slots_, [&](int64_t s) {
      if (!closed(s)) cost_[static_cast<size_t>(s)] = cost_of(s);
    });
    int64_t best = -1;
    double least = std::numeric_limits<double>::infinity();
    for (int64_t s = 0; s < slots_; ++s) {
      if (closed(s)) continue;
      const int64_t unit = unit_[static_cast<size_t>(s)];
      const double cost = cost_[static_cast<size_t>(s)];
      // Slots are not in the order of the units: break ties by the unit.
      if (cost < least || (cost == least && best >= 0 && unit < unit_[static_cast<size_t>(best)])) {
        best = s;
        least = cost;
      }
    }
    return best;
  }

  /// Rounding may leave a cost of nothing below 0. A NaN stays one, so that it is never chosen.
  static double not_below_zero(double cost) { return cost < 0 ? 0.0 : cost; }

  /// tr(M_uu S⁻¹), not below 0; NaN if S is not positive definite.
  double cost_of(int64_t slot) {
    if (w_ == 1) return not_below_zero(*energy_block(slot) / *inverse_block(slot));
    const Workspace both = Workspace::of_doubles(2 * w_ * w_);
    double *root = both.doubles(), *square = root + w_ * w_;
    std::copy_n(inverse_block(slot), w_ * w_, root);
    if (!factor(w_, root, Pool{})) return std::numeric_limits<double>::quiet_NaN();
    std::copy_n(energy_block(slot), w_ * w_, square);
    return whiten(root, square);
  }

  /// square ← N = C⁻¹ square C⁻ᵀ with C = rootᵀ; returns its trace, not below 0.
  double whiten(const double* root, double* square) const {
    const auto transpose = [&] {
      for (int64_t i = 0; i < w_; ++i) {
        for (int64_t j = 0; j < i; ++j) std::swap(square[i * w_ + j], square[j * w_ + i]);
      }
    };
    solve_lower(w_, w_, root, square, w_);
    transpose();
    solve_lower(w_, w_, root, square, w_);
    double trace = 0;
    for (int64_t i = 0; i < w_; ++i) trace += square[i * w_ + i];
    return not_below_zero(trace);
  }

  /// Appends the rows of L and R of one unit; false if S is not positive definite.
  bool eliminate(int64_t slot, double* cost) {
    const int64_t n = slots_ * w_, first = slot * w_;
    double* left = &left_[static_cast<size_t>(rows_ * a_.d)];
    double* right = &right_[static_cast<size_t>(rows_ * a_.d)];
    for (int64_t i = 0; i < w_; ++i) {
      read_symmetric_row(a_.inverse, a_.d, first + i, n, left + i * a_.d);
      read_symmetric_row(a_.energy, a_.d, first + i, n, right + i * a_.d);
    }
    // What this panel has taken from these rows so far.
    const double *l = left_.data(), *r = right_.data();
    add_product(w_, n, rows_, -1, l + first, a_.d, l, left, a_.d, pool_);
    add_product(w_, n, rows_, -1, l + first, a_.d, r, right, a_.d, pool_);
    add_product(w_, n, rows_, -1, r + first, a_.d, l, right, a_.d, pool_);

    for (int64_t i = 0; i < w_; ++i) {
      for (int64_t j = 0; j < w_; ++j) {
        factor_[static_cast<size_t>(i * w_ + j)] = left[i * a_.d + first + j];
        square_[static_cast<size_t>(i * w_ + j)] = right[i * a_.d + first + j];
      }
    }
    if (!factor(w_, factor_.data(), pool_)) return false;
    *cost = whiten(factor_.data(), square_.data());
    solve_lower(w_, n, factor_.data(), left, a_.d);
    solve_lower(w_, n, factor_.data(), right, a_.d);
    add_product(w_, n, w_, -0.5, square_.data(), w_, left, right, a_.d, pool_);  // N is symmetric

    open_[static_cast<size_t>(slot)] = 0;
    gone_[static_cast<size_t>(unit_[static_cast<size_t>(slot)] / (a_.d / w_ / a_.groups))] = 1;
    rows_ += w_;
    update_blocks(left, right);
    return true;
  }

  void update_blocks(const double* left, const double* right) {
    if (w_ == 1) {
      for (int64_t s = 0; s < slots_; ++s) {
        inverse_blocks_[static_cast<size_t>(s)] -= left[s] * left[s];
        energy_blocks_[static_cast<size_t>(s)] -= 2 * left[s] * right[s];
      }
      return;
    }
    parallel_tasks(crew_, slots_, [&](int64_t s) {
      if (!open_[static_cast<size_t>(s)]) return;
      const double *l = left + s * w_, *r = right + s * w_;
      add_product(w_, w_, w_, -1, l, a_.d, l, inverse_block(s), w_, Pool{});
      add_product(w_, w_, w_, -1, l, a_.d, r, energy_block(s), w_, Pool{});
      add_product(w_, w_, w_, -1, r, a_.d, l, energy_block(s), w_, Pool{});
    });
  }

  /// Applies the panel to H and M and closes the ranks.
  void flush() {
    const int64_t n = slots_ * w_;
    const double *l = left_.data(), *r = right_.data();
    add_lower(n, rows_, -1, l, l, a_.inverse);
    add_lower(n, rows_, -1, l, r, a_.energy);
    add_lower(n, rows_, -1, r, l, a_.energy);
    int64_t last = slots_;
    for (int64_t hole = 0; hole < last; ++hole) {
      if (open_[static_cast<size_t>(hole)]) continue;
      do {
        --last;
      } while (last > hole && !open_[static_cast<size_t>(last)]);
      if (last > hole) move_slot(last, hole);
    }
    slots_ = last;
    rows_ = 0;
  }

  void move_slot(int64_t from, int64_t to) {
    for (double* matrix : {a_.inverse, a_.energy}) {
      for (int64_t i = 0; i < w_; ++i) {
        for (int64_t j = 0; j < from * w_; ++j) {
          if (j / w_ != to) at(matrix, to * w_ + i, j) = matrix[(from * w_ + i) * a_.d + j];
        }
        for (int64_t j = 0; j <= i; ++j) {
          matrix[(to * w_ + i) * a_.d + to * w_ + j] =
              matrix[(from * w_ + i) * a_.d + from * w_ + j];
        }
      }
    }
    std::copy_n(inverse_block(from), w_ * w_, inverse_block(to));
    std::copy_n(energy_block(from), w_ * w_, energy_block(to));
    unit_[static_cast<size_t>(to)] = unit_[static_cast<size_t>(from)];
    open_[static_cast<size_t>(to)] = 1;
  }

  const ObsCurve& a_;
  const PanelKernel& kernel_;
  const Pool& pool_;
  const int64_t w_;
  int64_t slots_;     // units that are left, or went within the panel
  int64_t panel_;     // rows of L that are collected
  const Pool crew_;   // works on units side by side, where they are wide enough
  int64_t rows_ = 0;  // of them, so far
  double condition_ = 1;
  std::vector<int64_t> unit_;         // by slot
  std::vector<char> open_;            // by slot: whether the unit is still there
  std::vector<char> gone_;            // by group: whether it lost a unit in this round
  std::vector<double> left_, right_;  // L and R, (panel, d)
  std::vector<double> inverse_blocks_, energy_blocks_;  // by slot, (width, width)
  std::vector<double> cost_;                            // by slot
  std::vector<double> factor_, square_;                 // C and N of one unit
};

}  // namespace

void obs_curve(const ObsCurve& args, const PanelKernel& kernel, const Pool& pool) {
  const WorkspaceCall call;
  Elimination(args, kernel, pool).run();
}

}  // namespace liar
