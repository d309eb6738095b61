// The torch-free entry points of the scores of units.
#include "kernels/selection.cuh"
#include "place.cuh"

namespace liar::cuda {

std::int64_t obs_curve(const CurveCall& call, void* workspace, Place place) {
  Curve c;
  c.d = call.d;
  c.d_out = call.d_out;
  c.steps = call.steps;
  c.weight = call.weight;
  c.weight_stride = call.weight_stride;
  c.gram = call.gram;
  c.gram_stride = call.gram_stride;
  c.damp = call.damp;
  c.order = call.order;
  c.error = call.error;
  c.info = call.info;
  Stream stream = open_stream("obs_curve", place);
  const std::int64_t bytes = obs_curve(c, workspace, stream);
  require("obs_curve", stream.error);
  return bytes;
}

void unit_energy(const EnergyCall& call, Place place) {
  Stream stream = open_stream("unit_energy", place);
  unit_energy(EnergyParams{call.weight, call.weight_stride, call.d_out, call.gram, call.gram_stride,
                           call.width, call.energy},
              call.d / call.width, stream);
  require("unit_energy", stream.error);
}

template <class T>
void fisher_update_of(const FisherCall& call, Stream& stream) {
  fisher_update(
      FisherParams<T>{static_cast<const T*>(call.x), static_cast<const T*>(call.grad),
                      call.x_stride, call.grad_stride, call.tokens, call.width, call.fisher},
      call.d / call.width, stream);
}

void fisher_update(const FisherCall& call, Place place) {
  Stream stream = open_stream("fisher_update_", place);
  switch (call.element) {
    case Element::kFloat16:
      fisher_update_of<f16>(call, stream);
      break;
    case Element::kBFloat16:
      fisher_update_of<bf16>(call, stream);
      break;
    case Element::kFloat32:
      fisher_update_of<float>(call, stream);
      break;
    default:
      fisher_update_of<double>(call, stream);
  }
  require("fisher_update_", stream.error);
}

}  // namespace liar::cuda
