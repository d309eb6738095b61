// The launcher of fisher_update_: checks, then raw pointers.
#include <torch/csrc/stable/ops.h>

#include "../../cpu/scores.h"
#include "../check_selection.h"
#include "../launch.h"
#include "on_cpu.h"
#include "torch_pool.h"

namespace liar {
namespace {

/// 16-bit rows as float32, float32 and float64 as they are; columns contiguous.
Tensor as_float32_or_64(const Tensor& tensor) {
  const bool wide = tensor.scalar_type() == ScalarType::Double;
  if ((wide || tensor.scalar_type() == ScalarType::Float) && columns_contiguous(tensor))
    return tensor;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes(),
                                         wide ? ScalarType::Double : ScalarType::Float);
  return torch::stable::copy_(copy, tensor);
}

template <class T>
void update(Tensor& fisher, const Tensor& x, const Tensor& grad, int64_t width) {
  fisher_update<T>(
      {x.size(0), x.size(1), x.size(2), width, static_cast<const T*>(x.const_data_ptr()),
       x.stride(0), x.stride(1), static_cast<const T*>(grad.const_data_ptr()), grad.stride(0),
       grad.stride(1), static_cast<double*>(fisher.mutable_data_ptr())},
      torch_pool());
}

}  // namespace

void fisher_update_cpu(Tensor fisher, Tensor x, Tensor grad, int64_t width) {
  constexpr const char* kOp = "fisher_update_: ";
  check_fisher_update(fisher, x, grad, width);
  check_cpu(kOp, "x", x, "x");
  check_cpu(kOp, "fisher", fisher, "x");
  check_cpu(kOp, "grad", grad, "x");
  check_and_mark_fisher(fisher, x, grad);
  x = as_float32_or_64(x);
  grad = as_float32_or_64(grad);
  if (x.scalar_type() == ScalarType::Double)
    update<double>(fisher, x, grad, width);
  else
    update<float>(fisher, x, grad, width);
}

}  // namespace liar
