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
  const auto matrix = [](const Float64Matrix& m) { return Matrix{m.data, m.stride, m.batch}; };
  Reconstruct r;
  r.batches = call.batches;
  r.d_out = call.d_out;
  r.d = call.d;
  r.n = call.n;
  r.ladder = call.ladder;
  r.weight = matrix(call.weight);
  r.gram = matrix(call.gram);
  r.holdout = matrix(call.holdout);
  r.cross = matrix(call.cross);
  r.holdout_cross = matrix(call.holdout_cross);
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

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace liar::cuda
