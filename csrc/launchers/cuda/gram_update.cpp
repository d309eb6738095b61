// The CUDA launcher of gram_update_: checks, then raw pointers on torch's current stream.
#include <torch/csrc/stable/ops.h>

#include "../check_ops.h"
#include "../launch.h"
#include "current.h"

namespace liar {
namespace {

constexpr const char* kOp = "gram_update_: ";

cuda::Weights weights_of(const std::optional<Tensor>& weight) {
  if (!weight.has_value()) return cuda::Weights::kNone;
  switch (weight->scalar_type()) {
    case ScalarType::Bool:
      return cuda::Weights::kBool;
    case ScalarType::Float:
      return cuda::Weights::kFloat32;
    default:
      check(weight->scalar_type() == ScalarType::Double, kOp,
            "weight must be bool, float32 or float64; convert it first");
      return cuda::Weights::kFloat64;
  }
}

}  // namespace

void gram_update_cuda(Tensor gram, Tensor total, Tensor count, Tensor x, std::optional<Tensor> y,
                      std::optional<Tensor> weight) {
  check_gram_update(gram, total, count, x, y, weight);
  check_device(kOp, "gram", gram, x, "x");
  check_device(kOp, "total", total, x, "x");
  check_device(kOp, "count", count, x, "x");
  check_device(kOp, "y", y, x, "x");
  check_device(kOp, "weight", weight, x, "x");
  check_and_mark_sums(gram, total, count, x, y, weight);
  const Current current(kOp, x);
  x = with_columns(x);
  if (y.has_value()) y = with_columns(*y);
  if (weight.has_value()) weight = torch::stable::contiguous(*weight);

  cuda::GramCall call{};
  call.element = element_of(kOp, x);
  call.x = x.const_data_ptr();
  call.tokens = x.size(0);
  call.d = x.size(1);
  call.x_stride = x.stride(0);
  if (y.has_value()) {
    call.y = y->const_data_ptr();
    call.d_right = y->size(1);
    call.y_stride = y->stride(0);
  }
  call.weights = weights_of(weight);
  if (weight.has_value()) call.weight = weight->const_data_ptr();
  call.gram = gram.mutable_data_ptr();
  call.gram_stride = gram.stride(0);
  call.wide = gram.scalar_type() == ScalarType::Double;
  call.total = total.mutable_data_ptr();
  call.count = static_cast<double*>(count.mutable_data_ptr());
  call.limit = largest_entry(gram, x);
  if (call.tokens == 0) return;
  run(current, x, call, &cuda::gram_update);
}

}  // namespace liar
