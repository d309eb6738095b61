// Arguments as float64, which the solvers work in.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace liar {

/// `tensor` itself if it is float64 with contiguous columns, else a float64 copy.
inline Tensor as_float64(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Double && columns_contiguous(tensor)) return tensor;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes(), ScalarType::Double);
  return torch::stable::copy_(copy, tensor);
}

}  // namespace liar
