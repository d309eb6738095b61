// Links the CUDA launchers to kernels that the host shim runs on the devices of simulated_gpu.cpp.
// Loaded after liar_ext, whose operators on CUDA tensors it then is.
#include <stdexcept>

#include "runtime_on_host.h"

extern "C" {
int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
void* liar_open_memory(int device);
void liar_close_memory(void* open);

/// The next launches are refused with this error of the CUDA runtime; 0: no longer.
__attribute__((visibility("default"))) void liar_refuse_launches(int error) {
  liar::testing::runtime().refusal = static_cast<cudaError_t>(error);
}
}

namespace {

void* enter(int device, cudaStream_t stream) {
  void* current = nullptr;
  aoti_torch_get_current_cuda_stream(device, &current);
  if (stream != current) throw std::runtime_error("a launch on a stream of another device");
  return liar_open_memory(device);
}

const int connected = [] {
  auto& runtime = liar::testing::runtime();
  runtime.devices = 2;
  runtime.enter = &enter;
  runtime.leave = &liar_close_memory;
  return 0;
}();

}  // namespace
