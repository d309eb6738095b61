// The rules that every device has for the arguments of obs_curve.
#pragma once

#include <cmath>

#include "check_ops.h"

namespace liar {

/// W (d_out, d), its Gram matrix (d, d), and units of `width` features.
inline void check_obs_curve(const Tensor& weight, const Tensor& gram, int64_t width, double damp,
                            int64_t at_least, int64_t groups) {
  constexpr const char* kOp = "obs_curve: ";
  check(weight.dim() == 2 && is_float(weight), kOp,
        "weight must be a float tensor (d_out, d), got ", shape_of(weight));
  const int64_t d = weight.size(1);
  check(gram.dim() == 2 && gram.size(0) == d && gram.size(1) == d, kOp, "gram must be (", d, ", ",
        d, "), got ", shape_of(gram), "; give the moments of the layer that weight is of");
  check(gram.scalar_type() == ScalarType::Float || gram.scalar_type() == ScalarType::Double, kOp,
        "gram must be float32 or float64; convert it first");
  check(width >= 1 && d > 0 && d % width == 0, kOp, "width must divide the ", d, " features, got ",
        width, "; it is the number of features per unit");
  const int64_t units = d / width;
  check(groups >= 1 && units % groups == 0, kOp, "groups must divide the ", units, " units, got ",
        groups);
  check(at_least >= 0 && at_least <= units && at_least % groups == 0, kOp,
        "at_least must be a multiple of groups from 0 to ", units, ", got ", at_least);
  check(damp >= 0 && std::isfinite(damp), kOp, "damp must be finite and at least 0, got ", damp,
        "; 1e-3 is a good start");
}

}  // namespace liar
