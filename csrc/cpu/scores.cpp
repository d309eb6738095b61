#include "scores.h"

#include <algorithm>
#include <vector>

#include "dense.h"
#include "workspace.h"

namespace liar {
namespace {

constexpr int64_t kSpan = 512;  // features at a time: their sums fit a first-level cache

/// Width 1: Σ_o W_oj² · G_jj.
void energy_of_features(const UnitEnergy& a, const Pool& pool) {
  parallel_tasks(pool, (a.d + kSpan - 1) / kSpan, [&](int64_t task) {
    const int64_t first = task * kSpan, size = std::min(kSpan, a.d - first);
    double sum[kSpan] = {};
    for (int64_t o = 0; o < a.d_out; ++o) {
      const double* row = a.weight + o * a.weight_row + first;
      for (int64_t j = 0; j < size; ++j) sum[j] += row[j] * row[j];
    }
    for (int64_t j = 0; j < size; ++j)
      a.energy[first + j] = sum[j] * a.gram[(first + j) * (a.gram_row + 1)];
  });
}

}  // namespace

void unit_energy(const UnitEnergy& a, const PanelKernel& kernel, const Pool& pool) {
  const WorkspaceCall call;
  if (a.width == 1) return energy_of_features(a, pool);
  // tr(W_u G_uu W_uᵀ) = ⟨G_uu, W_uᵀW_u⟩, of which the lower triangles say all.
  std::vector<double> square(static_cast<size_t>(a.width * a.width));
  for (int64_t unit = 0; unit < a.d / a.width; ++unit) {
    const int64_t first = unit * a.width;
    const Operand columns{a.weight + first, a.weight_row};
    std::fill(square.begin(), square.end(), 0.0);
    add_product(
        {columns, columns, a.d_out, a.width, a.width, 1, square.data(), a.width, Triangle::kLower},
        kernel, pool);
    double sum = 0;
    for (int64_t i = 0; i < a.width; ++i) {
      const double* gram = a.gram + (first + i) * a.gram_row + first;
      const double* row = &square[static_cast<size_t>(i * a.width)];
      for (int64_t j = 0; j < i; ++j) sum += 2 * gram[j] * row[j];
      sum += gram[i] * row[i];
    }
    a.energy[unit] = sum;
  }
}

template <class T>
void fisher_update(const FisherUpdate<T>& a, const Pool& pool) {
  const int64_t units = a.d / a.width, per_task = std::max<int64_t>(1, kSpan / a.width);
  parallel_tasks(pool, (units + per_task - 1) / per_task, [&](int64_t task) {
    const int64_t first_unit = task * per_task, count = std::min(per_task, units - first_unit);
    const int64_t first = first_unit * a.width, size = count * a.width;
    std::vector<double> sums(static_cast<size_t>(size));
    for (int64_t s = 0; s < a.sequences; ++s) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t t = 0; t < a.tokens; ++t) {
        const T* x = a.x + s * a.x_sequence + t * a.x_row + first;
        const T* grad = a.grad + s * a.grad_sequence + t * a.grad_row + first;
        double* sum = sums.data();
        for (int64_t j = 0; j < size; ++j)
          sum[j] += static_cast<double>(x[j]) * static_cast<double>(grad[j]);
      }
      for (int64_t u = 0; u < count; ++u) {
        double sum = 0;
        for (int64_t j = u * a.width; j < (u + 1) * a.width; ++j)
          sum += sums[static_cast<size_t>(j)];
        a.fisher[first_unit + u] += sum * sum;
      }
    }
  });
}

template void fisher_update(const FisherUpdate<float>&, const Pool&);
template void fisher_update(const FisherUpdate<double>&, const Pool&);

}  // namespace liar
