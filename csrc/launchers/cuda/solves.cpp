// The CUDA launchers behind reconstruct and obs_curve: what no library does of them. Their other
// half is torch, in liar_ext/ops, which checks what users give.
#include "../launch.h"
#include "current.h"

namespace liar {
namespace {

// Memory of a tensor that lies on the device of `like` without gaps.
template <class T>
T* memory(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
          ScalarType type, std::initializer_list<int64_t> shape) {
  check_device(op, name, tensor, like, "the first argument");
  bool right = tensor.scalar_type() == type && tensor.is_contiguous() &&
               tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (const int64_t size : shape) right = right && tensor.size(axis++) == size;
  check(right, op, name, " has another shape, dtype or layout, got ", shape_of(tensor));
  return static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> solve_small_cuda(Tensor block, Tensor side, Tensor shifts) {
  constexpr const char* kOp = "reconstruct: ";
  check(block.dim() == 2 && block.size(0) <= cuda::kSmall, kOp, "the kernel keeps at most ",
        cuda::kSmall, " features, got ", shape_of(block));
  check(side.dim() == 2 && shifts.dim() == 1, kOp, "a matrix and a ladder are wanted");
  const int64_t n = block.size(0), columns = side.size(1), ladder = shifts.size(0);
  const auto input = [&](const char* name, const Tensor& tensor,
                         std::initializer_list<int64_t> shape) {
    return memory<const double>(kOp, name, tensor, block, ScalarType::Double, shape);
  };
  cuda::SmallCall call{};
  call.n = n;
  call.columns = columns;
  call.ladder = static_cast<int>(ladder);
  call.block = input("block", block, {n, n});
  call.side = input("side", side, {n, columns});
  call.shifts = input("shifts", shifts, {ladder});
  const Current current(kOp, block);
  const auto empty = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(block, {shape.begin(), shape.size()}, ScalarType::Double);
  };
  Tensor x = empty({ladder, n, columns}), code = empty({ladder}), diagonal = empty({ladder, n});
  call.x = data(x);
  call.code = data(code);
  call.diagonal = data(diagonal);
  cuda::solve_small(call, current.place());
  return {x, code, diagonal};
}

void eliminate_cuda(Tensor h, Tensor v, Tensor unit, Tensor lost, Tensor order, Tensor error,
                    Tensor left, Tensor right, Tensor gone, Tensor h_diagonal, Tensor v_diagonal,
                    int64_t first, int64_t per_group) {
  constexpr const char* kOp = "obs_curve: ";
  const int64_t n = unit.numel(), groups = lost.numel(), count = left.size(0);
  check(first >= 0 && first + count <= order.numel() && per_group > 0, kOp, "no such steps");
  const auto doubles = [&](const char* name, const Tensor& tensor,
                           std::initializer_list<int64_t> shape) {
    return memory<double>(kOp, name, tensor, h, ScalarType::Double, shape);
  };
  const auto integers = [&](const char* name, const Tensor& tensor, int64_t size) {
    return memory<int64_t>(kOp, name, tensor, h, ScalarType::Long, {size});
  };
  cuda::PanelCall call{};
  call.n = n;
  call.first = first;
  call.count = count;
  call.groups = groups;
  call.per_group = per_group;
  call.h = doubles("h", h, {n, n});
  call.v = doubles("v", v, {n, n});
  call.unit = integers("unit", unit, n);
  call.lost = integers("lost", lost, groups);
  call.order = integers("order", order, order.numel());
  call.error = doubles("error", error, {order.numel() + 1});
  call.left = doubles("left", left, {count, n});
  call.right = doubles("right", right, {count, n});
  call.gone = memory<bool>(kOp, "gone", gone, h, ScalarType::Bool, {n});
  call.h_diagonal = doubles("h_diagonal", h_diagonal, {n});
  call.v_diagonal = doubles("v_diagonal", v_diagonal, {n});
  run(Current(kOp, h), h, call, &cuda::eliminate);
}

}  // namespace liar
