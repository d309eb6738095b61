// The torch-free entry point of obs_curve.
#include "kernels/curve_job.cuh"
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

}  // namespace liar::cuda
