#include "gather.h"

#include <algorithm>
#include <atomic>

namespace liar {
namespace {

constexpr int64_t kTile = 64;  // steps of one task
constexpr int64_t kTurn = 8;   // steps turned together: a cache line of each row
constexpr int64_t kAhead = 4;  // rows, and such lines, that are fetched before they are read:
                               // rows are too far apart for the processor to foresee them

/// to[k, i] = row(i)[steps[k]] for k in [k0, k1) below limit(i): reads whole lines of rows.
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

int64_t tiles(int64_t steps) { return (steps + kTile - 1) / kTile; }

/// 0 · x is 0 for a finite x and NaN otherwise; in several chains so that no sum waits for another.
bool finite_row(const double* x, int64_t count) {
  constexpr int64_t kChains = 16;
  double bad[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains) {
    for (int64_t c = 0; c < kChains; ++c) bad[c] += 0 * x[i + c];
  }
  for (; i < count; ++i) bad[0] += 0 * x[i];
  return std::all_of(bad, bad + kChains, [](double chain) { return chain == 0; });
}

/// Whether rows are finite, each up to limit(i).
template <class Limit>
bool finite_rows(const Float64View& from, int64_t rows, const Limit& limit, const Pool& pool) {
  std::atomic<bool> finite{true};
  parallel_tasks(pool, tiles(rows), [&](int64_t tile) {
    for (int64_t i = tile * kTile; i < std::min((tile + 1) * kTile, rows) && finite; ++i) {
      if (!finite_row(from.row(i), limit(i))) finite = false;
    }
  });
  return finite;
}

}  // namespace

bool all_finite(const Float64View& from, int64_t rows, int64_t cols, const Pool& pool) {
  return finite_rows(from, rows, [&](int64_t) { return cols; }, pool);
}

bool lower_finite(const Float64View& from, int64_t d, const Pool& pool) {
  return finite_rows(from, d, [](int64_t i) { return i + 1; }, pool);
}

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
  const int64_t width = kernel.panel;
  parallel_tasks(pool, tiles(steps.count), [&](int64_t tile) {
    const int64_t k0 = tile * kTile, k1 = std::min(k0 + kTile, steps.count);
    for (int64_t first = 0; first < features.count; first += width) {
      const int64_t end = std::min(first + width, features.count);
      double* to = result.panel(first / width);
      if (steps[k1 - 1] <= features[first]) {
        turn_rows([&](int64_t i) { return lower.row(features[first + i]); }, steps, k0, k1,
                  end - first, [&](int64_t) { return k1; }, to, width);
        continue;
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
    }
  });
  return result;
}

Panels gather(const Float64View& from, const Index& steps, const Index& features,
              const PanelKernel& kernel, const Pool& pool) {
  Panels result(steps.count, features.count, kernel);
  parallel_tasks(pool, tiles(steps.count), [&](int64_t tile) {
    for (int64_t k = tile * kTile; k < std::min((tile + 1) * kTile, steps.count); ++k) {
      const double* row = from.row(steps[k]);
      for (int64_t first = 0; first < features.count; first += kernel.panel) {
        double* to = &result.at(k, first) - first;
        const int64_t end = std::min(first + kernel.panel, features.count);
        for (int64_t i = first; i < end; ++i) to[i] = row[features[i]];
      }
    }
  });
  return result;
}

}  // namespace liar
