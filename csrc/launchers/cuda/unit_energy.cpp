// The CUDA launcher of unit_energy: checks, then raw pointers on torch's current stream.
#include "../check_selection.h"
#include "../launch.h"
#include "../widen.h"
#include "current.h"

namespace liar {

Tensor unit_energy_cuda(Tensor weight, Tensor gram, int64_t width) {
  constexpr const char* kOp = "unit_energy: ";
  check_unit_energy(weight, gram, width);
  check_device(kOp, "gram", gram, weight, "weight");
  const Current current(kOp, weight);
  const int64_t shape[] = {weight.size(1) / width};
  Tensor energy = torch::stable::new_empty(weight, {shape, 1}, ScalarType::Double);
  const Tensor weight64 = as_float64(weight), gram64 = as_float64(gram);

  cuda::EnergyCall call{};
  call.d = weight.size(1);
  call.d_out = weight.size(0);
  call.width = width;
  call.weight = data(weight64);
  call.weight_stride = weight64.stride(0);
  call.gram = data(gram64);
  call.gram_stride = gram64.stride(0);
  call.energy = data(energy);
  run(current, weight, call, &cuda::unit_energy);
  return energy;
}

}  // namespace liar
