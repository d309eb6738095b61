// The torch-free entry points of the scores of units.
#include "kernels/curve_job.cuh"
#include "kernels/scores.cuh"
#include "place.cuh"

namespace liar::cuda {

std::int64_t obs_curve(const CurveCall& call, void* workspace, Place place) {
  Curve c;
  c.d = call.d;
  c.d_out = call.d_out;
  c.width = call.width;
  c.groups = call.groups;
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

std::int64_t unit_energy(const EnergyCall& call, void* workspace, Place place) {
  Energy q;
  q.d = call.d;
  q.d_out = call.d_out;
  q.width = call.width;
  q.weight = call.weight;
  q.weight_stride = call.weight_stride;
  q.gram = call.gram;
  q.gram_stride = call.gram_stride;
  q.energy = call.energy;
  Stream stream = open_stream("unit_energy", place);
  const std::int64_t bytes = unit_energy(q, workspace, stream);
  require("unit_energy", stream.error);
  return bytes;
}

template <class T>
std::int64_t fisher_update_of(const FisherCall& call, void* workspace, Stream& stream) {
  Fisher<T> q;
  q.x = static_cast<const T*>(call.x);
  q.grad = static_cast<const T*>(call.grad);
  q.x_sequence = call.x_sequence;
  q.x_stride = call.x_stride;
  q.grad_sequence = call.grad_sequence;
  q.grad_stride = call.grad_stride;
  q.sequences = call.sequences;
  q.tokens = call.tokens;
  q.d = call.d;
  q.width = call.width;
  q.fisher = call.fisher;
  return fisher_update(q, workspace, stream);
}

std::int64_t fisher_update(const FisherCall& call, void* workspace, Place place) {
  Stream stream = open_stream("fisher_update_", place);
  std::int64_t bytes = 0;
  switch (call.element) {
    case Element::kFloat16:
      bytes = fisher_update_of<f16>(call, workspace, stream);
      break;
    case Element::kBFloat16:
      bytes = fisher_update_of<bf16>(call, workspace, stream);
      break;
    case Element::kFloat32:
      bytes = fisher_update_of<float>(call, workspace, stream);
      break;
    default:
      bytes = fisher_update_of<double>(call, workspace, stream);
  }
  require("fisher_update_", stream.error);
  return bytes;
}

}  // namespace liar::cuda
