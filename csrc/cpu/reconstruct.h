// Fold what was removed into the weights that stay, on raw pointers, in float64.
#pragma once

#include <cstdint>

#include "gather.h"
#include "panel_kernel.h"
#include "parallel.h"

namespace liar {

struct Reconstruct {
  int64_t d_out, d, n, ladder;
  Float64View weight;                // (d_out, d)
  Float64View gram;                  // (d, d), lower triangle
  const int64_t* kept;               // (n,) ascending
  const double* damps;               // (ladder,)
  const Float64View* holdout;        // (d, d), lower triangle; null: none
  const Float64View* cross;          // (d, d_out); null: the plain form
  const Float64View* holdout_cross;  // (d, d_out)
  double* weight_out;                // (ladder, d_out, n); null: only the errors are wanted
  double* error_out;                 // (ladder,)
  double* holdout_out;               // (ladder,)
  double* info_out;                  // (ladder, 2): code and condition
};

/// Whether sites are solved sooner one per thread than one after the other with all threads inside,
/// where a site of n kept features keeps n / 256 threads busy.
bool side_by_side(int64_t sites, int64_t n, int64_t threads);

/// Solves `sites` jobs of one shape, `side_by_side` or one after the other; the result is the same.
void reconstruct(const Reconstruct* jobs, int64_t sites, const PanelKernel& kernel,
                 const Pool& pool);

}  // namespace liar
