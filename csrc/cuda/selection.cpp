// The CUDA launchers of obs_curve, unit_energy and fisher_update_: checks, then raw pointers on
// torch's current stream.
#include "../check_selection.h"
#include "../launch.h"
#include "../widen.h"
#include "current.h"

namespace liar {

std::tuple<Tensor, Tensor, Tensor> obs_curve_cuda(Tensor weight, Tensor gram, int64_t width,
                                                  double damp, int64_t at_least, int64_t groups) {
  constexpr const char* kOp = "obs_curve: ";
  check_obs_curve(weight, gram, width, damp, at_least, groups);
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

Tensor unit_energy_cuda(Tensor weight, Tensor gram, int64_t width) {
  constexpr const char* kOp = "unit_energy: ";
  check_unit_energy(weight, gram, width);
  check_device(kOp, "gram", gram, weight, "weight");
  const Current current(kOp, weight);
  const int64_t shape[] = {weight.size(1) / width};
  Tensor energy = torch::stable::new_empty(weight, {shape, 1}, ScalarType::Double);
  const Tensor weight64 = as_float64(weight), gram64 = as_float64(gram);

  cuda::EnergyCall call{};
  call.d = weight.size(1);
  call.d_out = weight.size(0);
  call.width = width;
  call.weight = data(weight64);
  call.weight_stride = weight64.stride(0);
  call.gram = data(gram64);
  call.gram_stride = gram64.stride(0);
  call.energy = data(energy);
  run(current, weight, call, &cuda::unit_energy);
  return energy;
}

void fisher_update_cuda(Tensor fisher, Tensor x, Tensor grad, int64_t width) {
  constexpr const char* kOp = "fisher_update_: ";
  check_fisher_update(fisher, x, grad, width);
  check_device(kOp, "fisher", fisher, x, "x");
  check_device(kOp, "grad", grad, x, "x");
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
