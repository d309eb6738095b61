// reconstruct: W' = W_K + D with (G_KK + Λ) Dᵀ = R, its exact error and its held-out error, for a
// batch of matrices times a ladder of λ, in f64. See liar_ext.ops.reconstruct for the formulas.
//
//   index ──▶ P, mean(diag G_KK)        gather ──▶ G_KK, and R = G_KP W_Pᵀ  or  C_K − G_KK W_Kᵀ
//   for each group of systems:  [G_KK + Λ | R] ──solve──▶ X ──▶ errors, W'
//
// A system is one λ of one item of the batch; a group is as many as the workspace holds, and goes
// through each launch together. A block solves a system of up to kSmall rows: see small.cuh. Larger
// ones are for cuSOLVER and cuBLAS, which liar_ext/ops/solves.py calls.
//
// Features run along rows everywhere (X is n × d_out), because products are AᵀB. Both errors are a
// quadratic form of X, ⟨X, H X − 2 L⟩ + c:  plain  X = Dᵀ,  L = H_KP W_Pᵀ, c = tr(W_P H_PP W_Pᵀ);
// with dense targets  X = W'ᵀ, L = C_K, c = 0;  H is the Gram matrix of the fold.
// λ = ∞ is the system [I | 0], so that nobody has to know on the host which λ is infinite.
#pragma once

#include "cholesky.cuh"

namespace liar::cuda {

struct Matrix {
  const double* data = nullptr;
  std::int64_t stride = 0, batch = 0;  // elements from row to row, from matrix to matrix
};

constexpr int kSmall = 128;  // rows of a system that one block solves; see small.cuh

struct Reconstruct {
  std::int64_t batches = 1, d_out = 0, d = 0, n = 0;
  int ladder = 0;
  Matrix weight;                       // batches × d_out × d
  Matrix gram, holdout;                // batches × d × d, lower triangle
  Matrix cross, holdout_cross;         // batches × d × d_out, or none
  const std::int64_t* kept = nullptr;  // batches × n, ascending
  const double* damps = nullptr;       // ladder
  double* weight_out = nullptr;        // batches × ladder × d_out × n, or none: the errors alone
  double* error = nullptr;             // batches × ladder
  double* holdout_error = nullptr;     // batches × ladder, or none
  double* info = nullptr;              // batches × ladder × [code, condition]
  // Bytes of a group's workspace, of which tests take less.
  std::int64_t group_bytes = std::int64_t(2) << 30;
};

// What one fold contributes, of each item: H_KK, L and c.
struct Fold {
  Matrix gram, cross;
  double *square, *linear, *constant;
};

// (G_KK + Λ) X = R for each system, and what comes of its factor.
struct Systems {
  std::int64_t n, m;  // rows, right-hand sides
  int batches;
  double *diagonal, *code;  // batches × n; batches: 0, or the order of a minor, see LAPACK's info
};

// The workspace; of each item, or of each system where it says so.
struct ReconstructSpace {
  std::int64_t removed_count, square_stride, linear_stride;
  std::int64_t* removed;
  double* mean;  // [mean of the diagonal, what is wrong with the arguments: a code below 0, or 0]
  double *kept_weight, *removed_weight;  // transposed: n × d_out, n_P × d_out
  double *mixed, *removed_square, *removed_product;
  double* rhs;  // n × d_out
  Fold folds[2];
  Systems system;
  int parts;        // of the error's sum
  double* partial;  // folds × systems × parts

  LIAR_BOTH std::int64_t square_batch() const { return system.n * square_stride; }
  LIAR_BOTH std::int64_t linear_batch() const { return system.n * linear_stride; }
};

// A group of systems: items × ladder. Pointers of `r` are those of its first item and first λ.
struct GroupParams {
  Reconstruct r;
  ReconstructSpace s;
  int ladder;
  int fold;  // which one the kernel is about
};

constexpr unsigned kFormBlocks = 64, kFormThreads = 256;
constexpr double kBadIndex = -1, kNotFinite = -2;  // codes; above 0 as LAPACK's info

struct IndexParams {
  Reconstruct r;
  std::int64_t* removed;
  double* mean;
};

struct SumShared {
  double scratch[32];
};

// P is what a binary search doesn't find in K. One block an item.
static __global__ void __launch_bounds__(1024) index_kernel(const IndexParams q) {
  auto& shared = shared_memory<SumShared>();
  const Reconstruct& r = q.r;
  const std::int64_t* kept = r.kept + blockIdx.x * r.n;
  const double* gram = r.gram.data + blockIdx.x * r.gram.batch;
  std::int64_t* removed = q.removed + blockIdx.x * (r.d - r.n);
  double sum = 0, wrong = 0;
  for (std::int64_t k = threadIdx.x; k < r.n; k += blockDim.x) {
    const std::int64_t i = kept[k];
    const bool good = i >= 0 && i < r.d && (k == 0 || kept[k - 1] < i);
    if (good)
      sum += gram[i * r.gram.stride + i];
    else
      wrong = 1;
  }
  for (std::int64_t i = threadIdx.x; i < r.d; i += blockDim.x) {
    std::int64_t low = 0, high = r.n;
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (kept[middle] < i)
        low = middle + 1;
      else
        high = middle;
    }
    // Indices that are not ascending within d may count more or fewer than there are.
    const std::int64_t at = i - low;
    if ((low == r.n || kept[low] != i) && at >= 0 && at < r.d - r.n) removed[at] = i;
  }
  sum = block_sum(sum, shared.scratch);
  wrong = block_sum(wrong, shared.scratch);
  if (threadIdx.x == 0) {
    const double mean = r.n > 0 ? sum / static_cast<double>(r.n) : 1;
    q.mean[2 * blockIdx.x] = mean == 0 ? 1 : mean;
    q.mean[2 * blockIdx.x + 1] = wrong > 0 ? kBadIndex : 0;
  }
}

struct FiniteParams {
  Matrix from;
  std::int64_t rows, columns;
  bool lower;  // only columns up to the row's own
  double* mean;
};

// Says so where an argument is not finite. Block (some rows, item); whoever finds it, writes the
// same.
static __global__ void finite_kernel(const FiniteParams q) {
  const double* from = q.from.data + blockIdx.y * q.from.batch;
  bool finite = true;
  for (std::int64_t i = blockIdx.x; i < q.rows; i += gridDim.x) {
    const std::int64_t end = q.lower ? i + 1 : q.columns;
    for (std::int64_t j = threadIdx.x; j < end; j += blockDim.x)
      finite &= is_finite(from[i * q.from.stride + j]);
  }
  double& code = q.mean[2 * blockIdx.y + 1];
  if (!finite && code == 0) code = kNotFinite;
}

struct Indices {
  const std::int64_t* data;  // none: all of them in order
  std::int64_t count, batch;
};

struct GatherParams {
  Matrix from;
  std::int64_t limit;  // indices past it are clamped: `index` has already told on them
  Indices rows, columns;
  double* to;
  std::int64_t stride, batch;
  bool symmetric;   // only the lower triangle of `from` is there
  bool transposed;  // to[i][j] = from[j][rows[i]]
};

LIAR_DEVICE std::int64_t clamp(std::int64_t i, std::int64_t limit) {
  return larger<std::int64_t>(0, smaller(i, limit - 1));
}

static __global__ void gather_kernel(const GatherParams q) {
  const std::int64_t item = blockIdx.y;
  const double* from = q.from.data + item * q.from.batch;
  const std::int64_t* rows = q.rows.data + item * q.rows.batch;
  const std::int64_t* columns = q.columns.data ? q.columns.data + item * q.columns.batch : nullptr;
  for (std::int64_t i = blockIdx.x; i < q.rows.count; i += gridDim.x) {
    const std::int64_t row = clamp(rows[i], q.limit);
    for (std::int64_t j = threadIdx.x; j < q.columns.count; j += blockDim.x) {
      const std::int64_t column = columns ? clamp(columns[j], q.limit) : j;
      const bool swap = q.transposed || (q.symmetric && column > row);
      q.to[item * q.batch + i * q.stride + j] =
          swap ? from[column * q.from.stride + row] : from[row * q.from.stride + column];
    }
  }
}

struct DotParams {
  const double *a, *b;  // rows × stride, of each item
  std::int64_t rows, columns, stride;
  double* out;
};

// Partial sums of Σ a∘b over n_P × d_out elements of each item; finish_kernel adds them up.
static __global__ void dot_kernel(const DotParams q) {
  auto& shared = shared_memory<SumShared>();
  const std::int64_t at = blockIdx.y * q.rows * q.stride;
  double sum = 0;
  for (std::int64_t i = blockIdx.x; i < q.rows; i += gridDim.x)
    for (std::int64_t j = threadIdx.x; j < q.columns; j += blockDim.x)
      sum += q.a[at + i * q.stride + j] * q.b[at + i * q.stride + j];
  sum = block_sum(sum, shared.scratch);
  if (threadIdx.x == 0) q.out[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// One block per system: the sum of the partial sums, the code, and the condition of the factor. The
// held-out fold comes second, and what it finds wrong is wrong for both.
static __global__ void finish_kernel(const GroupParams q) {
  auto& shared = shared_memory<SumShared>();
  const Systems& t = q.s.system;
  const std::int64_t system = blockIdx.x, item = system / q.ladder;
  const double nothing = NAN;
  const double wrong = q.s.mean[2 * item + 1];
  double code = q.fold != 0 ? q.r.info[2 * system] : wrong != 0 ? wrong : t.code[system];
  const double* partial = q.s.partial + (q.fold * t.batches + system) * q.s.parts;
  const double* constant = q.s.folds[q.fold].constant;
  double part = 0;
  for (int k = threadIdx.x; k < q.s.parts; k += blockDim.x) part += partial[k];
  if (constant)
    for (unsigned k = threadIdx.x; k < kFormBlocks; k += blockDim.x)
      part += constant[item * kFormBlocks + k];
  const double error = block_sum(part, shared.scratch);
  const bool spoilt = code == 0 && !is_finite(error);
  if (spoilt) code = kNotFinite;
  if (threadIdx.x == 0) {
    (q.fold == 0 ? q.r.error : q.r.holdout_error)[system] = code == 0 ? error : nothing;
    if (q.fold != 0 && spoilt) {
      q.r.error[system] = q.r.info[2 * system + 1] = nothing;
      q.r.info[2 * system] = code;
    }
  }
  if (q.fold != 0 || threadIdx.x >= kWarp) return;
  const double* diagonal = t.diagonal + system * t.n;
  double low = t.n > 0 ? diagonal[0] : 1, high = low;
  for (std::int64_t i = threadIdx.x; i < t.n; i += kWarp) {
    low = smaller(low, diagonal[i]);
    high = larger(high, diagonal[i]);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    low = smaller(low, __shfl_xor_sync(kAllLanes, low, offset));
    high = larger(high, __shfl_xor_sync(kAllLanes, high, offset));
  }
  if (threadIdx.x == 0) {
    q.r.info[2 * system] = code;
    q.r.info[2 * system + 1] = code == 0 ? high / low * (high / low) : nothing;
  }
}

}  // namespace liar::cuda
