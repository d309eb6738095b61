// The CUDA launcher of reconstruct. Values of `kept` and `damps` stay on the device: indices that
// are not ascending within d come back as code -1, negative damps as whatever the factor says.
#include <torch/csrc/stable/ops.h>

#include "../check_ops.h"
#include "current.h"
#include "launchers.h"

namespace liar {
namespace {

constexpr const char* kOp = "reconstruct: ";

Tensor as_float64(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Double && columns_contiguous(tensor)) return tensor;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes(), ScalarType::Double);
  return torch::stable::copy_(copy, tensor);
}

// Holds the float64 copy, if one was made, until the kernels are launched.
struct Float64 {
  std::optional<Tensor> tensor;

  explicit Float64(const std::optional<Tensor>& source) {
    if (source.has_value()) tensor = as_float64(*source);
  }
  const double* data() const {
    return tensor ? static_cast<const double*>(tensor->const_data_ptr()) : nullptr;
  }
  int64_t stride() const { return tensor ? tensor->stride(0) : 0; }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> reconstruct_cuda(
    Tensor weight, Tensor gram, Tensor kept, Tensor damps, std::optional<Tensor> holdout,
    std::optional<Tensor> cross, std::optional<Tensor> holdout_cross, bool errors_only) {
  const ReconstructSizes sizes =
      check_reconstruct(weight, gram, kept, damps, holdout, cross, holdout_cross);
  check(!sizes.batched, kOp, "weight must be (d_out, d) on CUDA, got ", shape_of(weight),
        "; call it once per site");
  check_device(kOp, "gram", gram, weight);
  check_device(kOp, "kept", kept, weight);
  check_device(kOp, "damps", damps, weight);
  check_device(kOp, "holdout", holdout, weight);
  check_device(kOp, "cross", cross, weight);
  check_device(kOp, "holdout_cross", holdout_cross, weight);
  const Current current(kOp, weight);
  const int64_t d_out = weight.size(0), n = kept.size(0), ladder = damps.size(0);
  check(n <= weight.size(1), kOp, "kept must hold at most ", weight.size(1), " features, got ", n);

  const int64_t weight_shape[] = {errors_only ? 0 : ladder, d_out, n}, ladder_shape[] = {ladder},
                info_shape[] = {ladder, 2}, none[] = {0};
  const auto empty = [&](torch::headeronly::IntHeaderOnlyArrayRef shape) {
    return torch::stable::new_empty(weight, shape, ScalarType::Double);
  };
  Tensor weight_out = empty({weight_shape, 3}), error = empty({ladder_shape, 1}),
         holdout_error = empty({holdout.has_value() ? ladder_shape : none, 1}),
         info = empty({info_shape, 2});
  const Float64 w(weight), g(gram), h(holdout), c(cross), hc(holdout_cross);

  cuda::ReconstructCall call{};
  call.d_out = d_out;
  call.d = weight.size(1);
  call.n = n;
  call.ladder = static_cast<int>(ladder);
  call.weight = w.data();
  call.weight_stride = w.stride();
  call.gram = g.data();
  call.gram_stride = g.stride();
  call.holdout = h.data();
  call.holdout_stride = h.stride();
  call.cross = c.data();
  call.cross_stride = c.stride();
  call.holdout_cross = hc.data();
  call.holdout_cross_stride = hc.stride();
  call.kept = static_cast<const int64_t*>(kept.const_data_ptr());
  call.damps = static_cast<const double*>(damps.const_data_ptr());
  if (!errors_only) call.weight_out = static_cast<double*>(weight_out.mutable_data_ptr());
  call.error = static_cast<double*>(error.mutable_data_ptr());
  call.holdout_error = static_cast<double*>(holdout_error.mutable_data_ptr());
  call.info = static_cast<double*>(info.mutable_data_ptr());
  if (ladder == 0) return {weight_out, error, holdout_error, info};
  const int64_t bytes[] = {cuda::reconstruct(call, nullptr, current.place())};
  Tensor workspace = torch::stable::new_empty(weight, {bytes, 1}, ScalarType::Byte);
  cuda::reconstruct(call, workspace.mutable_data_ptr(), current.place());
  return {weight_out, error, holdout_error, info};
}

}  // namespace liar
