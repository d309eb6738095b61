// The operators on CUDA tensors, compiled only where the kernels are. reconstruct and obs_curve are
// registered by liar_ext/ops/dispatch.py, and call these.
#include <torch/csrc/stable/library.h>

#include "../launch.h"

STABLE_TORCH_LIBRARY_IMPL(liar_ext, CUDA, m) {
  m.impl("gram_update_", TORCH_BOX(&liar::gram_update_cuda));
  m.impl("_solve_small", TORCH_BOX(&liar::solve_small_cuda));
  m.impl("_eliminate_", TORCH_BOX(&liar::eliminate_cuda));
}
