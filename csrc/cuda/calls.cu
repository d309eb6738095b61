// The torch-free entry points that need no dtype of their own.
#include "gram_call.cuh"
#include "kernels/reconstruct_job.cuh"

namespace liar::cuda {

extern template std::int64_t gram_update_of<f16>(const GramCall&, void*, Place);
extern template std::int64_t gram_update_of<bf16>(const GramCall&, void*, Place);
extern template std::int64_t gram_update_of<float>(const GramCall&, void*, Place);
extern template std::int64_t gram_update_of<double>(const GramCall&, void*, Place);

std::int64_t gram_update(const GramCall& call, void* workspace, Place place) {
  switch (call.element) {
    case Element::kFloat16:
      return gram_update_of<f16>(call, workspace, place);
    case Element::kBFloat16:
      return gram_update_of<bf16>(call, workspace, place);
    case Element::kFloat32:
      return gram_update_of<float>(call, workspace, place);
    default:
      return gram_update_of<double>(call, workspace, place);
  }
}

std::int64_t reconstruct(const ReconstructCall& call, void* workspace, Place place) {
  Reconstruct r;
  r.d_out = call.d_out;
  r.d = call.d;
  r.n = call.n;
  r.ladder = call.ladder;
  r.weight = {call.weight, call.weight_stride};
  r.gram = {call.gram, call.gram_stride};
  r.holdout = {call.holdout, call.holdout_stride};
  r.cross = {call.cross, call.cross_stride};
  r.holdout_cross = {call.holdout_cross, call.holdout_cross_stride};
  r.kept = call.kept;
  r.damps = call.damps;
  r.weight_out = call.weight_out;
  r.error = call.error;
  r.holdout_error = call.holdout_error;
  r.info = call.info;
  Stream stream = open_stream("reconstruct", place);
  const std::int64_t bytes = reconstruct(r, workspace, stream);
  require("reconstruct", stream.error);
  return bytes;
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace liar::cuda
