// The CUDA launcher of obs_curve: checks, then raw pointers on torch's current stream.
#include "../check_selection.h"
#include "../launch.h"
#include "../widen.h"
#include "current.h"

namespace liar {

std::tuple<Tensor, Tensor, Tensor> obs_curve_cuda(Tensor weight, Tensor gram, int64_t width,
                                                  double damp, int64_t at_least, int64_t groups) {
  constexpr const char* kOp = "obs_curve: ";
  check_obs_curve(weight, gram, width, damp, at_least, groups);
  constexpr int64_t kMost = 65535;  // the height of a grid
  check(width == 1 || (width <= kMost && weight.size(1) / width <= kMost), kOp,
        "units of more than 1 feature must be at most ", kMost, ", and no wider, on CUDA, got ",
        weight.size(1) / width, " of width ", width, "; move the tensors to the CPU");
  check_device(kOp, "gram", gram, weight, "weight");
  const Current current(kOp, weight);
  const int64_t removed = weight.size(1) / width - at_least, order_shape[] = {removed},
                error_shape[] = {removed + 1}, info_shape[] = {2};
  Tensor order = torch::stable::new_empty(weight, {order_shape, 1}, ScalarType::Long),
         error = torch::stable::new_empty(weight, {error_shape, 1}, ScalarType::Double),
         info = torch::stable::new_empty(weight, {info_shape, 1}, ScalarType::Double);
  const Tensor weight64 = as_float64(weight), gram64 = as_float64(gram);

  cuda::CurveCall call{};
  call.d = weight.size(1);
  call.d_out = weight.size(0);
  call.width = width;
  call.groups = groups;
  call.steps = removed;
  call.weight = data(weight64);
  call.weight_stride = weight64.stride(0);
  call.gram = data(gram64);
  call.gram_stride = gram64.stride(0);
  call.damp = damp;
  call.order = static_cast<int64_t*>(order.mutable_data_ptr());
  call.error = data(error);
  call.info = data(info);
  run(current, weight, call, &cuda::obs_curve);
  return {order, error, info};
}

}  // namespace liar
