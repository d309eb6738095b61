// Greedy elimination of units by the error that remains after reconstruction, on raw pointers.
#pragma once

#include <cstdint>

#include "panel_kernel.h"
#include "parallel.h"

namespace liar {

/// Float64, row-major and contiguous. `units · width = d`; `removed = units − at_least`.
struct ObsCurve {
  int64_t d_out, d, width, groups, at_least;
  double damp;
  double* weight;      // (d_out, d); columns of dead features are zeroed
  double* inverse;     // (d, d), lower triangle: G in, overwritten
  double* energy;      // (d, d) of workspace
  int64_t* order_out;  // (removed,)
  double* error_out;   // (removed + 1,)
  double* info_out;    // (2,) code, condition
};

void obs_curve(const ObsCurve& args, const PanelKernel& kernel, const Pool& pool);

}  // namespace liar
