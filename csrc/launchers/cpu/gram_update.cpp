// The launcher of gram_update_: checks, then raw pointers.
#include <optional>

#include "../../cpu/gram.h"
#include "../check_ops.h"
#include "../launch.h"
#include "on_cpu.h"
#include "torch_pool.h"

namespace liar {
namespace {

constexpr const char* kOp = "gram_update_: ";

MatrixView view_rows(const Tensor& x, const char* name) {
  MatrixView view{};
  switch (x.scalar_type()) {
    case ScalarType::Half:
      view.dtype = DType::kFloat16;
      break;
    case ScalarType::BFloat16:
      view.dtype = DType::kBFloat16;
      break;
    case ScalarType::Float:
      view.dtype = DType::kFloat32;
      break;
    case ScalarType::Double:
      view.dtype = DType::kFloat64;
      break;
    default:
      check(false, kOp, name, " must be float16, bfloat16, float32 or float64; convert it first");
  }
  view.data = x.const_data_ptr();
  view.rows = x.size(0);
  view.cols = x.size(1);
  view.row_stride = x.stride(0);
  view.col_stride = x.stride(1);
  return view;
}

WeightType weight_type(const std::optional<Tensor>& weight) {
  if (!weight.has_value()) return WeightType::kNone;
  switch (weight->scalar_type()) {
    case ScalarType::Bool:
      return WeightType::kBool;
    case ScalarType::Float:
      return WeightType::kFloat32;
    case ScalarType::Double:
      return WeightType::kFloat64;
    default:
      check(false, kOp, "weight must be bool, float32 or float64; convert it first");
      return WeightType::kNone;
  }
}

}  // namespace

void gram_update_cpu(Tensor gram, Tensor total, Tensor count, Tensor x, std::optional<Tensor> y,
                     std::optional<Tensor> weight) {
  check_gram_update(gram, total, count, x, y, weight);
  check_cpu(kOp, "x", x, "x");
  check_cpu(kOp, "gram", gram, "x");
  check_cpu(kOp, "total", total, "x");
  check_cpu(kOp, "count", count, "x");
  check_cpu(kOp, "y", y, "x");
  check_cpu(kOp, "weight", weight, "x");
  check_and_mark_sums(gram, total, count, x, y, weight);
  GramUpdate update{};
  update.gram = gram.mutable_data_ptr();
  update.gram_row = gram.stride(0);
  update.total = total.mutable_data_ptr();
  update.wide = gram.scalar_type() == ScalarType::Double;
  update.count = static_cast<double*>(count.mutable_data_ptr());
  update.x = view_rows(x, "x");
  MatrixView right{};
  if (y.has_value()) {
    right = view_rows(*y, "y");
    update.y = &right;
  }
  update.weight_type = weight_type(weight);
  if (weight.has_value()) {
    update.weight = weight->const_data_ptr();
    update.weight_stride = weight->stride(0);
  }
  update.limit = largest_entry(gram, x);
  gram_update(update, kernels(), torch_pool());
}

}  // namespace liar
