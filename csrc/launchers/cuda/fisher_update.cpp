// The CUDA launcher of fisher_update_: checks, then raw pointers on torch's current stream.
#include "../check_selection.h"
#include "../launch.h"
#include "current.h"

namespace liar {

void fisher_update_cuda(Tensor fisher, Tensor x, Tensor grad, int64_t width) {
  constexpr const char* kOp = "fisher_update_: ";
  check_fisher_update(fisher, x, grad, width);
  check_device(kOp, "fisher", fisher, x, "x");
  check_device(kOp, "grad", grad, x, "x");
  check_and_mark_fisher(fisher, x, grad);
  const Current current(kOp, x);
  x = with_columns(x);
  grad = with_columns(grad);

  cuda::FisherCall call{};
  call.element = element_of(kOp, x);
  call.x = x.const_data_ptr();
  call.grad = grad.const_data_ptr();
  call.sequences = x.size(0);
  call.tokens = x.size(1);
  call.d = x.size(2);
  call.width = width;
  call.x_sequence = x.stride(0);
  call.x_stride = x.stride(1);
  call.grad_sequence = grad.stride(0);
  call.grad_stride = grad.stride(1);
  call.fisher = data(fisher);
  run(current, x, call, &cuda::fisher_update);
}

}  // namespace liar
