#include "dense.h"

#include <algorithm>
#include <vector>

// A product packs kSteps rows of its right side, all columns of them, for all tasks; a task then
// packs a strip of the left side and multiplies it with as many columns as it was given:
//
//                         b: kSteps × cols, packed once, in L3
//                       [                 ]
//        a: kStrip wide [ strip 0         ]
//        packed, in L2  [ strip 1         ]  out
//                       [ ...             ]
//
// Where both sides are one matrix the strips are those of the right side. Every element of `out` is
// summed by one task in the order of the steps, so the result does not depend on the threads.

namespace liar {
namespace {

constexpr int64_t kPackColumns = 240;    // that one task packs: a multiple of every panel
constexpr int64_t kShare = 480;          // columns of a task when there are few strips
constexpr int64_t kAloneWork = 1 << 22;  // multiply-adds that are not worth a second thread
constexpr int64_t kTurn = 8;             // steps turned at a time: a cache line of each row
constexpr Pool kAlone{};

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

/// Panels of features [0, features), which are columns of a row-major matrix.
void pack_rows(const double* rows, int64_t row, int64_t steps, int64_t features, char* panels,
               int64_t stride, int64_t step, const PanelKernel& kernel) {
  const void* group[kPackRows];
  for (int64_t k = 0; k < steps; k += kPackRows) {
    const int64_t count = std::min(kPackRows, steps - k);
    for (int64_t r = 0; r < count; ++r) group[r] = rows + (k + r) * row;
    kernel.pack({DType::kFloat64, group, count, nullptr, features, panels, stride, step + k,
                 nullptr, nullptr, true});
  }
}

/// Panels of features [0, features), which are rows of a row-major matrix.
void pack_columns(const double* columns, int64_t row, int64_t steps, int64_t features, char* panels,
                  int64_t stride, const PanelKernel& kernel) {
  for (int64_t first = 0; first < features; first += kernel.panel) {
    auto* panel = reinterpret_cast<double*>(panels + first / kernel.panel * stride);
    const int64_t live = std::min(kernel.panel, features - first);
    if (live < kernel.panel) std::fill_n(panel, steps * kernel.panel, 0.0);
    for (int64_t k = 0; k < steps; k += kTurn) {
      const int64_t count = std::min(kTurn, steps - k);
      for (int64_t i = 0; i < live; ++i) {
        const double* from = columns + (first + i) * row + k;
        double* to = panel + k * kernel.panel + i;
        for (int64_t r = 0; r < count; ++r) to[r * kernel.panel] = from[r];
      }
    }
  }
}

}  // namespace

int64_t panel_stride(int64_t steps, const PanelKernel& kernel) {
  return steps * kernel.panel * kernel.slot_bytes + 64;
}

int64_t StripLayout::stride(int64_t strip) const { return panel_stride(end(strip), kernel); }

int64_t StripLayout::offset(int64_t strip) const {
  // As if the last strip were as long as it would be in a larger triangle.
  const int64_t steps = strip * (strip + 1) / 2 * kStrip;
  return kStrip / kernel.panel * (steps * kernel.panel * kernel.slot_bytes + strip * 64);
}

void pack(const Operand& source, int64_t steps, int64_t features, char* panels, int64_t stride,
          int64_t step, const PanelKernel& kernel) {
  if (source.feature_stride == 1) {
    pack_rows(source.data, source.step_stride, steps, features, panels, stride, step, kernel);
  } else {
    pack_columns(source.data, source.feature_stride, steps, features,
                 panels + step * kernel.panel * kernel.slot_bytes, stride, kernel);
  }
}

void multiply(const Packed& a, const Packed& b, int64_t steps, int64_t rows, int64_t cols,
              double scale, double* out, int64_t out_row, Triangle triangle,
              const PanelKernel& kernel) {
  for (int64_t k = 0; k < steps; k += kSteps) {
    PanelProduct product{};
    product.steps = std::min(kSteps, steps - k);
    product.a = a.from_step(k, kernel).panels;
    product.b = b.from_step(k, kernel).panels;
    product.a_panel_stride = a.stride;
    product.b_panel_stride = b.stride;
    product.i1 = rows;
    product.j1 = cols;
    product.out = out;
    product.out_row = out_row;
    product.triangle = triangle;
    product.scale = scale;
    kernel.multiply_f64(product);
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

void add_product(const Product& p, const PanelKernel& kernel, const Pool& pool) {
  if (p.steps == 0 || p.rows == 0 || p.cols == 0) return;
  const bool large = p.steps * p.rows * p.cols > kAloneWork;
  const Pool& crew = large ? pool : kAlone;
  const bool same = p.a.same(p.b) && p.rows <= p.cols;
  const int64_t stride = panel_stride(std::min(kSteps, p.steps), kernel);
  Workspace right(blocks(p.cols, kernel.panel) * stride);
  const int64_t strips = blocks(p.rows, kStrip);
  const int64_t share = strips >= 4 * crew.threads || crew.threads == 1 ? p.cols : kShare;
  const int64_t shares = blocks(p.cols, share);
  for (int64_t k = 0; k < p.steps; k += kSteps) {
    const int64_t steps = std::min(kSteps, p.steps - k);
    parallel_tasks(crew, blocks(p.cols, kPackColumns), [&](int64_t task) {
      const int64_t j = task * kPackColumns;
      pack(p.b.from_step(k).from_feature(j), steps, std::min(kPackColumns, p.cols - j),
           right.data() + j / kernel.panel * stride, stride, 0, kernel);
    });
    parallel_tasks(crew, strips * shares, [&](int64_t task) {
      const int64_t i = task / shares * kStrip, j = task % shares * share;
      const int64_t rows = std::min(kStrip, p.rows - i), cols = std::min(share, p.cols - j);
      if (p.triangle == Triangle::kLower && j >= i + rows) return;
      if (p.triangle == Triangle::kUpper && j + cols <= i) return;
      PanelProduct product{};
      product.steps = steps;
      product.b = right.data();
      product.a_panel_stride = product.b_panel_stride = stride;
      product.i0 = i;
      product.i1 = i + rows;
      product.j0 = j;
      product.j1 = j + cols;
      product.out = p.out;
      product.out_row = p.out_row;
      product.triangle = p.triangle;
      product.scale = p.scale;
      if (same) {
        product.a = right.data();
        kernel.multiply_f64(product);
        return;
      }
      Workspace left(blocks(kStrip, kernel.panel) * stride);
      pack(p.a.from_step(k).from_feature(i), steps, rows, left.data(), stride, 0, kernel);
      product.a = left.data() - i / kernel.panel * stride;  // `a` counts features from 0
      kernel.multiply_f64(product);
    });
  }
}

QuadraticForm::QuadraticForm(const double* lower, int64_t row, const int64_t* index, int64_t n,
                             const PanelKernel& kernel, const Pool& pool)
    : layout_{n, kernel}, packed_(layout_.bytes()) {
  parallel_tasks(pool, layout_.count(), [&](int64_t strip) {
    const int64_t begin = layout_.begin(strip), steps = layout_.end(strip);
    const int64_t stride = layout_.stride(strip);
    for (int64_t first = begin; first < begin + kStrip; first += kernel.panel) {
      auto* panel = reinterpret_cast<double*>(packed_.data() + layout_.offset(strip) +
                                              (first - begin) / kernel.panel * stride);
      std::fill_n(panel, steps * kernel.panel, 0.0);
      const int64_t end = std::min(first + kernel.panel, n);
      for (int64_t block = 0; block < end; block += kTurn) {
        for (int64_t i = first; i < end; ++i) {
          const double* from = lower + index[i] * row;
          double* to = panel + i - first;
          const int64_t limit = std::min(block + kTurn, i);
          for (int64_t k = block; k < limit; ++k) to[k * kernel.panel] = from[index[k]];
        }
      }
      for (int64_t i = first; i < end; ++i) {
        panel[i * kernel.panel + i - first] = 0.5 * lower[index[i] * (row + 1)];
      }
    }
  });
}

double QuadraticForm::evaluate(const double* v, const double* x, int64_t columns,
                               const Pool& pool) const {
  const int64_t n = layout_.n, strips = layout_.count();
  const PanelKernel& kernel = layout_.kernel;
  if (n == 0 || columns == 0) return 0;
  const int64_t stride = panel_stride(n, kernel);
  const int64_t spans = blocks(columns, kShare);
  const int64_t span = blocks(blocks(columns, spans), kernel.panel) * kernel.panel;
  Workspace right(span / kernel.panel * stride);
  double total = 0;
  for (int64_t first = 0; first < columns; first += span) {
    const int64_t cols = std::min(span, columns - first);
    parallel_tasks(pool, blocks(n, kSteps), [&](int64_t task) {
      const int64_t k = task * kSteps;
      pack_rows(x + k * columns + first, columns, std::min(kSteps, n - k), cols, right.data(),
                stride, k, kernel);
    });
    std::vector<double> sums(static_cast<size_t>(strips), 0.0);
    parallel_tasks(pool, strips, [&](int64_t task) {
      const int64_t strip = strips - 1 - task;  // the longest first
      const int64_t begin = layout_.begin(strip), rows = layout_.size(strip);
      const Workspace memory = Workspace::of_doubles(rows * cols);
      double* block = memory.doubles();
      std::fill_n(block, rows * cols, 0.0);
      multiply({packed_.data() + layout_.offset(strip), layout_.stride(strip)},
               {right.data(), stride}, layout_.end(strip), rows, cols, 1, block, cols,
               Triangle::kAll, kernel);
      double sum = 0;
      for (int64_t r = 0; r < rows; ++r) {
        sum += dot(block + r * cols, v + (begin + r) * columns + first, cols);
      }
      sums[static_cast<size_t>(strip)] = sum;
    });
    for (double sum : sums) total += sum;
  }
  return 2 * total;
}

}  // namespace liar
