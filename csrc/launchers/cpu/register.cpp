// The operators on CPU tensors.
#include <torch/csrc/stable/library.h>

#include "../launch.h"

STABLE_TORCH_LIBRARY_IMPL(liar_ext, CPU, m) {
  m.impl("gram_update_", TORCH_BOX(&liar::gram_update_cpu));
  m.impl("reconstruct", TORCH_BOX(&liar::reconstruct_cpu));
  m.impl("obs_curve", TORCH_BOX(&liar::obs_curve_cpu));
}
