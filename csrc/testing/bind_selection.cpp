#include "../cuda/kernels/curve_job.cuh"
#include "../cuda/kernels/scores.cuh"
#include "bindings.h"

namespace liar::testing {

using Doubles = py::array_t<double>;

py::tuple run_curve(const Doubles& weight, const Doubles& gram, int width, double damp,
                    int at_least, int groups, int processors) {
  Curve c;
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

template <class T>
void run_fisher(Doubles& fisher, const py::array& x, const py::array& grad, std::int64_t width) {
  Fisher<T> q;
  q.x = pointer<T>(x);
  q.grad = pointer<T>(grad);
  q.sequences = x.shape(0);
  q.tokens = x.shape(1);
  q.d = x.shape(2);
  q.width = width;
  q.x_sequence = x.strides(0) / x.itemsize();
  q.x_stride = x.strides(1) / x.itemsize();
  q.grad_sequence = grad.strides(0) / grad.itemsize();
  q.grad_stride = grad.strides(1) / grad.itemsize();
  q.fisher = fisher.mutable_data();
  execute("fisher_update_", 1,
          [&](void* workspace, Stream& stream) { return fisher_update(q, workspace, stream); });
}

void bind_selection(py::module_& m) {
  m.def("obs_curve", &run_curve, py::arg("weight"), py::arg("gram"), py::arg("width"),
        py::arg("damp"), py::arg("at_least") = 0, py::arg("groups") = 1, py::arg("processors") = 2);
  m.def(
      "unit_energy",
      [](const Doubles& weight, const Doubles& gram, std::int64_t width, int most_batches) {
        Doubles energy(weight.shape(1) / width);
        Energy q;
        q.most_batches = most_batches;
        q.d = weight.shape(1);
        q.d_out = weight.shape(0);
        q.width = width;
        q.weight = weight.data();
        q.weight_stride = row_stride(weight);
        q.gram = gram.data();
        q.gram_stride = row_stride(gram);
        q.energy = energy.mutable_data();
        execute("unit_energy", 2,
                [&](void* workspace, Stream& stream) { return unit_energy(q, workspace, stream); });
        return energy;
      },
      py::arg("weight"), py::arg("gram"), py::arg("width"),
      py::arg("most_batches") = Energy().most_batches);
  m.def("fisher_update_", [](Doubles fisher, const py::array& x, const py::array& grad,
                             std::int64_t width, const std::string& dtype) {
    if (dtype == "bf16")
      run_fisher<bf16>(fisher, x, grad, width);
    else if (dtype == "f16")
      run_fisher<f16>(fisher, x, grad, width);
    else if (dtype == "f32")
      run_fisher<float>(fisher, x, grad, width);
    else
      run_fisher<double>(fisher, x, grad, width);
  });
}

}  // namespace liar::testing
