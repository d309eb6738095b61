#include "../cuda/kernels/gram.cuh"
#include "bindings.h"

namespace liar::testing {

template <class T>
void run(const py::array& gram, const py::array& total, py::array_t<double> count,
         const py::array& x, const py::object& y, const py::object& weight, int processors,
         double limit) {
  GramUpdate<T> g;
  g.x = {pointer<T>(x), row_stride(x), x.shape(1), 0};
  g.tokens = x.shape(0);
  if (!y.is_none()) {
    const auto right = y.cast<py::array>();
    g.y = {pointer<T>(right), row_stride(right), right.shape(1), 0};
  }
  if (!weight.is_none()) {
    const auto w = weight.cast<py::array>();
    g.weight = w.data();
    g.weight_type = w.dtype().kind() == 'b' ? WeightType::kBool
                    : w.itemsize() == 4     ? WeightType::kFloat
                                            : WeightType::kDouble;
  }
  g.gram = const_cast<void*>(gram.data());
  g.gram_stride = row_stride(gram);
  g.gram_f64 = gram.itemsize() == 8;
  g.total = const_cast<void*>(total.data());
  g.count = count.mutable_data();
  g.limit = limit;
  execute("gram_update_", processors,
          [&](void* workspace, Stream& stream) { return gram_update(g, workspace, stream); });
}

void bind_gram(py::module_& m) {
  m.def(
      "gram_update_",
      [](py::array gram, py::array total, py::array_t<double> count, py::array x, py::object y,
         py::object weight, const std::string& dtype, int processors, double limit) {
        if (dtype == "bf16")
          run<bf16>(gram, total, count, x, y, weight, processors, limit);
        else if (dtype == "f16")
          run<f16>(gram, total, count, x, y, weight, processors, limit);
        else if (dtype == "f32")
          run<float>(gram, total, count, x, y, weight, processors, limit);
        else if (dtype == "f64")
          run<double>(gram, total, count, x, y, weight, processors, limit);
        else
          throw py::value_error("dtype must be bf16, f16, f32 or f64");
      },
      py::arg("gram"), py::arg("total"), py::arg("count"), py::arg("x"), py::arg("y") = py::none(),
      py::arg("weight") = py::none(), py::arg("dtype") = "f32", py::arg("processors") = 2,
      py::arg("limit") = GramUpdate<float>().limit);
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
