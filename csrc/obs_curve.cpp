// The launcher of obs_curve: checks, float64 copies to work in, raw pointers.
#include "cpu/obs_curve.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "check.h"
#include "launch.h"
#include "torch_pool.h"

namespace liar {
namespace {

constexpr const char* kOp = "obs_curve: ";

bool is_float64_or_32(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double;
}

Tensor copy_float64(const Tensor& tensor) {
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes(), ScalarType::Double);
  return torch::stable::copy_(copy, tensor);
}

double* data(Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> obs_curve_cpu(Tensor weight, Tensor gram, int64_t width,
                                                 double damp, int64_t at_least, int64_t groups) {
  check(weight.dim() == 2, kOp, "weight must be (d_out, d), got ", shape_of(weight));
  const int64_t d = weight.size(1);
  check(gram.dim() == 2 && gram.size(0) == d && gram.size(1) == d, kOp, "gram must be (", d, ", ",
        d, "), got ", shape_of(gram), "; give the moments of the layer that weight is of");
  check(is_float64_or_32(gram), kOp, "gram must be float32 or float64; convert it first");
  check(width >= 1 && d > 0 && d % width == 0, kOp, "width must divide the ", d, " features, got ",
        width, "; it is the number of features per unit");
  const int64_t units = d / width;
  check(groups >= 1 && units % groups == 0, kOp, "groups must divide the ", units, " units, got ",
        groups);
  check(at_least >= 0 && at_least <= units && at_least % groups == 0, kOp,
        "at_least must be a multiple of groups from 0 to ", units, ", got ", at_least);
  check(damp >= 0 && std::isfinite(damp), kOp, "damp must be finite and at least 0, got ", damp,
        "; 1e-3 is a good start");

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
