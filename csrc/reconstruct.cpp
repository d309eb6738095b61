// The launcher of reconstruct: checks, float64 copies of what is not float64 yet, raw pointers.
#include "cpu/reconstruct.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "check_ops.h"
#include "launch.h"
#include "torch_pool.h"

namespace liar {
namespace {

constexpr const char* kOp = "reconstruct: ";

/// `tensor` itself if it is float64 with contiguous columns, else a float64 copy.
Tensor as_float64(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Double && columns_contiguous(tensor)) return tensor;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes(), ScalarType::Double);
  return torch::stable::copy_(copy, tensor);
}

Float64View view(const Tensor& tensor) {
  return {static_cast<const double*>(tensor.const_data_ptr()), tensor.stride(0)};
}

void check_kept(const Tensor& kept, int64_t d) {
  const auto* index = static_cast<const int64_t*>(kept.const_data_ptr());
  for (int64_t k = 0; k < kept.size(0); ++k) {
    check(index[k] >= 0 && index[k] < d, kOp, "kept must index ", d, " features, got ", index[k],
          " at position ", k);
    check(k == 0 || index[k - 1] < index[k], kOp, "kept must be strictly ascending, got ",
          k > 0 ? index[k - 1] : 0, " before ", index[k], "; sort it and drop duplicates");
  }
}

void check_damps(const Tensor& damps) {
  const auto* value = static_cast<const double*>(damps.const_data_ptr());
  for (int64_t l = 0; l < damps.size(0); ++l) {
    check(value[l] >= 0, kOp, "damps must be at least 0, got ", value[l], " at position ", l,
          "; use infinity for plain dropping");
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> reconstruct_cpu(
    Tensor weight, Tensor gram, Tensor kept, Tensor damps, std::optional<Tensor> holdout,
    std::optional<Tensor> cross, std::optional<Tensor> holdout_cross, bool errors_only) {
  check_reconstruct(weight, gram, kept, damps, holdout, cross, holdout_cross);
  const int64_t d_out = weight.size(0), d = weight.size(1);
  check_kept(kept, d);
  check_damps(damps);

  const int64_t n = kept.size(0), ladder = damps.size(0);
  const int64_t weight_shape[] = {errors_only ? 0 : ladder, d_out, n}, ladder_shape[] = {ladder},
                info_shape[] = {ladder, 2}, none[] = {0};
  const auto empty = [&](torch::headeronly::IntHeaderOnlyArrayRef shape) {
    return torch::stable::new_empty(weight, shape, ScalarType::Double);
  };
  Tensor weight_out = empty({weight_shape, 3}), error = empty({ladder_shape, 1}),
         holdout_error = empty({holdout.has_value() ? ladder_shape : none, 1}),
         info = empty({info_shape, 2});

  const Tensor weight64 = as_float64(weight), gram64 = as_float64(gram);
  Reconstruct args{};
  args.d_out = d_out;
  args.d = d;
  args.n = n;
  args.ladder = ladder;
  args.weight = view(weight64);
  args.gram = view(gram64);
  args.kept = static_cast<const int64_t*>(kept.const_data_ptr());
  args.damps = static_cast<const double*>(damps.const_data_ptr());
  std::optional<Tensor> holdout64, cross64, holdout_cross64;
  Float64View holdout_view, cross_view, holdout_cross_view;
  if (holdout.has_value()) {
    holdout64 = as_float64(*holdout);
    holdout_view = view(*holdout64);
    args.holdout = &holdout_view;
  }
  if (cross.has_value()) {
    cross64 = as_float64(*cross);
    cross_view = view(*cross64);
    args.cross = &cross_view;
  }
  if (holdout_cross.has_value()) {
    holdout_cross64 = as_float64(*holdout_cross);
    holdout_cross_view = view(*holdout_cross64);
    args.holdout_cross = &holdout_cross_view;
  }
  args.weight_out = errors_only ? nullptr : static_cast<double*>(weight_out.mutable_data_ptr());
  args.error_out = static_cast<double*>(error.mutable_data_ptr());
  args.holdout_out = static_cast<double*>(holdout_error.mutable_data_ptr());
  args.info_out = static_cast<double*>(info.mutable_data_ptr());
  reconstruct(args, *kernels().f64, torch_pool());
  return {weight_out, error, holdout_error, info};
}

}  // namespace liar
