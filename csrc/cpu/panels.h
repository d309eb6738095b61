// Float64 matrices that are kept in packed panels, ready for both sides of a product.
#pragma once

#include <cstdint>

#include "panel_kernel.h"
#include "workspace.h"

namespace liar {

constexpr int64_t kStrip = 96;   // features: a multiple of every panel width
constexpr int64_t kSteps = 384;  // multiplied at once: 96 · 384 doubles are 288 KiB of L2

/// Bytes from a panel of `steps` to the next; a line more keeps panels off the same cache sets.
int64_t panel_stride(int64_t steps, const PanelKernel& kernel);

/// `size` up to whole register tiles.
inline int64_t whole_tiles(int64_t size, const PanelKernel& kernel) {
  return (size + kernel.rows - 1) / kernel.rows * kernel.rows;
}

/// Panels of a matrix (steps, features), beginning with feature 0.
struct Packed {
  const char* panels;
  int64_t stride;  // bytes

  Packed from_step(int64_t step, const PanelKernel& kernel) const {
    return {panels + step * kernel.panel * kernel.slot_bytes, stride};
  }
};

/// Where a product goes: element (i, j) is data[j / width · panel + i · row + j % width].
struct Output {
  double* data;
  int64_t row;
  int64_t panel;

  Output from_row(int64_t i) const { return {data + i * row, row, panel}; }
};

/// A matrix (steps, features). A panel is row-major (steps, kernel.panel), with zeros beyond the
/// last feature and, up to whole tiles, the last step.
class Panels {
 public:
  Panels() = default;
  /// Not initialised but for the zeros around it.
  Panels(int64_t steps, int64_t features, const PanelKernel& kernel);
  Panels copy() const;

  bool empty() const { return memory_.empty(); }
  int64_t steps() const { return steps_; }
  int64_t features() const { return features_; }
  int64_t width() const { return kernel_->panel; }
  const PanelKernel& kernel() const { return *kernel_; }
  int64_t count() const { return (features_ + width() - 1) / width(); }
  int64_t stride() const { return stride_; }

  double* panel(int64_t p) const { return reinterpret_cast<double*>(memory_.data() + p * stride_); }
  double& at(int64_t step, int64_t feature) const {
    return panel(feature / width())[step * width() + feature % width()];
  }
  Packed packed(int64_t first_panel = 0) const {
    return {memory_.data() + first_panel * stride_, stride_};
  }
  Output output() const {
    return {memory_.doubles(), width(), stride_ / static_cast<int64_t>(sizeof(double))};
  }

  void fill_zero();
  /// The upper triangle of a square matrix, copied to the lower one.
  void mirror();
  /// itself + scale · other, of its shape.
  Panels plus(double scale, const Panels& other) const;
  /// (features, steps): what was a step is a feature.
  Panels turned() const;
  /// Values of a row; row[i] belongs to feature i.
  void read_step(int64_t step, const double* row);
  void write_step(int64_t step, double* row) const;

 private:
  const PanelKernel* kernel_ = nullptr;
  int64_t steps_ = 0, features_ = 0, stride_ = 0;
  Workspace memory_;
};

/// The upper triangle of a matrix (n, n), packed in strips of kStrip features with the steps up to
/// the end of the diagonal block; what is below the diagonal there is not defined.
///
///        strip 0   1   2
///        [ 00 | 01 | 02 ]
///             [ 11 | 12 ]
///                  [ 22 ]
class TrianglePanels {
 public:
  TrianglePanels() = default;
  /// Zero in the diagonal blocks, not initialised elsewhere.
  TrianglePanels(int64_t n, const PanelKernel& kernel);
  /// Of the upper triangle of a row-major matrix.
  TrianglePanels(const double* upper, int64_t n, int64_t row, const PanelKernel& kernel);
  TrianglePanels copy() const;
  /// Values of a row from the diagonal on; row[i] belongs to feature i.
  void read_step(int64_t step, const double* row);
  void write_step(int64_t step, double* row) const;

  const PanelKernel& kernel() const { return *kernel_; }
  int64_t n() const { return n_; }
  int64_t strips() const { return (n_ + kStrip - 1) / kStrip; }
  int64_t begin(int64_t strip) const { return strip * kStrip; }
  int64_t end(int64_t strip) const { return begin(strip + 1) < n_ ? begin(strip + 1) : n_; }
  int64_t size(int64_t strip) const { return end(strip) - begin(strip); }

  Packed strip(int64_t s) const { return {memory_.data() + offset(s), stride(s)}; }
  /// The columns of a strip, as what a product is added to.
  Output output(int64_t s) const {
    return {reinterpret_cast<double*>(memory_.data() + offset(s)), kernel_->panel,
            stride(s) / static_cast<int64_t>(sizeof(double))};
  }
  /// The panel that begins with `feature`.
  double* panel(int64_t feature) const {
    const Output columns = output(feature / kStrip);
    return columns.data + feature % kStrip / kernel_->panel * columns.panel;
  }
  /// Value (step, feature), step ≤ feature.
  double& at(int64_t step, int64_t feature) const {
    const int64_t column = feature % kernel_->panel;
    return panel(feature - column)[step * kernel_->panel + column];
  }

 private:
  int64_t stride(int64_t strip) const;
  int64_t offset(int64_t strip) const;

  const PanelKernel* kernel_ = nullptr;
  int64_t n_ = 0;
  Workspace memory_;
};

/// to[c, r] = from[r, c], both row-major.
void turn(const double* from, int64_t from_row, int64_t rows, int64_t cols, double* to,
          int64_t to_row);

/// Rows [i0, i1) and columns [j0, j1) of a product; i0 and j0 are multiples of the panel width.
struct Block {
  int64_t i0, i1, j0, j1;
};

/// out[i, j] += scale · Σ_k a(k, i) b(k, j) in a block, for k < steps.
void multiply(const Packed& a, const Packed& b, int64_t steps, const Block& block, double scale,
              const Output& out, Triangle triangle, const PanelKernel& kernel);

/// Σ_i a[i] b[i], in several chains so that no sum waits for the one before it.
double dot(const double* a, const double* b, int64_t count);

/// ⟨a, b⟩ of matrices of one shape.
double dot(const Panels& a, const Panels& b);

}  // namespace liar
