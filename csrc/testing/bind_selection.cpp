#include "../cuda/kernels/curve_job.cuh"
#include "bindings.h"

namespace liar::testing {

using Doubles = py::array_t<double>;

py::tuple run_curve(const Doubles& weight, const Doubles& gram, int width, double damp,
                    int at_least, int groups, int processors, int most_batches) {
  Curve c;
  c.most_batches = most_batches;
  c.d = weight.shape(1);
  c.d_out = weight.shape(0);
  c.width = width;
  c.groups = groups;
  c.steps = c.d / width - at_least;
  c.weight = weight.data();
  c.weight_stride = row_stride(weight);
  c.gram = gram.data();
  c.gram_stride = row_stride(gram);
  c.damp = damp;
  py::array_t<std::int64_t> order(c.steps);
  Doubles error(c.steps + 1), info(2);
  c.order = order.mutable_data();
  c.error = error.mutable_data();
  c.info = info.mutable_data();
  execute("obs_curve", processors,
          [&](void* workspace, Stream& stream) { return obs_curve(c, workspace, stream); });
  return py::make_tuple(order, error, info);
}

void bind_selection(py::module_& m) {
  m.def("obs_curve", &run_curve, py::arg("weight"), py::arg("gram"), py::arg("width"),
        py::arg("damp"), py::arg("at_least") = 0, py::arg("groups") = 1, py::arg("processors") = 2,
        py::arg("most_batches") = Curve().most_batches);
}

}  // namespace liar::testing
