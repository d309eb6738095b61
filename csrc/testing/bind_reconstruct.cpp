#include "../cuda/kernels/reconstruct_job.cuh"
#include "bindings.h"

namespace liar::testing {

// (rows, columns) or (batches, rows, columns).
Matrix matrix(const py::array_t<double>& a) {
  const auto rows = a.ndim() - 2;
  const auto step = [&](py::ssize_t axis) { return std::int64_t(a.strides(axis) / a.itemsize()); };
  return {a.data(), step(rows), rows ? step(0) : 0};
}

using Doubles = py::array_t<double>;
using Maybe = std::optional<Doubles>;

py::tuple run_reconstruct(const Doubles& weight, const Doubles& gram,
                          const py::array_t<std::int64_t>& kept, const Doubles& damps,
                          const Maybe& holdout, const Maybe& cross, const Maybe& holdout_cross,
                          bool errors_only, int processors, std::int64_t group_bytes) {
  Reconstruct r;
  const bool batched = weight.ndim() == 3;
  r.batches = batched ? weight.shape(0) : 1;
  r.d_out = weight.shape(batched);
  r.d = weight.shape(1 + batched);
  r.n = kept.shape(batched);
  r.ladder = int(damps.shape(0));
  r.weight = matrix(weight);
  r.gram = matrix(gram);
  if (holdout) r.holdout = matrix(*holdout);
  if (cross) r.cross = matrix(*cross);
  if (holdout_cross) r.holdout_cross = matrix(*holdout_cross);
  r.kept = kept.data();
  r.damps = damps.data();
  r.group_bytes = group_bytes;
  using Shape = std::vector<py::ssize_t>;
  const auto array = [&](Shape shape) {
    if (batched) shape.insert(shape.begin(), r.batches);
    return Doubles(shape);
  };
  Doubles out = array({errors_only ? 0 : r.ladder, r.d_out, r.n}), error = array({r.ladder}),
          holdout_error = array({holdout ? r.ladder : 0}), info = array({r.ladder, 2});
  if (!errors_only) r.weight_out = out.mutable_data();
  r.error = error.mutable_data();
  r.holdout_error = holdout_error.mutable_data();
  r.info = info.mutable_data();
  execute("reconstruct", processors,
          [&](void* workspace, Stream& stream) { return reconstruct(r, workspace, stream); });
  return py::make_tuple(out, error, holdout_error, info);
}

void bind_reconstruct(py::module_& m) {
  m.def("reconstruct", &run_reconstruct, py::arg("weight"), py::arg("gram"), py::arg("kept"),
        py::arg("damps"), py::arg("holdout") = py::none(), py::arg("cross") = py::none(),
        py::arg("holdout_cross") = py::none(), py::arg("errors_only") = false,
        py::arg("processors") = 2, py::arg("group_bytes") = Reconstruct().group_bytes);
}

}  // namespace liar::testing
