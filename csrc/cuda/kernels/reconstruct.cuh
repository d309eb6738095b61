// reconstruct: W' = W_K + D with (G_KK + Λ) Dᵀ = R, its exact error and its held-out error, for a
// batch of matrices times a ladder of λ, in f64. See liar_ext.ops.reconstruct for the formulas.
//
//   index ──▶ P, mean(diag G_KK)        gather ──▶ G_KK, and R = G_KP W_Pᵀ  or  C_K − G_KK W_Kᵀ
//   for each group of systems:  [G_KK + Λ | R] ──solve──▶ X ──▶ errors, W'
//
// A system is one λ of one item of the batch; a group is as many as the workspace holds, and goes
// through each launch together. Up to kSmall rows a block does a whole system: see small.cuh.
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
  // What tests take less of: most rows of the one-block kernel, and bytes of a group's workspace.
  int small = kSmall;
  std::int64_t group_bytes = std::int64_t(2) << 30;
};

// What one fold contributes, of each item: H_KK, L and c.
struct Fold {
  Matrix gram, cross;
  double *square, *linear, *constant;
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
  System system;
  double* product;  // systems × n × d_out
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

static __global__ void start_kernel(const GroupParams q) {
  const System& t = q.s.system;
  const std::int64_t system = blockIdx.y, item = system / q.ladder;
  const double shift = q.r.damps[system % q.ladder] * q.s.mean[2 * item];
  const bool drop = shift - shift != 0;  // infinite
  const double* square = q.s.folds[0].square + item * q.s.square_batch();
  const double* linear = q.s.rhs + item * q.s.linear_batch();
  if (blockIdx.x == 0 && threadIdx.x == 0) t.code[system] = 0;
  for (std::int64_t i = blockIdx.x; i < t.n; i += gridDim.x) {
    double* row = t.data + system * t.batch() + i * t.stride;
    for (std::int64_t j = threadIdx.x; j < t.stride; j += blockDim.x) {
      double value = 0;
      if (j < t.n)
        value = drop ? double(i == j) : square[i * q.s.square_stride + j] + (i == j ? shift : 0);
      else if (j >= t.right && j < t.right + t.m && !drop)
        value = linear[i * q.s.linear_stride + j - t.right];
      row[j] = value;
    }
  }
}

// Partial sums of ⟨X, H X − 2 L⟩, with H X in `product`.
static __global__ void form_kernel(const GroupParams q) {
  auto& shared = shared_memory<SumShared>();
  const System& t = q.s.system;
  const std::int64_t system = blockIdx.y, item = system / q.ladder;
  double sum = 0;
  for (std::int64_t i = blockIdx.x; i < t.n; i += gridDim.x) {
    const double* x = t.data + system * t.batch() + i * t.stride + t.right;
    const double* product = q.s.product + (system * t.n + i) * q.s.linear_stride;
    const double* linear = q.s.folds[q.fold].linear + (item * t.n + i) * q.s.linear_stride;
    for (std::int64_t j = threadIdx.x; j < t.m; j += blockDim.x)
      sum += x[j] * (product[j] - 2 * linear[j]);
  }
  sum = block_sum(sum, shared.scratch);
  if (threadIdx.x == 0) q.s.partial[(q.fold * t.batches + system) * q.s.parts + blockIdx.x] = sum;
}

// One block per system: the sum of the partial sums, the code, and the condition of the factor. The
// held-out fold comes second, and what it finds wrong is wrong for both.
static __global__ void finish_kernel(const GroupParams q) {
  auto& shared = shared_memory<SumShared>();
  const System& t = q.s.system;
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

// X += W_Kᵀ in place: with dense targets the errors are those of W' itself.
static __global__ void add_weight_kernel(const GroupParams q) {
  const System& t = q.s.system;
  const std::int64_t system = blockIdx.y, item = system / q.ladder;
  for (std::int64_t i = blockIdx.x; i < t.n; i += gridDim.x)
    for (std::int64_t j = threadIdx.x; j < t.m; j += blockDim.x)
      t.data[system * t.batch() + i * t.stride + t.right + j] +=
          q.s.kept_weight[(item * t.n + i) * q.s.linear_stride + j];
}

// W' = W_K + Xᵀ, or Xᵀ where that is in it already; in 32×32 tiles, because W' runs along n and X
// along d_out.
static __global__ void output_kernel(const GroupParams q) {
  auto& shared = shared_memory<TransposeShared>();
  const System& t = q.s.system;
  const std::int64_t system = blockIdx.y, item = system / q.ladder, tiles = divide_up(t.m, 32);
  const std::int64_t i0 = blockIdx.x / tiles * 32, j0 = blockIdx.x % tiles * 32;
  const bool good = t.code[system] == 0 && q.s.mean[2 * item + 1] == 0;
  const bool add = !q.r.cross.data;
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  for (int r = y; r < 32; r += 8) {
    const std::int64_t i = i0 + r, j = j0 + x;
    if (i >= t.n || j >= t.m) continue;
    const double w = q.s.kept_weight[(item * t.n + i) * q.s.linear_stride + j];
    const double value = t.data[system * t.batch() + i * t.stride + t.right + j];
    shared.tile[r][x] = good ? value + (add ? w : 0) : NAN;
  }
  __syncthreads();
  for (int r = y; r < 32; r += 8) {
    const std::int64_t i = i0 + x, j = j0 + r;
    if (i < t.n && j < t.m) q.r.weight_out[(system * t.m + j) * t.n + i] = shared.tile[x][r];
  }
}

}  // namespace liar::cuda
