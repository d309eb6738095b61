#include "../cuda/kernels/gram.cuh"
#include "bindings.h"

namespace liar::testing {

GramCall call_of(py::array gram, py::array total, py::array_t<double> count, const py::array& x,
                 const py::object& y, const py::object& weight, double limit) {
  GramCall g{};
  g.x = x.data();
  g.x_stride = row_stride(x);
  g.tokens = x.shape(0);
  g.d = x.shape(1);
  if (!y.is_none()) {
    const auto right = y.cast<py::array>();
    g.y = right.data();
    g.y_stride = row_stride(right);
    g.d_right = right.shape(1);
  }
  if (!weight.is_none()) {
    const auto w = weight.cast<py::array>();
    g.weight = w.data();
    g.weights = w.dtype().kind() == 'b' ? Weights::kBool
                : w.itemsize() == 4     ? Weights::kFloat32
                                        : Weights::kFloat64;
  }
  g.gram = gram.mutable_data();
  g.gram_stride = row_stride(gram);
  g.wide = gram.itemsize() == 8;
  g.total = total.mutable_data();
  g.count = count.mutable_data();
  g.limit = limit;
  return g;
}

template <class T>
void run(const GramCall& call, int processors) {
  execute("gram_update_", processors,
          [&](void* workspace, Stream& stream) { return gram_update<T>(call, workspace, stream); });
}

void bind_gram(py::module_& m) {
  m.def(
      "gram_update_",
      [](py::array gram, py::array total, py::array_t<double> count, py::array x, py::object y,
         py::object weight, const std::string& dtype, int processors, double limit) {
        const GramCall call = call_of(gram, total, count, x, y, weight, limit);
        if (dtype == "bf16")
          run<bf16>(call, processors);
        else if (dtype == "f16")
          run<f16>(call, processors);
        else if (dtype == "f32")
          run<float>(call, processors);
        else if (dtype == "f64")
          run<double>(call, processors);
        else
          throw py::value_error("dtype must be bf16, f16, f32 or f64");
      },
      py::arg("gram"), py::arg("total"), py::arg("count"), py::arg("x"), py::arg("y") = py::none(),
      py::arg("weight") = py::none(), py::arg("dtype") = "f32", py::arg("processors") = 2,
      py::arg("limit") = 0x1p48);
  m.def("tile_order", [](std::int64_t rows, std::int64_t columns) {
    std::vector<std::pair<std::int64_t, std::int64_t>> order;
    const bool symmetric = columns < 0;
    for (std::int64_t i = 0; i < (symmetric ? triangle(rows) : rows * columns); ++i) {
      const Tile t = symmetric ? triangular_tile(i, rows) : rectangular_tile(i, rows, columns);
      order.emplace_back(t.row, t.column);
    }
    return order;
  });
}

}  // namespace liar::testing
