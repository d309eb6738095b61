// The rules that every device has for the arguments of the operators that score units.
#pragma once

#include <cmath>

#include "check_ops.h"

namespace liar {

/// W (d_out, d), its Gram matrix (d, d), and units of `width` features.
inline void check_units(const char* op, const Tensor& weight, const Tensor& gram, int64_t width) {
  check(weight.dim() == 2 && is_float(weight), op, "weight must be a float tensor (d_out, d), got ",
        shape_of(weight));
  const int64_t d = weight.size(1);
  check(gram.dim() == 2 && gram.size(0) == d && gram.size(1) == d, op, "gram must be (", d, ", ", d,
        "), got ", shape_of(gram), "; give the moments of the layer that weight is of");
  check(gram.scalar_type() == ScalarType::Float || gram.scalar_type() == ScalarType::Double, op,
        "gram must be float32 or float64; convert it first");
  check(width >= 1 && d > 0 && d % width == 0, op, "width must divide the ", d, " features, got ",
        width, "; it is the number of features per unit");
}

inline void check_obs_curve(const Tensor& weight, const Tensor& gram, int64_t width, double damp,
                            int64_t at_least, int64_t groups) {
  constexpr const char* kOp = "obs_curve: ";
  check_units(kOp, weight, gram, width);
  const int64_t units = weight.size(1) / width;
  check(groups >= 1 && units % groups == 0, kOp, "groups must divide the ", units, " units, got ",
        groups);
  check(at_least >= 0 && at_least <= units && at_least % groups == 0, kOp,
        "at_least must be a multiple of groups from 0 to ", units, ", got ", at_least);
  check(damp >= 0 && std::isfinite(damp), kOp, "damp must be finite and at least 0, got ", damp,
        "; 1e-3 is a good start");
}

inline void check_unit_energy(const Tensor& weight, const Tensor& gram, int64_t width) {
  check_units("unit_energy: ", weight, gram, width);
}

inline void check_fisher_update(const Tensor& fisher, const Tensor& x, const Tensor& grad,
                                int64_t width) {
  constexpr const char* kOp = "fisher_update_: ";
  check(x.dim() == 3 && is_float(x), kOp, "x must be a float tensor (sequences, tokens, d), got ",
        shape_of(x));
  check(grad.dim() == 3 && grad.size(0) == x.size(0) && grad.size(1) == x.size(1) &&
            grad.size(2) == x.size(2),
        kOp, "grad must have the shape of x, ", shape_of(x), ", got ", shape_of(grad));
  check(grad.scalar_type() == x.scalar_type(), kOp,
        "grad must have the dtype of x; convert it first");
  const int64_t d = x.size(2);
  check(width >= 1 && d > 0 && d % width == 0, kOp, "width must divide the ", d, " features, got ",
        width, "; it is the number of features per unit");
  check(fisher.dim() == 1 && fisher.size(0) == d / width && fisher.is_contiguous() &&
            fisher.scalar_type() == ScalarType::Double,
        kOp, "fisher must be (", d / width, ",) float64 and contiguous, got ", shape_of(fisher));
}

/// What fisher_update_ writes, when it is known to be on one device with what it reads.
inline void check_and_mark_fisher(Tensor& fisher, const Tensor& x, const Tensor& grad) {
  constexpr const char* kOp = "fisher_update_: ";
  check_apart(kOp, "fisher", fisher, "x", x);
  check_apart(kOp, "fisher", fisher, "grad", grad);
  mark_changed(kOp, "fisher", fisher);
}

}  // namespace liar
