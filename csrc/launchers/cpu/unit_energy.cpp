// The launcher of unit_energy: checks, then raw pointers.
#include "../../cpu/scores.h"
#include "../check_selection.h"
#include "../launch.h"
#include "../widen.h"
#include "on_cpu.h"
#include "torch_pool.h"

namespace liar {

Tensor unit_energy_cpu(Tensor weight, Tensor gram, int64_t width) {
  constexpr const char* kOp = "unit_energy: ";
  check_unit_energy(weight, gram, width);
  check_cpu(kOp, "weight", weight, "weight");
  check_cpu(kOp, "gram", gram, "weight");
  const Tensor weight64 = as_float64(weight), gram64 = as_float64(gram);
  const int64_t d_out = weight.size(0), d = weight.size(1), shape[] = {d / width};
  Tensor energy = torch::stable::new_empty(weight, {shape, 1}, ScalarType::Double);
  unit_energy({d_out, d, width, static_cast<const double*>(weight64.const_data_ptr()),
               weight64.stride(0), static_cast<const double*>(gram64.const_data_ptr()),
               gram64.stride(0), static_cast<double*>(energy.mutable_data_ptr())},
              *kernels().f64, torch_pool());
  return energy;
}

}  // namespace liar
