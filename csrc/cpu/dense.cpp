#include "dense.h"

#include <algorithm>
#include <vector>

#include "workspace.h"

// A product is cut into blocks of `out`; one task computes one block and packs what it needs
// itself, so tasks share nothing and the result does not depend on the threads:
//
//                         b: steps × kBlock, packed once per kSteps, in L3
//                       [                 ]
//        a: kStrip wide [ strip 0         ]
//        packed, in L2  [ strip 1         ]  one block of out, kBlock × kBlock
//                       [ ...             ]

namespace liar {
namespace {

constexpr int64_t kSteps = 256;
constexpr int64_t kStrip = 96;  // 96 · 256 doubles are 192 KiB
constexpr int64_t kBlock = 480;

constexpr Pool kAlone{};

int64_t panels(int64_t features, const PanelKernel& kernel) {
  return (features + kernel.panel - 1) / kernel.panel;
}

/// Packs steps [0, steps) of features [0, features), scaled by `sign`.
void pack(const Operand& source, int64_t steps, int64_t features, double sign, double* panel_data,
          int64_t panel_stride, const PanelKernel& kernel) {
  double turned[kPackRows * kBlock];
  double weight[kPackRows];
  std::fill_n(weight, kPackRows, sign);
  const void* rows[kPackRows];
  for (int64_t k = 0; k < steps; k += kPackRows) {
    const int64_t count = std::min(kPackRows, steps - k);
    for (int64_t r = 0; r < count; ++r) {
      const double* row = source.data + (k + r) * source.step_stride;
      rows[r] = source.feature_stride == 1 ? row : turned + r * kBlock;
    }
    if (source.feature_stride != 1) {
      for (int64_t i = 0; i < features; ++i) {
        const double* column = source.data + i * source.feature_stride + k;
        for (int64_t r = 0; r < count; ++r) turned[r * kBlock + i] = column[r];
      }
    }
    kernel.pack({DType::kFloat64, rows, count, sign == 1 ? nullptr : weight, features, panel_data,
                 panel_stride, k, nullptr, nullptr, true});
  }
}

/// One block: rows and cols at most kBlock.
void add_block(const Product& p, const PanelKernel& kernel) {
  const int64_t stride = std::min(kSteps, p.steps) * kernel.panel * kernel.slot_bytes + 64;
  const int64_t right_bytes = panels(p.cols, kernel) * stride;
  Workspace memory(right_bytes + panels(kStrip, kernel) * stride);
  char* right = memory.data();
  char* left = right + right_bytes;
  for (int64_t k = 0; k < p.steps; k += kSteps) {
    const int64_t steps = std::min(kSteps, p.steps - k);
    pack(p.b.from_step(k), steps, p.cols, 1, reinterpret_cast<double*>(right), stride, kernel);
    for (int64_t i = 0; i < p.rows; i += kStrip) {
      const int64_t rows = std::min(kStrip, p.rows - i);
      pack(p.a.from_step(k).from_feature(i), steps, rows, p.sign, reinterpret_cast<double*>(left),
           stride, kernel);
      PanelProduct product{};
      product.steps = steps;
      product.a =
          left - i / kernel.panel * stride;  // the product counts rows from the block's first
      product.b = right;
      product.a_panel_stride = product.b_panel_stride = stride;
      product.i0 = i;
      product.i1 = i + rows;
      product.j1 = p.cols;
      product.out = p.out;
      product.out_row = p.out_row;
      product.triangle = p.triangle;
      kernel.multiply_f64(product);
    }
  }
}

/// The part of `p` that block (i, j) of the result holds.
Product block_of(const Product& p, int64_t i, int64_t j) {
  Product part = p;
  part.a = p.a.from_feature(i);
  part.b = p.b.from_feature(j);
  part.rows = std::min(kBlock, p.rows - i);
  part.cols = std::min(kBlock, p.cols - j);
  part.out = p.out + i * p.out_row + j;
  if (i != j) part.triangle = Triangle::kAll;
  return part;
}

}  // namespace

void add_product(const Product& p, const PanelKernel& kernel, const Pool& pool) {
  if (p.steps == 0) return;
  struct Corner {
    int64_t i, j;
  };
  std::vector<Corner> blocks;
  for (int64_t i = 0; i < p.rows; i += kBlock) {
    for (int64_t j = 0; j < p.cols; j += kBlock) {
      if (p.triangle == Triangle::kLower && j > i) continue;
      if (p.triangle == Triangle::kUpper && j < i) continue;
      blocks.push_back({i, j});
    }
  }
  parallel_tasks(pool, static_cast<int64_t>(blocks.size()), [&](int64_t task) {
    const Corner corner = blocks[static_cast<size_t>(task)];
    add_block(block_of(p, corner.i, corner.j), kernel);
  });
}

double dot_product(const Product& p, bool a_upper, const double* left, int64_t left_row,
                   const PanelKernel& kernel, const Pool& pool) {
  const int64_t across = (p.cols + kBlock - 1) / kBlock;
  const int64_t tasks = (p.rows + kBlock - 1) / kBlock * across;
  std::vector<double> sums(static_cast<size_t>(tasks), 0.0);
  parallel_tasks(pool, tasks, [&](int64_t task) {
    const int64_t i = task / across * kBlock, j = task % across * kBlock;
    Product part = block_of(p, i, j);
    if (a_upper) part.steps = std::min(p.steps, i + part.rows);
    std::vector<double> block(static_cast<size_t>(part.rows * part.cols), 0.0);
    part.out = block.data();
    part.out_row = part.cols;
    add_product(part, kernel, kAlone);
    double sum = 0;
    for (int64_t r = 0; r < part.rows; ++r) {
      const double* other = left + (i + r) * left_row + j;
      for (int64_t c = 0; c < part.cols; ++c) {
        sum += block[static_cast<size_t>(r * part.cols + c)] * other[c];
      }
    }
    sums[static_cast<size_t>(task)] = sum;
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace liar
