#include "bindings.h"

namespace liar::testing {

void bind_settings(py::module_& m) {
  m.def(
      "configure",
      [](unsigned order, bool late_copies, std::set<std::string> removed, bool swapped_fragments,
         bool shifted_shuffles) {
        settings() = {order, late_copies, std::move(removed), swapped_fragments, shifted_shuffles,
                      {}};
      },
      py::arg("order") = 0, py::arg("late_copies") = true,
      py::arg("removed") = std::set<std::string>{}, py::arg("swapped_fragments") = false,
      py::arg("shifted_shuffles") = false,
      "How the next launches run, and which faults they carry.");
  m.def(
      "synchronization_sites", [] { return settings().seen; },
      "Every barrier, warp barrier and copy wait that ran since configure().");
}

}  // namespace liar::testing

PYBIND11_MODULE(liar_host_kernels, m) {
  m.doc() = "The CUDA kernels of liar_ext, run on the host.";
  liar::testing::bind_settings(m);
  liar::testing::bind_gram(m);
  liar::testing::bind_solves(m);
  liar::testing::bind_faults(m);
}
