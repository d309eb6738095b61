#include "gather.h"

#include <algorithm>

namespace liar {
namespace {

constexpr int64_t kTile = 64;  // steps of one task
constexpr int64_t kTurn = 8;   // steps turned together: a cache line of each row
constexpr int64_t kAhead = 4;  // rows, and such lines, that are fetched before they are read:
                               // rows are too far apart for the processor to foresee them

/// to[k, i] = from[i, k] for steps [k0, k1), all of them at most `limit(i)`: reads lines of rows.
template <class Row, class Limit>
void turn_rows(const Row& row, const Index& steps, int64_t k0, int64_t k1, int64_t features,
               const Limit& limit, double* to, int64_t width) {
  for (int64_t block = k0; block < k1; block += kTurn) {
    for (int64_t i = 0; i < features; ++i) {
      const double* from = row(i);
      const int64_t end = std::min({block + kTurn, k1, limit(i)});
      __builtin_prefetch(from + steps[block] + kAhead * kTurn);
      for (int64_t k = block; k < end; ++k) to[k * width + i] = from[steps[k]];
    }
  }
}

/// Calls task(k0, k1, first, end) for tiles of steps and panels of features.
template <class Task>
void over_tiles(const Panels& to, const Pool& pool, const Task& task) {
  parallel_tasks(pool, (to.steps() + kTile - 1) / kTile, [&](int64_t tile) {
    const int64_t k0 = tile * kTile, k1 = std::min(k0 + kTile, to.steps());
    for (int64_t p = 0; p < to.count(); ++p) {
      task(k0, k1, p * to.width(), std::min((p + 1) * to.width(), to.features()), to.panel(p));
    }
  });
}

}  // namespace

TrianglePanels gather_triangle(const Float64View& lower, const Index& index,
                               const PanelKernel& kernel, const Pool& pool) {
  TrianglePanels to(index.count, kernel);
  parallel_tasks(pool, to.strips(), [&](int64_t task) {
    const int64_t s = to.strips() - 1 - task;  // the longest first
    for (int64_t first = to.begin(s); first < to.end(s); first += kernel.panel) {
      const int64_t end = std::min(first + kernel.panel, to.end(s));
      turn_rows([&](int64_t i) { return lower.row(index[first + i]); }, index, 0, end, end - first,
                [&](int64_t i) { return first + i + 1; }, to.panel(first), kernel.panel);
    }
  });
  return to;
}

Panels gather_symmetric(const Float64View& lower, const Index& steps, const Index& features,
                        const PanelKernel& kernel, const Pool& pool) {
  Panels result(steps.count, features.count, kernel);
  over_tiles(result, pool, [&](int64_t k0, int64_t k1, int64_t first, int64_t end, double* to) {
    const int64_t width = kernel.panel;
    if (steps[k1 - 1] <= features[first]) {
      turn_rows([&](int64_t i) { return lower.row(features[first + i]); }, steps, k0, k1,
                end - first, [&](int64_t) { return k1; }, to, width);
      return;
    }
    for (int64_t k = k0; k < k1; ++k) {
      const double* row = lower.row(steps[k]);
      const double* later = lower.row(steps[std::min(k + kAhead, k1 - 1)]);
      double* line = to + k * width - first;
      int64_t i = first;
      for (; i < end && features[i] <= steps[k]; ++i) {
        __builtin_prefetch(later + features[i]);
        line[i] = row[features[i]];
      }
      for (; i < end; ++i) line[i] = lower.row(features[i])[steps[k]];
    }
  });
  return result;
}

Panels gather(const Float64View& from, const Index& steps, const Index& features,
              const PanelKernel& kernel, const Pool& pool) {
  Panels result(steps.count, features.count, kernel);
  over_tiles(result, pool, [&](int64_t k0, int64_t k1, int64_t first, int64_t end, double* to) {
    for (int64_t k = k0; k < k1; ++k) {
      const double* row = from.row(steps[k]);
      for (int64_t i = first; i < end; ++i) to[k * kernel.panel + i - first] = row[features[i]];
    }
  });
  return result;
}

Panels gather_turned(const Float64View& from, const Index& steps, int64_t features,
                     const PanelKernel& kernel, const Pool& pool) {
  Panels result(steps.count, features, kernel);
  over_tiles(result, pool, [&](int64_t k0, int64_t k1, int64_t first, int64_t end, double* to) {
    turn_rows([&](int64_t i) { return from.row(first + i); }, steps, k0, k1, end - first,
              [&](int64_t) { return k1; }, to, kernel.panel);
  });
  return result;
}

}  // namespace liar
