// What the CUDA launchers share: torch's current device and stream, through the stable ABI, and
// tensors as the kernels take them.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../../cuda/calls.h"
#include "../check.h"

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

// Kernels dereference every pointer on one device, that of the argument `first`.
inline void check_device(const char* op, const char* name, const std::optional<Tensor>& tensor,
                         const Tensor& like, const char* first) {
  check(!tensor.has_value() ||
            (tensor->is_cuda() && tensor->get_device_index() == like.get_device_index()),
        op, name, " must be on the CUDA device of ", first, "; move it with .to(device)");
}

inline cuda::Element element_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return cuda::Element::kFloat16;
    case ScalarType::BFloat16:
      return cuda::Element::kBFloat16;
    case ScalarType::Float:
      return cuda::Element::kFloat32;
    default:
      check(x.scalar_type() == ScalarType::Double, op,
            "x must be float16, bfloat16, float32 or float64; convert it first");
      return cuda::Element::kFloat64;
  }
}

// Rows may be strided; columns that are get copied.
inline Tensor with_columns(const Tensor& x) {
  return columns_contiguous(x) ? x : torch::stable::contiguous(x);
}

inline double* data(Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }
inline const double* data(const Tensor& tensor) {
  return static_cast<const double*>(tensor.const_data_ptr());
}

// Asks how much workspace a call needs, takes it from torch's allocator, and launches. The
// allocator keeps the memory for this stream until the kernels are done.
template <class Call>
void run(const Current& current, const Tensor& like, const Call& call,
         std::int64_t (*entry)(const Call&, void*, cuda::Place)) {
  const int64_t bytes[] = {entry(call, nullptr, current.place())};
  Tensor workspace = torch::stable::new_empty(like, {bytes, 1}, ScalarType::Byte);
  entry(call, workspace.mutable_data_ptr(), current.place());
}

}  // namespace liar
