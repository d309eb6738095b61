// The torch-free entry points that need no dtype of their own.
#include "gram_call.cuh"
#include "kernels/eliminate.cuh"
#include "kernels/small.cuh"

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

void solve_small(const SmallCall& call, Place place) {
  Stream stream = open_stream("reconstruct", place);
  solve_small(call, stream);
  require("reconstruct", stream.error);
}

std::int64_t eliminate(const PanelCall& call, void* workspace, Place place) {
  Stream stream = open_stream("obs_curve", place);
  const std::int64_t bytes = eliminate(call, workspace, stream);
  require("obs_curve", stream.error);
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
