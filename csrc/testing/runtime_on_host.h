// The calls of the CUDA runtime that the kernels' files make, for the host. They refuse what a GPU
// refuses: shared memory that was not asked for, grids beyond its limits, a device that is not
// there.
#pragma once

#include <cstddef>
#include <functional>
#include <map>

#include "cuda_on_host.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;

namespace liar::testing {

constexpr std::size_t kSharedWithoutAsking = 48 << 10;
constexpr std::size_t kSharedMemory = 99 << 10;  // of a block, on the smallest cards

struct Runtime {
  int devices = 1, device = 0;
  int processors = 2;                        // of a device
  cudaError_t last = cudaSuccess;            // until it is asked for
  cudaError_t refusal = cudaSuccess;         // of every launch: a planted fault
  std::map<const void*, std::size_t> asked;  // shared memory, by kernel
  // Around each kernel: with its device and stream, and with what that returned.
  void* (*enter)(int, cudaStream_t) = [](int, cudaStream_t) -> void* { return nullptr; };
  void (*leave)(void*) = [](void*) {};

  std::size_t shared_memory(const void* kernel) const {
    const auto found = asked.find(kernel);
    return found == asked.end() ? kSharedWithoutAsking : found->second;
  }
};

inline Runtime& runtime() {
  static Runtime value;
  return value;
}

inline void launch(const void* kernel, dim3 grid, unsigned threads, std::size_t shared_bytes,
                   cudaStream_t stream, const std::function<void()>& body) {
  Runtime& r = runtime();
  r.last = r.refusal;
  if (grid.y > 65535 || grid.z > 65535 || threads > 1024) r.last = cudaErrorInvalidConfiguration;
  if (shared_bytes > r.shared_memory(kernel)) r.last = cudaErrorInvalidValue;
  if (r.last != cudaSuccess) return;
  const std::unique_ptr<void, void (*)(void*)> entered(r.enter(r.device, stream), r.leave);
  Block::current().run(grid, {threads}, shared_bytes, body);
}

}  // namespace liar::testing

inline cudaError_t cudaGetLastError() {
  return std::exchange(liar::testing::runtime().last, cudaSuccess);
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorUnsupportedPtxVersion:
      return "the provided PTX was compiled with an unsupported toolchain.";
    default:
      return "invalid argument";
  }
}

inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = liar::testing::runtime().devices;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= liar::testing::runtime().devices) return cudaErrorInvalidDevice;
  liar::testing::runtime().device = device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  if (device < 0 || device >= liar::testing::runtime().devices) return cudaErrorInvalidDevice;
  *value = liar::testing::runtime().processors;
  return cudaSuccess;
}

template <class Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params), cudaFuncAttribute, int bytes) {
  if (static_cast<std::size_t>(bytes) > liar::testing::kSharedMemory) return cudaErrorInvalidValue;
  liar::testing::runtime().asked[reinterpret_cast<const void*>(kernel)] = std::size_t(bytes);
  return cudaSuccess;
}

template <class Params>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Params), int,
                                                          std::size_t) {
  *blocks = 1;
  return cudaSuccess;
}
