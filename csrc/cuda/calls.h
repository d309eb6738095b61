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

constexpr int kSmall = 128;  // rows of a system that a block solves; see kernels/small.cuh

// (block + shift) X = side for each shift; infinite: X = 0. All row-major without gaps.
struct SmallCall {
  std::int64_t n, columns;
  int ladder;
  const double* block;   // n × n, lower triangle
  const double* side;    // n × columns
  const double* shifts;  // ladder
  double* x;             // ladder × n × columns
  double* code;          // ladder: as LAPACK's info
  double* diagonal;      // ladder × n: of the factor
};

// Rows first to first + count of an elimination of single features; see kernels/eliminate.cuh.
struct PanelCall {
  std::int64_t n, first, count, groups, per_group;
  const double *h, *v;              // n × n, symmetric
  const std::int64_t* unit;         // n, ascending: what the features are called
  std::int64_t* lost;               // groups: the round in which each lost its last, or -1
  std::int64_t* order;              // of the whole elimination, as error is
  double* error;                    // from 0
  double *left, *right;             // count × n
  bool* gone;                       // n: false
  double *h_diagonal, *v_diagonal;  // n
};

struct Place {
  int device;
  void* stream;
};

// Bytes of workspace with `workspace` null, else launches; never waits and never allocates.
// Throws std::runtime_error with what CUDA says and what to do.
std::int64_t gram_update(const GramCall& call, void* workspace, Place place);
std::int64_t eliminate(const PanelCall& call, void* workspace, Place place);

// Needs no workspace.
void solve_small(const SmallCall& call, Place place);

// How many devices the driver offers; 0, without an error, where there is no driver or an old one.
int device_count();

// CUDA's versions as 1000 · major + 10 · minor: of the runtime in this library, and the newest that
// the driver knows, 0 where there is none.
int runtime_version();
int driver_version();

}  // namespace liar::cuda
