// The operators on CUDA tensors, compiled only where the kernels are. reconstruct and obs_curve are
// registered by liar_ext/ops/dispatch.py, and call these.
#include <torch/csrc/stable/library.h>

#include "../launch.h"

STABLE_TORCH_LIBRARY_FRAGMENT(liar_ext, m) {
  m.def("_solve_small(Tensor block, Tensor side, Tensor shifts) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_eliminate_(Tensor h, Tensor v, Tensor unit, Tensor(a!) lost, Tensor(b!) order, "
      "Tensor(c!) error, Tensor(d!) left, Tensor(e!) right, Tensor(f!) gone, "
      "Tensor(g!) h_diagonal, Tensor(h!) v_diagonal, int first, int per_group) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(liar_ext, CUDA, m) {
  m.impl("gram_update_", TORCH_BOX(&liar::gram_update_cuda));
  m.impl("_solve_small", TORCH_BOX(&liar::solve_small_cuda));
  m.impl("_eliminate_", TORCH_BOX(&liar::eliminate_cuda));
}
