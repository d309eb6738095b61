// The CUDA launcher of reconstruct. Values of `kept` and `damps` stay on the device: indices that
// are not ascending within d come back as code -1, negative damps as whatever the factor says.
#include <vector>

#include "../check_ops.h"
#include "../launch.h"
#include "../widen.h"
#include "current.h"

namespace liar {
namespace {

constexpr const char* kOp = "reconstruct: ";

// Holds the float64 copy, if one was made, until the kernels are launched.
struct Float64 {
  std::optional<Tensor> tensor;

  explicit Float64(const std::optional<Tensor>& source) {
    if (source.has_value()) tensor = as_float64(*source);
  }
  cuda::Float64Matrix matrix() const {
    if (!tensor) return {nullptr, 0, 0};
    const bool batched = tensor->dim() == 3;
    return {static_cast<const double*>(tensor->const_data_ptr()), tensor->stride(batched),
            batched ? tensor->stride(0) : 0};
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> reconstruct_cuda(
    Tensor weight, Tensor gram, Tensor kept, Tensor damps, std::optional<Tensor> holdout,
    std::optional<Tensor> cross, std::optional<Tensor> holdout_cross, bool errors_only) {
  const ReconstructSizes sizes =
      check_reconstruct(weight, gram, kept, damps, holdout, cross, holdout_cross);
  check_device(kOp, "gram", gram, weight, "weight");
  check_device(kOp, "kept", kept, weight, "weight");
  check_device(kOp, "damps", damps, weight, "weight");
  check_device(kOp, "holdout", holdout, weight, "weight");
  check_device(kOp, "cross", cross, weight, "weight");
  check_device(kOp, "holdout_cross", holdout_cross, weight, "weight");
  const Current current(kOp, weight);
  constexpr int64_t kSmall = 128;
  check(sizes.n <= kSmall, kOp, "the kernel keeps at most ", kSmall, " features, got ", sizes.n,
        "; call liar_ext.ops.reconstruct, which solves larger systems by torch.linalg");
  check(sizes.n <= sizes.d, kOp, "kept must hold at most ", sizes.d, " features, got ", sizes.n);

  const auto empty = [&](std::vector<int64_t> shape) {
    if (sizes.batched) shape.insert(shape.begin(), sizes.sites);
    return torch::stable::new_empty(weight, {shape.data(), shape.size()}, ScalarType::Double);
  };
  const int64_t ladder = sizes.ladder;
  Tensor weight_out = empty({errors_only ? 0 : ladder, sizes.d_out, sizes.n}),
         error = empty({ladder}), holdout_error = empty({holdout.has_value() ? ladder : 0}),
         info = empty({ladder, 2});
  if (ladder == 0 || sizes.sites == 0) return {weight_out, error, holdout_error, info};
  kept = torch::stable::contiguous(kept);
  const Float64 w(weight), g(gram), h(holdout), c(cross), hc(holdout_cross);

  cuda::ReconstructCall call{};
  call.batches = sizes.sites;
  call.d_out = sizes.d_out;
  call.d = sizes.d;
  call.n = sizes.n;
  call.ladder = static_cast<int>(ladder);
  call.weight = w.matrix();
  call.gram = g.matrix();
  call.holdout = h.matrix();
  call.cross = c.matrix();
  call.holdout_cross = hc.matrix();
  call.kept = static_cast<const int64_t*>(kept.const_data_ptr());
  call.damps = static_cast<const double*>(damps.const_data_ptr());
  if (!errors_only) call.weight_out = data(weight_out);
  call.error = data(error);
  call.holdout_error = data(holdout_error);
  call.info = data(info);
  run(current, weight, call, &cuda::reconstruct);
  return {weight_out, error, holdout_error, info};
}

}  // namespace liar
