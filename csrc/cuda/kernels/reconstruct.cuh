// reconstruct: W' = W_K + D with (G_KK + Λ) Dᵀ = R, its exact error and its held-out error, for a
// ladder of λ, in f64. See liar_ext.ops.reconstruct for the formulas.
//
//   index ──▶ P, mean(diag G_KK)        gather ──▶ G_KK, and R = G_KP W_Pᵀ  or  C_K − G_KK W_Kᵀ
//   for each group of λ:  [G_KK + Λ | R] ──solve──▶ X ──▶ errors, W'
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
  std::int64_t stride = 0;
};

struct Reconstruct {
  std::int64_t d_out = 0, d = 0, n = 0;
  int ladder = 0;
  Matrix weight;                       // d_out × d
  Matrix gram, holdout;                // d × d, lower triangle
  Matrix cross, holdout_cross;         // d × d_out, or none
  const std::int64_t* kept = nullptr;  // n, ascending
  const double* damps = nullptr;       // ladder
  double* weight_out = nullptr;        // ladder × d_out × n, or none: the errors alone
  double* error = nullptr;             // ladder
  double* holdout_error = nullptr;     // ladder, or none
  double* info = nullptr;              // ladder × [code, condition]
};

// What one fold contributes: H_KK, L and c.
struct Fold {
  Matrix gram, cross;
  double *square, *linear, *constant;
};

struct ReconstructSpace {
  std::int64_t removed_count, square_stride, linear_stride;
  std::int64_t* removed;
  double* mean;  // [mean of the diagonal, 1 if kept is not ascending within d]
  double *kept_weight, *removed_weight;  // transposed: n × d_out, n_P × d_out
  double *mixed, *removed_square, *removed_product;
  double* rhs;      // n × d_out, with dense targets
  double* product;  // batches × n × d_out
  double* partial;  // batches × kFormBlocks
  Fold folds[2];
  System system;
};

constexpr unsigned kFormBlocks = 64, kFormThreads = 256;

struct IndexParams {
  Reconstruct r;
  std::int64_t* removed;
  double* mean;
};

struct SumShared {
  double scratch[32];
};

// P is what a binary search doesn't find in K.
static __global__ void index_kernel(const IndexParams q) {
  auto& shared = shared_memory<SumShared>();
  const Reconstruct& r = q.r;
  double sum = 0, wrong = 0;
  for (std::int64_t k = threadIdx.x; k < r.n; k += blockDim.x) {
    const std::int64_t i = r.kept[k];
    const bool good = i >= 0 && i < r.d && (k == 0 || r.kept[k - 1] < i);
    if (good)
      sum += r.gram.data[i * r.gram.stride + i];
    else
      wrong = 1;
  }
  for (std::int64_t i = threadIdx.x; i < r.d; i += blockDim.x) {
    std::int64_t low = 0, high = r.n;
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (r.kept[middle] < i)
        low = middle + 1;
      else
        high = middle;
    }
    if ((low == r.n || r.kept[low] != i) && i - low < r.d - r.n) q.removed[i - low] = i;
  }
  sum = block_sum(sum, shared.scratch);
  wrong = block_sum(wrong, shared.scratch);
  if (threadIdx.x == 0) {
    const double mean = r.n > 0 ? sum / static_cast<double>(r.n) : 1;
    q.mean[0] = mean == 0 ? 1 : mean;
    q.mean[1] = wrong > 0;
  }
}

struct GatherParams {
  Matrix from;
  std::int64_t limit;  // indices past it are clamped: `index` has already told on them
  const std::int64_t *rows, *columns;  // no columns: all of them
  std::int64_t row_count, column_count;
  double* to;
  std::int64_t stride;
  bool symmetric;   // only the lower triangle of `from` is there
  bool transposed;  // to[i][j] = from[j][rows[i]]
};

LIAR_DEVICE std::int64_t clamp(std::int64_t i, std::int64_t limit) {
  return larger<std::int64_t>(0, smaller(i, limit - 1));
}

static __global__ void gather_kernel(const GatherParams q) {
  for (std::int64_t i = blockIdx.x; i < q.row_count; i += gridDim.x) {
    const std::int64_t row = clamp(q.rows[i], q.limit);
    for (std::int64_t j = threadIdx.x; j < q.column_count; j += blockDim.x) {
      const std::int64_t column = q.columns ? clamp(q.columns[j], q.limit) : j;
      const bool swap = q.transposed || (q.symmetric && column > row);
      q.to[i * q.stride + j] = swap ? q.from.data[column * q.from.stride + row]
                                    : q.from.data[row * q.from.stride + column];
    }
  }
}

struct StartParams {
  System system;
  const double *square, *linear;
  std::int64_t square_stride, linear_stride;
  const double *damps, *mean;
};

static __global__ void start_kernel(const StartParams q) {
  const System& s = q.system;
  const std::int64_t batch = blockIdx.y;
  const double damp = q.damps[batch], shift = damp * q.mean[0];
  const bool drop = shift - shift != 0;  // infinite
  if (blockIdx.x == 0 && threadIdx.x == 0) s.code[batch] = 0;
  for (std::int64_t i = blockIdx.x; i < s.n; i += gridDim.x) {
    double* row = s.data + batch * s.n * s.stride + i * s.stride;
    for (std::int64_t j = threadIdx.x; j < s.stride; j += blockDim.x) {
      double value = 0;
      if (j < s.n)
        value = drop ? double(i == j) : q.square[i * q.square_stride + j] + (i == j ? shift : 0);
      else if (j >= s.right && j < s.right + s.m && !drop)
        value = q.linear[i * q.linear_stride + j - s.right];
      row[j] = value;
    }
  }
}

struct FormParams {
  System system;
  const double *product, *linear;  // batches × n × linear_stride; n × linear_stride
  std::int64_t linear_stride;
  double* partial;
};

// Partial sums of ⟨X, H X − 2 L⟩, with H X in `product`.
static __global__ void form_kernel(const FormParams q) {
  auto& shared = shared_memory<SumShared>();
  const System& s = q.system;
  const std::int64_t batch = blockIdx.y;
  double sum = 0;
  for (std::int64_t i = blockIdx.x; i < s.n; i += gridDim.x) {
    const double* x = s.data + batch * s.n * s.stride + i * s.stride + s.right;
    const double* product = q.product + (batch * s.n + i) * q.linear_stride;
    const double* linear = q.linear + i * q.linear_stride;
    for (std::int64_t j = threadIdx.x; j < s.m; j += blockDim.x)
      sum += x[j] * (product[j] - 2 * linear[j]);
  }
  sum = block_sum(sum, shared.scratch);
  if (threadIdx.x == 0) q.partial[batch * gridDim.x + blockIdx.x] = sum;
}

struct DotParams {
  const double *a, *b;
  std::int64_t rows, columns, stride;
  double* out;
};

// out = Σ a∘b, in one block: n_P × d_out elements, once per fold.
static __global__ void dot_kernel(const DotParams q) {
  auto& shared = shared_memory<SumShared>();
  double sum = 0;
  for (std::int64_t i = threadIdx.x / kWarp; i < q.rows; i += blockDim.x / kWarp)
    for (std::int64_t j = threadIdx.x % kWarp; j < q.columns; j += kWarp)
      sum += q.a[i * q.stride + j] * q.b[i * q.stride + j];
  sum = block_sum(sum, shared.scratch);
  if (threadIdx.x == 0) *q.out = sum;
}

struct FinishParams {
  System system;
  const double *partial, *constant, *mean;
  double* error;
  double* info;  // none for the second fold
};

// One block per λ: the sum of the partial sums, the code, and the condition of the factor.
static __global__ void finish_kernel(const FinishParams q) {
  auto& shared = shared_memory<SumShared>();
  const System& s = q.system;
  const std::int64_t batch = blockIdx.x;
  const double nothing = NAN;
  const double code = q.mean[1] != 0 ? -1 : s.code[batch];
  const double part = threadIdx.x < kFormBlocks ? q.partial[batch * kFormBlocks + threadIdx.x] : 0;
  const double error = block_sum(part, shared.scratch) + (q.constant ? *q.constant : 0);
  if (threadIdx.x == 0) q.error[batch] = code == 0 ? error : nothing;
  if (!q.info || threadIdx.x >= kWarp) return;
  double low = s.n > 0 ? s.diagonal[batch * s.n] : 1, high = low;
  for (std::int64_t i = threadIdx.x; i < s.n; i += kWarp) {
    low = smaller(low, s.diagonal[batch * s.n + i]);
    high = larger(high, s.diagonal[batch * s.n + i]);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    low = smaller(low, __shfl_xor_sync(kAllLanes, low, offset));
    high = larger(high, __shfl_xor_sync(kAllLanes, high, offset));
  }
  if (threadIdx.x == 0) {
    q.info[2 * batch] = code;
    q.info[2 * batch + 1] = code == 0 ? high / low * (high / low) : nothing;
  }
}

struct OutputParams {
  System system;
  const double *kept_weight, *mean;
  std::int64_t weight_stride;
  bool add_to_system;  // X += W_Kᵀ in place, instead of writing W' out
  bool add_weight;     // W' = W_K + X, not X
  double* out;         // batches × m × n
};

// 32×32 tiles, because W' runs along n and X along d_out.
static __global__ void output_kernel(const OutputParams q) {
  auto& shared = shared_memory<TransposeShared>();
  const System& s = q.system;
  const std::int64_t batch = blockIdx.y, tiles = divide_up(s.m, 32);
  const std::int64_t i0 = blockIdx.x / tiles * 32, j0 = blockIdx.x % tiles * 32;
  const bool good = s.code[batch] == 0 && q.mean[1] == 0;
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  for (int r = y; r < 32; r += 8) {
    const std::int64_t i = i0 + r, j = j0 + x;
    if (i >= s.n || j >= s.m) continue;
    double* at = s.data + (batch * s.n + i) * s.stride + s.right + j;
    const double w = q.kept_weight[i * q.weight_stride + j];
    if (q.add_to_system)
      *at += w;
    else
      shared.tile[r][x] = good ? *at + (q.add_weight ? w : 0) : NAN;
  }
  if (q.add_to_system) return;
  __syncthreads();
  for (int r = y; r < 32; r += 8) {
    const std::int64_t i = i0 + x, j = j0 + r;
    if (i < s.n && j < s.m) q.out[(batch * s.m + j) * s.n + i] = shared.tile[x][r];
  }
}

}  // namespace liar::cuda
