#include "gram.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "gram_rows.h"
#include "workspace.h"

// The order of the loops, for d features:
//
//   group of tokens        as many chunks as fit the workspace
//     pack                 tasks over chunks: check, convert, weigh and sum each row while it is
//                          in cache
//     multiply             tasks over square blocks of `gram`: a block stays in the L2 cache while
//                          all chunks of the group are added to it, in order
//
//        gram  +---+           one block = kBlockPanels panels a side; blocks right of the
//              | 0 |           diagonal are never touched
//              +---+---+
//              | 1 | 2 |
//              +---+---+---+
//              | 3 | 4 | 5 |
//              +---+---+---+
//
// Few tokens make small panels, and then the time goes into reading and writing `gram`: where all
// panels of the right side stay in the L2 cache, a task is a strip of whole rows instead, one
// register tile high, which is read and written as it lies in memory.
//
// Every element of `gram` is written by one task per group, with chunks in a fixed order, so the
// result is bit-identical whatever the number of threads.

namespace liar {
namespace {

constexpr int64_t kChunkSteps = 1024;     // a packed panel is 192 KiB
constexpr int64_t kGroupBytes = 4 << 20;  // a core's share of an L3 cache
constexpr int64_t kStripBytes = 1 << 20;  // an L2 cache
constexpr int64_t kBlockPanels = 2;       // 2 + 2 panels and 96² doubles: half of an L2 cache

/// One packed chunk of tokens.
struct Chunk {
  int64_t tokens = 0;  // finite rows packed
  double weight_sum = 0, dropped = 0;
};

/// Where a group's packed panels and sums are.
struct Panels {
  char* left;
  char* right;  // equals left for an unweighted Gram matrix
  double* sums;
  int64_t left_stride, right_stride;  // bytes from a panel to the next one
  int64_t left_chunk, right_chunk;    // bytes from a chunk to the next one
};

class Update {
 public:
  Update(const GramUpdate& update, const KernelSet& kernels, const Pool& thread_pool)
      : u(update), pool(thread_pool), rows(choose_rows(update)) {
    const bool paired =
        u.x.dtype == DType::kBFloat16 && kernels.bf16 != nullptr && rows.weight.empty();
    kernel = paired ? kernels.bf16 : u.x.dtype == DType::kFloat64 ? kernels.f64 : kernels.f32;
    right_cols = u.y != nullptr ? u.y->cols : u.x.cols;
    shared = u.y == nullptr && rows.weight.empty();
    sums_stride = u.x.cols + kMostLanes;
  }

  void run() {
    const int64_t chunk_tokens = kChunkSteps * kernel->tokens_per_step;
    const int64_t chunks = (rows.size + chunk_tokens - 1) / chunk_tokens;
    u.count[1] += rows.dropped;
    if (chunks == 0) return;

    // A short chunk takes no more room than it needs. One line of padding keeps the panels of a
    // row off the same cache sets.
    const int64_t at_once = kernel->tokens_per_step * kernel->steps_at_once;
    const int64_t steps =
        std::min(kChunkSteps, (rows.size + at_once - 1) / at_once * kernel->steps_at_once);
    Panels p{};
    p.left_stride = p.right_stride = steps * kernel->panel * kernel->slot_bytes + 64;
    p.left_chunk = panels(u.x.cols) * p.left_stride;
    p.right_chunk = shared ? 0 : panels(right_cols) * p.right_stride;
    const int64_t group = std::clamp<int64_t>(kGroupBytes / (p.left_chunk + p.right_chunk + 1), 1,
                                              std::min<int64_t>(chunks, 64));
    Workspace memory(group * (p.left_chunk + p.right_chunk));
    std::vector<double> sums(static_cast<size_t>(group * sums_stride));
    p.left = memory.data();
    p.right = shared ? p.left : p.left + group * p.left_chunk;
    if (shared) p.right_chunk = p.left_chunk;
    p.sums = sums.data();

    std::vector<Chunk> packed(static_cast<size_t>(group));
    for (int64_t first = 0; first < chunks; first += group) {
      const int64_t live = std::min(group, chunks - first);
      std::fill(sums.begin(), sums.end(), 0.0);
      parallel_tasks(pool, live, [&](int64_t k) {
        const int64_t begin = (first + k) * chunk_tokens;
        packed[static_cast<size_t>(k)] =
            pack(p, k, begin, std::min(begin + chunk_tokens, rows.size));
      });
      for (int64_t k = 0; k < live; ++k)
        add_sums(packed[static_cast<size_t>(k)], p.sums + k * sums_stride);
      multiply(p, packed, live);
    }
  }

 private:
  int64_t panels(int64_t features) const { return (features + kernel->panel - 1) / kernel->panel; }

  Chunk pack(const Panels& p, int64_t place, int64_t begin, int64_t end) const {
    Packing packing(*this, p, place);
    for (int64_t k = begin; k < end; ++k) packing.take(k);
    packing.finish();
    return packing.chunk;
  }

  /// Packs the rows of one chunk, kPackRows at a time.
  struct Packing {
    Packing(const Update& update, const Panels& panels, int64_t place)
        : of(update),
          left(panels.left + place * panels.left_chunk),
          right(panels.right + place * panels.right_chunk),
          sums(panels.sums + place * update.sums_stride),
          left_stride(panels.left_stride),
          right_stride(panels.right_stride),
          x(update.u.x),
          y(update.u.y != nullptr ? *update.u.y : update.u.x),
          scratch(update.sums_stride * static_cast<int64_t>(sizeof(double))) {}

    void take(int64_t k) {
      index[held] = k;
      read(held++);
      if (held == kPackRows) flush();
    }

    void finish() {
      while (held > 0) flush();
    }

    /// Packs the rows held; if one of them is beyond the limit, leaves out those that are, and
    /// keeps the others until there are kPackRows again.
    void flush() {
      if (pack(false)) return;
      int64_t kept = 0;
      for (int64_t r = 0; r < held; ++r) {
        if (within(r)) index[kept++] = index[r];
      }
      if (kept == held) {  // many values near the limit
        pack(true);
        return;
      }
      chunk.dropped += static_cast<double>(held - kept);
      held = kept;
      for (int64_t r = 0; r < held; ++r) read(r);
    }

    bool within(int64_t r) const {
      const DType dtype = of.u.x.dtype;
      const double limit = of.u.limit, most = limit / std::max(1.0, weight[r]);
      return of.kernel->within(dtype, x_rows[r], of.u.x.cols, most) &&
             (of.u.y == nullptr || of.kernel->within(dtype, y_rows[r], of.right_cols, limit));
    }

    bool pack(bool trusted) {
      const int64_t step = chunk.tokens / of.kernel->tokens_per_step;
      const double* scale = of.rows.weight.empty() ? nullptr : weight;
      if (!of.shared) {
        const PackRows rows_out{of.u.x.dtype,  of.u.y != nullptr ? y_rows : x_rows,
                                held,          nullptr,
                                of.right_cols, right,
                                right_stride,  step,
                                nullptr,       nullptr,
                                trusted,       ahead(of.u.y != nullptr ? y : x),
                                of.u.limit};
        if (!of.kernel->pack(rows_out) && !trusted) return false;
      }
      const PackRows rows_out{of.u.x.dtype, x_rows,      held,      scale, of.u.x.cols,
                              left,         left_stride, step,      sums,  scratch.data(),
                              trusted,      ahead(x),    of.u.limit};
      if (!of.kernel->pack(rows_out) && !trusted) return false;
      for (int64_t r = 0; r < held; ++r) chunk.weight_sum += weight[r];
      chunk.tokens += held;
      held = 0;
      return true;
    }

    int64_t ahead(const RowReader& reader) const {
      return of.rows.all && reader.scratch.empty() ? kPackRows * reader.m.row_stride * reader.bytes
                                                   : 0;
    }

    void read(int64_t place) {
      const auto k = static_cast<size_t>(index[place]);
      const int64_t row = of.rows.all ? index[place] : of.rows.index[k];
      x_rows[place] = x.read(row, place);
      if (of.u.y != nullptr) y_rows[place] = y.read(row, place);
      weight[place] = of.rows.weight.empty() ? 1.0 : of.rows.weight[k];
    }

    const Update& of;
    char *left, *right;
    double* sums;
    int64_t left_stride, right_stride;
    RowReader x, y;
    Workspace scratch;
    Chunk chunk;
    int64_t held = 0;
    int64_t index[kPackRows];
    const void* x_rows[kPackRows];
    const void* y_rows[kPackRows];
    double weight[kPackRows];
  };

  void add_sums(const Chunk& chunk, const double* sums) const {
    u.count[0] += chunk.weight_sum;
    u.count[1] += chunk.dropped;
    for (int64_t c = 0; c < u.x.cols; ++c) {
      if (u.wide) {
        static_cast<double*>(u.total)[c] += sums[c];
      } else {
        static_cast<float*>(u.total)[c] += static_cast<float>(sums[c]);
      }
    }
  }

  void multiply(const Panels& p, const std::vector<Chunk>& packed, int64_t live) const {
    const bool strips = live * panels(right_cols) * p.right_stride <= kStripBytes;
    const int64_t high = strips ? kernel->rows : kBlockPanels * kernel->panel;
    const int64_t wide = strips ? right_cols : kBlockPanels * kernel->panel;
    std::vector<std::pair<int64_t, int64_t>> blocks;  // first row, first column
    for (int64_t i = 0; i < u.x.cols; i += high) {
      const int64_t end = u.y != nullptr ? right_cols : std::min(i + high, right_cols);
      for (int64_t j = 0; j < end; j += wide) blocks.emplace_back(i, j);
    }
    parallel_tasks(pool, static_cast<int64_t>(blocks.size()), [&](int64_t task) {
      const auto [i, j] = blocks[static_cast<size_t>(task)];
      for (int64_t k = 0; k < live; ++k) {
        PanelProduct product{};
        product.steps = (packed[static_cast<size_t>(k)].tokens + kernel->tokens_per_step - 1) /
                        kernel->tokens_per_step;
        product.a = p.left + k * p.left_chunk;
        product.b = p.right + k * p.right_chunk;
        product.a_panel_stride = p.left_stride;
        product.b_panel_stride = p.right_stride;
        product.i0 = i;
        product.i1 = std::min(i + high, u.x.cols);
        product.j0 = j;
        product.j1 = std::min(j + wide, right_cols);
        product.out = u.gram;
        product.out_row = u.gram_row;
        product.triangle = u.y == nullptr ? Triangle::kLower : Triangle::kAll;
        if (product.steps > 0) (u.wide ? kernel->multiply_f64 : kernel->multiply_f32)(product);
      }
    });
  }

  const GramUpdate& u;
  const Pool& pool;
  ChosenRows rows;
  const PanelKernel* kernel;
  int64_t right_cols, sums_stride;
  bool shared;  // left and right operand are the same panels
};

}  // namespace

void gram_update(const GramUpdate& update, const KernelSet& kernels, const Pool& pool) {
  const WorkspaceCall call;
  Update(update, kernels, pool).run();
}

}  // namespace liar
