#include "../cuda/kernels/eliminate.cuh"
#include "../cuda/kernels/small.cuh"
#include "bindings.h"

namespace liar::testing {

using Doubles = py::array_t<double>;
using Integers = py::array_t<std::int64_t>;

py::tuple run_small(const Doubles& block, const Doubles& side, const Doubles& shifts) {
  const auto n = block.shape(0), columns = side.shape(1), ladder = shifts.shape(0);
  Doubles x({ladder, n, columns}), code(ladder), diagonal({ladder, n});
  Stream stream;
  solve_small({n, columns, static_cast<int>(ladder), block.data(), side.data(), shifts.data(),
               x.mutable_data(), code.mutable_data(), diagonal.mutable_data()},
              stream);
  require("solve_small", stream.error);
  return py::make_tuple(x, code, diagonal);
}

py::tuple run_panel(const Doubles& h, const Doubles& v, const Integers& unit, Integers lost,
                    Integers order, Doubles error, std::int64_t first, std::int64_t count,
                    std::int64_t per_group) {
  const auto n = h.shape(0);
  Doubles left({count, std::int64_t(n)}), right({count, std::int64_t(n)}), h_diagonal(n),
      v_diagonal(n);
  py::array_t<bool> gone(n);
  for (py::ssize_t i = 0; i < n; ++i) {
    h_diagonal.mutable_at(i) = h.at(i, i);
    v_diagonal.mutable_at(i) = v.at(i, i);
    gone.mutable_at(i) = false;
  }
  PanelCall call{n, first, count, lost.shape(0), per_group};
  call.h = h.data();
  call.v = v.data();
  call.unit = unit.data();
  call.lost = lost.mutable_data();
  call.order = order.mutable_data();
  call.error = error.mutable_data();
  call.left = left.mutable_data();
  call.right = right.mutable_data();
  call.gone = gone.mutable_data();
  call.h_diagonal = h_diagonal.mutable_data();
  call.v_diagonal = v_diagonal.mutable_data();
  execute("eliminate", 2,
          [&](void* workspace, Stream& stream) { return eliminate(call, workspace, stream); });
  return py::make_tuple(left, right, gone);
}

void bind_solves(py::module_& m) {
  m.def("solve_small", &run_small);
  m.def("eliminate", &run_panel, "`lost`, `order` and `error` are written.");
}

}  // namespace liar::testing
