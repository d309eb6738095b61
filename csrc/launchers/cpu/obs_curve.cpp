// The launcher of obs_curve: checks, float64 copies to work in, raw pointers.
#include "../../cpu/obs_curve.h"

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../check_selection.h"
#include "../launch.h"
#include "on_cpu.h"
#include "torch_pool.h"

namespace liar {
namespace {

Tensor copy_float64(const Tensor& tensor) {
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes(), ScalarType::Double);
  return torch::stable::copy_(copy, tensor);
}

double* data(Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> obs_curve_cpu(Tensor weight, Tensor gram, int64_t width,
                                                 double damp, int64_t at_least, int64_t groups) {
  constexpr const char* kOp = "obs_curve: ";
  check_obs_curve(weight, gram, width, damp, at_least, groups);
  check_cpu(kOp, "weight", weight, "weight");
  check_cpu(kOp, "gram", gram, "weight");
  const int64_t d = weight.size(1), units = d / width;
  Tensor columns = copy_float64(weight), inverse = copy_float64(gram),
         energy = torch::stable::new_empty(inverse, inverse.sizes(), ScalarType::Double);
  const int64_t removed = units - at_least;
  const int64_t order_shape[] = {removed}, error_shape[] = {removed + 1}, info_shape[] = {2};
  Tensor order = torch::stable::new_empty(inverse, {order_shape, 1}, ScalarType::Long),
         error = torch::stable::new_empty(inverse, {error_shape, 1}, ScalarType::Double),
         info = torch::stable::new_empty(inverse, {info_shape, 1}, ScalarType::Double);
  obs_curve(
      {weight.size(0), d, width, groups, at_least, damp, data(columns), data(inverse), data(energy),
       static_cast<int64_t*>(order.mutable_data_ptr()), data(error), data(info)},
      *kernels().f64, torch_pool());
  return {order, error, info};
}

}  // namespace liar
