#include "../cuda/kernels/selection.cuh"
#include "bindings.h"

namespace liar::testing {

using Doubles = py::array_t<double>;

void bind_selection(py::module_& m) {
  m.def(
      "obs_curve",
      [](const Doubles& weight, const Doubles& gram, double damp, int at_least, int processors) {
        Curve c;
        c.d = weight.shape(1);
        c.d_out = weight.shape(0);
        c.steps = std::max<std::int64_t>(0, c.d - at_least);
        c.weight = weight.data();
        c.weight_stride = row_stride(weight);
        c.gram = gram.data();
        c.gram_stride = row_stride(gram);
        c.damp = damp;
        py::array_t<std::int64_t> order(c.steps);
        Doubles error(c.steps), info(2);
        c.order = order.mutable_data();
        c.error = error.mutable_data();
        c.info = info.mutable_data();
        Stream stream = host_stream(processors);
        Scratch scratch(obs_curve(c, nullptr, stream));
        obs_curve(c, scratch.data(), stream);
        return py::make_tuple(order, error, info);
      },
      py::arg("weight"), py::arg("gram"), py::arg("damp"), py::arg("at_least") = 0,
      py::arg("processors") = 2);
  m.def("unit_energy", [](const Doubles& weight, const Doubles& gram, std::int64_t width) {
    Doubles energy(weight.shape(1) / width);
    Stream stream = host_stream(1);
    unit_energy({weight.data(), row_stride(weight), weight.shape(0), gram.data(), row_stride(gram),
                 width, energy.mutable_data()},
                weight.shape(1) / width, stream);
    return energy;
  });
  m.def("fisher_update_",
        [](Doubles fisher, const Doubles& x, const Doubles& grad, std::int64_t width) {
          Stream stream = host_stream(1);
          fisher_update<double>({x.data(), grad.data(), row_stride(x), row_stride(grad), x.shape(0),
                                 width, fisher.mutable_data()},
                                x.shape(1) / width, stream);
        });
}

}  // namespace liar::testing
