// Shared by the files of the test module: numpy arrays as operands.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cuda/place.cuh"

namespace liar::testing {

namespace py = pybind11;
using namespace liar::cuda;

void bind_settings(py::module_& m);
void bind_gram(py::module_& m);
void bind_solves(py::module_& m);
void bind_faults(py::module_& m);

// A workspace filled with NaNs: nothing may count on zeros.
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes) : memory_(std::size_t(bytes) + 256, '\xff') {}
  void* data() {
    auto p = reinterpret_cast<std::uintptr_t>(memory_.data());
    return reinterpret_cast<void*>((p + 255) & ~std::uintptr_t(255));
  }

 private:
  std::vector<char> memory_;
};

// Elements from row to row of a 2-d array, whose last axis must be contiguous.
inline std::int64_t row_stride(const py::array& a) {
  return a.shape(0) > 1 ? a.strides(0) / a.itemsize() : a.shape(1);
}

// Runs a job as launchers do: once for the bytes of workspace, once with it. Raises what CUDA would
// refuse.
template <class Job>
void execute(const char* op, int processors, Job job) {
  Stream stream;
  stream.processors = processors;
  Scratch scratch(job(nullptr, stream));
  job(scratch.data(), stream);
  require(op, stream.error);
}

}  // namespace liar::testing
