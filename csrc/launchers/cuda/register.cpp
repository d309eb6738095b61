// The operators on CUDA tensors; compiled only where the kernels are.
#include <torch/csrc/stable/library.h>

#include "../launch.h"

STABLE_TORCH_LIBRARY_IMPL(liar_ext, CUDA, m) {
  m.impl("gram_update_", TORCH_BOX(&liar::gram_update_cuda));
  m.impl("reconstruct", TORCH_BOX(&liar::reconstruct_cuda));
  m.impl("obs_curve", TORCH_BOX(&liar::obs_curve_cuda));
}
