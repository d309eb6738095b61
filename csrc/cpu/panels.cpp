#include "panels.h"

#include <algorithm>
#include <cstring>

namespace liar {
namespace {

typedef double Pair __attribute__((vector_size(16)));  // SSE2 and NEON both have it

Pair load(const double* p) {
  Pair v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

void store(double* p, Pair v) { std::memcpy(p, &v, sizeof(v)); }

}  // namespace

int64_t panel_stride(int64_t steps, const PanelKernel& kernel) {
  return steps * kernel.panel * kernel.slot_bytes + 64;
}

Panels::Panels(int64_t steps, int64_t features, const PanelKernel& kernel)
    : kernel_(&kernel),
      steps_(steps),
      features_(features),
      stride_(panel_stride(whole_tiles(steps, kernel), kernel)),
      memory_((features + kernel.panel - 1) / kernel.panel * stride_) {
  const int64_t padding = (whole_tiles(steps, kernel) - steps) * width();
  for (int64_t p = 0; p < count(); ++p) std::fill_n(panel(p) + steps * width(), padding, 0.0);
  if (features % width() != 0) std::fill_n(panel(count() - 1), steps * width(), 0.0);
}

Panels Panels::copy() const {
  Panels result(steps_, features_, *kernel_);
  if (!empty()) {
    std::memcpy(result.memory_.data(), memory_.data(), static_cast<size_t>(count() * stride_));
  }
  return result;
}

void Panels::fill_zero() {
  for (int64_t p = 0; p < count(); ++p) std::fill_n(panel(p), steps_ * width(), 0.0);
}

void Panels::mirror() {
  for (int64_t p = 0; p < count(); ++p) {
    const int64_t first = p * width(), live = std::min(width(), features_ - first);
    for (int64_t k = 0; k < first; k += width()) {
      turn(panel(p) + k * width(), width(), width(), live, panel(k / width()) + first * width(),
           width());
    }
    double* block = panel(p) + first * width();
    for (int64_t i = 0; i < live; ++i) {
      for (int64_t j = 0; j < i; ++j) block[i * width() + j] = block[j * width() + i];
    }
  }
}

Panels Panels::plus(double scale, const Panels& other) const {
  Panels result(steps_, features_, *kernel_);
  for (int64_t p = 0; p < count(); ++p) {
    const double *a = panel(p), *b = other.panel(p);
    double* to = result.panel(p);
    for (int64_t i = 0; i < steps_ * width(); ++i) to[i] = a[i] + scale * b[i];
  }
  return result;
}

Panels Panels::turned() const {
  Panels result(features_, steps_, *kernel_);
  for (int64_t p = 0; p < count(); ++p) {
    const int64_t first = p * width(), live = std::min(width(), features_ - first);
    for (int64_t k = 0; k < steps_; k += width()) {
      turn(panel(p) + k * width(), width(), std::min(width(), steps_ - k), live,
           result.panel(k / width()) + first * width(), width());
    }
  }
  return result;
}

void Panels::read_step(int64_t step, const double* row) {
  for (int64_t i = 0; i < features_; i += width()) {
    std::copy_n(row + i, std::min(width(), features_ - i), &at(step, i));
  }
}

void Panels::write_step(int64_t step, double* row) const {
  for (int64_t i = 0; i < features_; i += width()) {
    std::copy_n(&at(step, i), std::min(width(), features_ - i), row + i);
  }
}

TrianglePanels::TrianglePanels(int64_t n, const PanelKernel& kernel)
    : kernel_(&kernel), n_(n), memory_(0) {
  memory_ = Workspace(offset(strips()));
  for (int64_t s = 0; s < strips(); ++s) {
    const int64_t rows = whole_tiles(end(s), kernel) - begin(s);
    for (int64_t first = begin(s); first < end(s); first += kernel.panel) {
      double* to = panel(first);
      // Beyond the last feature there are zeros in every step.
      const int64_t from = first + kernel.panel > n ? 0 : begin(s);
      std::fill_n(to + from * kernel.panel, (begin(s) + rows - from) * kernel.panel, 0.0);
    }
  }
}

TrianglePanels::TrianglePanels(const double* upper, int64_t n, int64_t row,
                               const PanelKernel& kernel)
    : TrianglePanels(n, kernel) {
  for (int64_t k = 0; k < n; ++k) read_step(k, upper + k * row);
}

void TrianglePanels::read_step(int64_t step, const double* row) {
  const int64_t width = kernel_->panel;
  for (int64_t i = step; i < n_; i = (i / width + 1) * width) {
    std::copy_n(row + i, std::min((i / width + 1) * width, n_) - i, &at(step, i));
  }
}

void TrianglePanels::write_step(int64_t step, double* row) const {
  const int64_t width = kernel_->panel;
  for (int64_t i = step; i < n_; i = (i / width + 1) * width) {
    std::copy_n(&at(step, i), std::min((i / width + 1) * width, n_) - i, row + i);
  }
}

TrianglePanels TrianglePanels::copy() const {
  TrianglePanels result;
  result.kernel_ = kernel_;
  result.n_ = n_;
  result.memory_ = Workspace(offset(strips()));
  if (n_ > 0) {
    std::memcpy(result.memory_.data(), memory_.data(), static_cast<size_t>(offset(strips())));
  }
  return result;
}

int64_t TrianglePanels::stride(int64_t strip) const {
  return panel_stride(whole_tiles(end(strip), *kernel_), *kernel_);
}

int64_t TrianglePanels::offset(int64_t strip) const {
  // As if the last strip were as long as it would be in a larger triangle.
  const int64_t steps = strip * (strip + 1) / 2 * kStrip;
  return kStrip / kernel_->panel * (steps * kernel_->panel * kernel_->slot_bytes + strip * 64);
}

void turn(const double* from, int64_t from_row, int64_t rows, int64_t cols, double* to,
          int64_t to_row) {
  const int64_t whole = cols / 2 * 2;
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) {
    const double *a = from + r * from_row, *b = a + from_row;
    for (int64_t c = 0; c < whole; c += 2) {
      const Pair first = load(a + c), second = load(b + c);
      store(to + c * to_row + r, Pair{first[0], second[0]});
      store(to + (c + 1) * to_row + r, Pair{first[1], second[1]});
    }
    for (int64_t c = whole; c < cols; ++c) store(to + c * to_row + r, Pair{a[c], b[c]});
  }
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) to[c * to_row + r] = from[r * from_row + c];
  }
}

void multiply(const Packed& a, const Packed& b, int64_t steps, const Block& block, double scale,
              const Output& out, Triangle triangle, const PanelKernel& kernel) {
  for (int64_t k = 0; k < steps; k += kSteps) {
    PanelProduct product{};
    product.steps = std::min(kSteps, steps - k);
    product.a = a.from_step(k, kernel).panels;
    product.b = b.from_step(k, kernel).panels;
    product.a_panel_stride = a.stride;
    product.b_panel_stride = b.stride;
    product.i0 = block.i0;
    product.i1 = block.i1;
    product.out_row = out.row;
    product.triangle = triangle;
    product.scale = scale;
    for (int64_t j = block.j0; j < block.j1; j += kernel.panel) {
      product.j0 = j;
      product.j1 = std::min(j + kernel.panel, block.j1);
      product.out = out.data + j / kernel.panel * out.panel - j;  // the kernel counts from 0
      kernel.multiply_f64(product);
    }
  }
}

double dot(const double* a, const double* b, int64_t count) {
  constexpr int64_t kChains = 16;
  double sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains) {
    for (int64_t c = 0; c < kChains; ++c) sums[c] += a[i + c] * b[i + c];
  }
  for (; i < count; ++i) sums[0] += a[i] * b[i];
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

double dot(const Panels& a, const Panels& b) {
  double sum = 0;
  for (int64_t p = 0; p < a.count(); ++p) {
    sum += dot(a.panel(p), b.panel(p), a.steps() * a.width());
  }
  return sum;
}

}  // namespace liar
