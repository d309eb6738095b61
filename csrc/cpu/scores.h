// Scores of units without elimination, on raw pointers.
#pragma once

#include <cstdint>

#include "panel_kernel.h"
#include "parallel.h"

namespace liar {

/// energy_u = tr(W_u G_uu W_uᵀ), float64; columns contiguous.
struct UnitEnergy {
  int64_t d_out, d, width;
  const double* weight;  // (d_out, d)
  int64_t weight_row;
  const double* gram;  // (d, d), lower triangle
  int64_t gram_row;
  double* energy;  // (d / width,)
};

void unit_energy(const UnitEnergy& args, const PanelKernel& kernel, const Pool& pool);

/// fisher_u += Σ_s (Σ_t Σ_{j∈u} x_stj g_stj)², summed in float64; columns contiguous.
template <class T>
struct FisherUpdate {
  int64_t sequences, tokens, d, width;
  const T* x;  // (sequences, tokens, d)
  int64_t x_sequence, x_row;
  const T* grad;  // (sequences, tokens, d)
  int64_t grad_sequence, grad_row;
  double* fisher;  // (d / width,)
};

template <class T>
void fisher_update(const FisherUpdate<T>& args, const Pool& pool);

}  // namespace liar
