// The launcher of gram_update_: checks, then raw pointers.
#include <optional>

#include "check.h"
#include "cpu/gram.h"
#include "launch.h"
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

void check_shapes(const Tensor& gram, const Tensor& total, const Tensor& count, const Tensor& x,
                  const std::optional<Tensor>& y, const std::optional<Tensor>& weight) {
  check(total.dim() == 1 && columns_contiguous(total), kOp,
        "total must be (d,) and contiguous, got ", shape_of(total));
  const int64_t d = total.size(0);
  check(x.dim() == 2 && x.size(1) == d, kOp, "x must be (tokens, ", d, "), got ", shape_of(x),
        "; flatten batch and sequence first");
  const int64_t tokens = x.size(0);
  if (y.has_value()) {
    check(y->dim() == 2 && y->size(0) == tokens, kOp, "y must be (", tokens, ", dy), got ",
          shape_of(*y), "; give one row per row of x");
    check(y->scalar_type() == x.scalar_type(), kOp, "y must have the dtype of x; convert it first");
  }
  const int64_t cols = y.has_value() ? y->size(1) : d;
  check(gram.dim() == 2 && gram.size(0) == d && gram.size(1) == cols, kOp, "gram must be (", d,
        ", ", cols, "), got ", shape_of(gram));
  check(columns_contiguous(gram), kOp,
        "gram must have contiguous columns; allocate it with torch.zeros");
  check((gram.scalar_type() == ScalarType::Float || gram.scalar_type() == ScalarType::Double) &&
            gram.scalar_type() == total.scalar_type(),
        kOp, "gram and total must both be float32 or both be float64");
  check(count.dim() == 1 && count.size(0) == 2 && count.scalar_type() == ScalarType::Double &&
            count.is_contiguous(),
        kOp, "count must be (2,) float64 and contiguous, got ", shape_of(count));
  if (weight.has_value()) {
    check(weight->dim() == 1 && weight->size(0) == tokens, kOp, "weight must be (", tokens,
          ",), got ", shape_of(*weight), "; give one weight per row of x");
  }
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
  check_shapes(gram, total, count, x, y, weight);
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
  gram_update(update, kernels(), torch_pool());
}

}  // namespace liar
