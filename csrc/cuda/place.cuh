// From a launcher's place to a stream of kernels, and from CUDA's error to words.
#pragma once

#include <stdexcept>
#include <string>

#include "calls.h"
#include "kernels/device.cuh"

namespace liar::cuda {

inline void require(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  std::string text = std::string(op) + ": CUDA says \"" + cudaGetErrorString(error) + "\"";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion)
    text +=
        "; this build holds no kernels for this GPU or driver: of compute capability 8.0 and more, "
        "rebuild with LIAR_CUDA_ARCHS set to it or update the driver; else set LIAR_REFERENCE=1";
  if (error == cudaErrorInsufficientDriver)
    text +=
        "; `liar doctor` has both versions: update the driver, or rebuild with its CUDA toolkit";
  throw std::runtime_error(text);
}

// This library has a CUDA runtime of its own, which must be told the device that torch made
// current.
inline Stream open_stream(const char* op, Place place) {
  Stream stream;
  stream.handle = static_cast<cudaStream_t>(place.stream);
  require(op, cudaSetDevice(place.device));
  require(op,
          cudaDeviceGetAttribute(&stream.processors, cudaDevAttrMultiProcessorCount, place.device));
  return stream;
}

}  // namespace liar::cuda
