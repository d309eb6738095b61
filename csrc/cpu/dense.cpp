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
constexpr Pool kAlone{};

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

/// Columns of a task.
int64_t share_of(int64_t cols, int64_t strips, const Pool& pool) {
  return strips >= 4 * pool.threads || pool.threads == 1 ? cols : kShare;
}

/// Panels of features [first, first + features) and steps [step, step + steps) of `source`.
void pack(const Operand& source, int64_t step, int64_t steps, int64_t first, int64_t features,
          char* panels, int64_t stride, const PanelKernel& kernel) {
  const void* group[kPackRows];
  for (int64_t k = 0; k < steps; k += kPackRows) {
    const int64_t count = std::min(kPackRows, steps - k);
    for (int64_t r = 0; r < count; ++r) {
      group[r] = source.data + (step + k + r) * source.step_stride + first;
    }
    kernel.pack({DType::kFloat64, group, count, nullptr, features, panels, stride, k, nullptr,
                 nullptr, true, 0});
  }
}

}  // namespace

void add_product(const Product& p, const PanelKernel& kernel, const Pool& pool) {
  if (p.steps == 0 || p.rows == 0 || p.cols == 0) return;
  const bool large = p.steps * p.rows * p.cols > kAloneWork;
  const Pool& crew = large ? pool : kAlone;
  const bool same = p.a.same(p.b) && p.rows <= p.cols;
  const int64_t stride = panel_stride(std::min(kSteps, p.steps), kernel);
  Workspace right(blocks(p.cols, kernel.panel) * stride);
  const int64_t strips = blocks(p.rows, kStrip);
  const int64_t share = share_of(p.cols, strips, crew);
  const int64_t shares = blocks(p.cols, share);
  for (int64_t k = 0; k < p.steps; k += kSteps) {
    const int64_t steps = std::min(kSteps, p.steps - k);
    parallel_tasks(crew, blocks(p.cols, kPackColumns), [&](int64_t task) {
      const int64_t j = task * kPackColumns;
      pack(p.b, k, steps, j, std::min(kPackColumns, p.cols - j),
           right.data() + j / kernel.panel * stride, stride, kernel);
    });
    parallel_tasks(crew, strips * shares, [&](int64_t task) {
      const int64_t i = task / shares * kStrip, j = task % shares * share;
      const int64_t rows = std::min(kStrip, p.rows - i), cols = std::min(share, p.cols - j);
      if (p.triangle == Triangle::kLower && j >= i + rows) return;
      if (p.triangle == Triangle::kUpper && j + cols <= i) return;
      const auto from = [&](const char* left) {  // counts features from 0
        multiply({left, stride}, {right.data(), stride}, steps, {i, i + rows, j, j + cols}, p.scale,
                 {p.out, p.out_row, kernel.panel}, p.triangle, kernel);
      };
      if (same) return from(right.data());
      Workspace left(blocks(kStrip, kernel.panel) * stride);
      pack(p.a, k, steps, i, rows, left.data(), stride, kernel);
      from(left.data() - i / kernel.panel * stride);
    });
  }
}

void add_product(const Panels& a, const Panels& b, double scale, const Output& out,
                 Triangle triangle, const Pool& pool) {
  if (a.steps() == 0 || a.features() == 0 || b.features() == 0) return;
  const int64_t strips = blocks(a.features(), kStrip);
  const int64_t share = share_of(b.features(), strips, pool), shares = blocks(b.features(), share);
  parallel_tasks(pool, strips * shares, [&](int64_t task) {
    const int64_t i = task / shares * kStrip, j = task % shares * share;
    const int64_t rows = std::min(kStrip, a.features() - i),
                  cols = std::min(share, b.features() - j);
    if (triangle == Triangle::kLower && j >= i + rows) return;
    if (triangle == Triangle::kUpper && j + cols <= i) return;
    multiply(a.packed(), b.packed(), a.steps(), {i, i + rows, j, j + cols}, scale, out, triangle,
             a.kernel());
  });
}

QuadraticForm::QuadraticForm(const Float64View& lower, const Index& index,
                             const PanelKernel& kernel, const Pool& pool)
    : half_(gather_triangle(lower, index, kernel, pool)) {
  for (int64_t i = 0; i < index.count; ++i) half_.at(i, i) *= 0.5;
}

double QuadraticForm::evaluate(const Panels& v, const Panels& x, const Pool& pool) const {
  const int64_t strips = half_.strips(), width = x.width();
  const PanelKernel& kernel = x.kernel();
  std::vector<double> sums(static_cast<size_t>(strips), 0.0);
  parallel_tasks(pool, strips, [&](int64_t task) {
    const int64_t strip = strips - 1 - task;  // the longest first
    const int64_t begin = half_.begin(strip), rows = half_.size(strip);
    const int64_t span = std::min(x.features(), kShare);
    Panels product(rows, span, kernel);
    for (int64_t first = 0; first < x.features(); first += span) {
      const int64_t cols = std::min(span, x.features() - first);
      product.fill_zero();
      multiply(half_.strip(strip), x.packed(first / width), half_.end(strip), {0, rows, 0, cols}, 1,
               product.output(), Triangle::kAll, kernel);
      for (int64_t j = 0; j < cols; j += width) {
        sums[static_cast<size_t>(strip)] += dot(
            product.panel(j / width), v.panel((first + j) / width) + begin * width, rows * width);
      }
    }
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return 2 * total;
}

}  // namespace liar
