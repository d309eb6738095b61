// Every schema of the extension, and the build_info op. No implementation: launchers/cpu and
// launchers/cuda register theirs.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/panel_kernel.h"
#ifdef LIAR_WITH_CUDA
#include "cuda/calls.h"
#endif

namespace liar {

/// One "name=value" per line; liar_ext.ops.build_info() makes a dict of it.
std::string build_info() {
  const auto version = [](unsigned long long packed) {
    return std::to_string(packed >> 56) + "." + std::to_string(packed >> 48 & 0xff);
  };
  std::string text = std::string("compiler=") + LIAR_COMPILER + "\n";
  text += "torch_target=" + version(TORCH_TARGET_VERSION) + "\n";
  text += "torch_built=" + version(TORCH_ABI_VERSION) + "\n";
  text += std::string("cpu_kernel=") + kernels().name + "\n";
  text += "cpu_kernels=" + kernel_names() + "\n";
#ifdef LIAR_WITH_CUDA
  const auto cuda_version = [](int packed) {
    return packed == 0 ? "none"
                       : std::to_string(packed / 1000) + "." + std::to_string(packed % 1000 / 10);
  };
  text += "cuda=compiled\ncuda_archs=" LIAR_CUDA_ARCHS "\n";
  text += "cuda_runtime=" + cuda_version(cuda::runtime_version()) + "\n";
  text += "cuda_driver=" + cuda_version(cuda::driver_version()) + "\n";
  text += "cuda_devices=" + std::to_string(cuda::device_count()) + "\n";
#else
  text += "cuda=not compiled\n";
#endif
  return text;
}

}  // namespace liar

STABLE_TORCH_LIBRARY(liar_ext, m) {
  m.def("build_info() -> str");
  m.def(
      "gram_update_(Tensor(a!) gram, Tensor(b!) total, Tensor(c!) count, Tensor x, "
      "Tensor? y=None, Tensor? weight=None) -> ()");
  m.def(
      "reconstruct(Tensor weight, Tensor gram, Tensor kept, Tensor damps, Tensor? holdout=None, "
      "Tensor? cross=None, Tensor? holdout_cross=None, bool errors_only=False) -> "
      "(Tensor weight, Tensor error, Tensor holdout_error, Tensor info)");
  m.def(
      "obs_curve(Tensor weight, Tensor gram, int width, float damp, int at_least, int groups=1) -> "
      "(Tensor order, Tensor error, Tensor info)");
  // Parts of the last two, on CUDA alone.
  m.def("_solve_small(Tensor block, Tensor side, Tensor shifts) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_eliminate_(Tensor h, Tensor v, Tensor unit, Tensor(a!) lost, Tensor(b!) order, "
      "Tensor(c!) error, Tensor(d!) left, Tensor(e!) right, Tensor(f!) gone, "
      "Tensor(g!) h_diagonal, Tensor(h!) v_diagonal, int first, int per_group) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(liar_ext, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&liar::build_info));
}
