// What the launchers know of the kernels: plain structs and functions, no CUDA and no torch header.
#pragma once

#include <cstdint>

namespace liar::cuda {

enum class Element { kFloat16, kBFloat16, kFloat32, kFloat64 };
enum class Weights { kNone, kBool, kFloat32, kFloat64 };

struct GramCall {
  Element element;
  const void* x;
  const void* y;  // null: the symmetric Gram matrix
  std::int64_t tokens, d, d_right;
  std::int64_t x_stride, y_stride;
  const void* weight;
  Weights weights;
  void* gram;
  std::int64_t gram_stride;
  bool wide;  // gram and total are float64
  void* total;
  double* count;
  double limit;  // of |x|, |y|, weight and |weight x|; rows beyond are dropped and counted
};

// Elements from row to row and from matrix to matrix; no data: none.
struct Float64Matrix {
  const double* data;
  std::int64_t stride, batch;
};

struct ReconstructCall {
  std::int64_t batches, d_out, d, n;
  int ladder;
  Float64Matrix weight, gram, holdout, cross, holdout_cross;
  const std::int64_t* kept;
  const double* damps;
  double* weight_out;  // null: the errors alone
  double* error;
  double* holdout_error;
  double* info;
};

// Elimination of units one by one; `steps` of them.
struct CurveCall {
  std::int64_t d, d_out, width, groups, steps;
  const double* weight;
  std::int64_t weight_stride;
  const double* gram;
  std::int64_t gram_stride;
  double damp;
  std::int64_t* order;
  double* error;
  double* info;
};

struct Place {
  int device;
  void* stream;
};

// Bytes of workspace with `workspace` null, else launches; never waits and never allocates.
// Throws std::runtime_error with what CUDA says and what to do.
std::int64_t gram_update(const GramCall& call, void* workspace, Place place);
std::int64_t reconstruct(const ReconstructCall& call, void* workspace, Place place);
std::int64_t obs_curve(const CurveCall& call, void* workspace, Place place);

// How many devices the driver offers; 0, without an error, where there is no driver or an old one.
int device_count();

// CUDA's versions as 1000 · major + 10 · minor: of the runtime in this library, and the newest that
// the driver knows, 0 where there is none.
int runtime_version();
int driver_version();

}  // namespace liar::cuda
