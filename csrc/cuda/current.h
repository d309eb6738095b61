// Torch's current device and stream, through the stable ABI.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../check.h"
#include "calls.h"

namespace liar {

// Makes the tensor's device current for its lifetime.
class Current {
 public:
  Current(const char* op, const Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(device_) {
    // libtorch_cuda.so exports this; a wheel that also serves CPU builds of torch can't link to it.
    using GetStream = int32_t (*)(int32_t, void**);
    static const auto get_stream = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return library
                 ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                 : nullptr;
    }();
    check(get_stream != nullptr, op,
          "this torch has no CUDA streams to offer; install a CUDA build of torch, 2.10 or newer");
    check(get_stream(device_, &stream_) == 0, op, "torch has no current stream on this device");
  }

  cuda::Place place() const { return {device_, stream_}; }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// Kernels dereference every pointer on one device.
inline void check_device(const char* op, const char* name, const std::optional<Tensor>& tensor,
                         const Tensor& like) {
  check(!tensor.has_value() ||
            (tensor->is_cuda() && tensor->get_device_index() == like.get_device_index()),
        op, name, " must be on the CUDA device of ", op[0] == 'g' ? "x" : "weight",
        "; move it with .to(device)");
}

}  // namespace liar
