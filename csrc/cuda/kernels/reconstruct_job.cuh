// The host side of reconstruct: the workspace, and the order of launches. No value is read back.
#pragma once

#include "reconstruct.cuh"

namespace liar::cuda {

inline std::int64_t even(std::int64_t n) { return divide_up(n, 2) * 2; }

// How many λ are solved at once: all of them while they fit 2 GiB, for small matrices leave most of
// the machine idle one by one.
inline int ladder_group(const Reconstruct& r) {
  const std::int64_t bytes = 8 * larger<std::int64_t>(1, r.n) * (r.n + 2 * r.d_out);
  const std::int64_t fit = larger<std::int64_t>(1, (std::int64_t(2) << 30) / bytes);
  return static_cast<int>(smaller<std::int64_t>(r.ladder, fit));
}

inline ReconstructSpace lay_out(const Reconstruct& r, Workspace& workspace) {
  ReconstructSpace s{};
  const std::int64_t p = r.d - r.n, group = ladder_group(r);
  s.removed_count = p;
  s.square_stride = even(r.n);
  s.linear_stride = even(r.d_out);
  s.removed = workspace.take<std::int64_t>(p);
  s.mean = workspace.take<double>(2);
  s.kept_weight = workspace.take<double>(r.n * s.linear_stride);
  if (r.cross.data) {
    s.rhs = workspace.take<double>(r.n * s.linear_stride);
  } else {
    s.removed_weight = workspace.take<double>(p * s.linear_stride);
    s.mixed = workspace.take<double>(p * s.square_stride);
    s.removed_square = workspace.take<double>(p * even(p));
    s.removed_product = workspace.take<double>(p * s.linear_stride);
  }
  s.product = workspace.take<double>(group * r.n * s.linear_stride);
  s.partial = workspace.take<double>(group * kFormBlocks);
  s.folds[0].gram = r.gram;
  s.folds[0].cross = r.cross;
  s.folds[1].gram = r.holdout;
  s.folds[1].cross = r.holdout_cross;
  for (Fold& fold : s.folds) {
    if (!fold.gram.data) continue;
    fold.square = workspace.take<double>(r.n * s.square_stride);
    fold.linear = workspace.take<double>(r.n * s.linear_stride);
    fold.constant = r.cross.data ? nullptr : workspace.take<double>(1);
  }
  s.system = System::lay_out(r.n, r.d_out, static_cast<int>(group), workspace);
  return s;
}

inline unsigned blocks_for(std::int64_t rows) {
  return static_cast<unsigned>(smaller<std::int64_t>(larger<std::int64_t>(rows, 1), 65535));
}

// out = α AᵀB (+ out), for matrices that lie in the workspace.
inline void multiply(Operand<double> a, Operand<double> b, std::int64_t depth, double* out,
                     std::int64_t stride, double alpha, bool accumulate, Stream& stream,
                     int batches = 1, std::int64_t out_batch = 0) {
  ProductParams<double> q;
  q.a = a;
  q.b = b;
  q.depth = depth;
  q.out = out;
  q.out_stride = stride;
  q.out_batch = out_batch;
  q.alpha = alpha;
  q.accumulate = accumulate;
  q.batches = batches;
  product<Mma64>(q, stream);
}

// H_KK, L and c of one fold.
inline void prepare(const Reconstruct& r, const ReconstructSpace& s, const Fold& fold,
                    Stream& stream) {
  const auto gather = [&](Matrix from, const std::int64_t* rows, std::int64_t row_count,
                          const std::int64_t* columns, std::int64_t column_count, double* to,
                          std::int64_t stride) {
    const GatherParams q{
        from, r.d, rows, columns, row_count, column_count, to, stride, columns != nullptr, false};
    launch(gather_kernel, {blocks_for(row_count), 1, 1}, 256, 0, stream, q);
  };
  const std::int64_t p = s.removed_count, m = r.d_out;
  gather(fold.gram, r.kept, r.n, r.kept, r.n, fold.square, s.square_stride);
  if (fold.cross.data) {
    gather(fold.cross, r.kept, r.n, nullptr, m, fold.linear, s.linear_stride);
    return;
  }
  gather(fold.gram, s.removed, p, r.kept, r.n, s.mixed, s.square_stride);
  gather(fold.gram, s.removed, p, s.removed, p, s.removed_square, even(p));
  const Operand<double> weight{s.removed_weight, s.linear_stride, m, 0};
  multiply({s.mixed, s.square_stride, r.n, 0}, weight, p, fold.linear, s.linear_stride, 1, false,
           stream);
  multiply({s.removed_square, even(p), p, 0}, weight, p, s.removed_product, s.linear_stride, 1,
           false, stream);
  launch(dot_kernel, {1, 1, 1}, 1024, sizeof(SumShared), stream,
         DotParams{s.removed_weight, s.removed_product, p, m, s.linear_stride, fold.constant});
}

// Returns the bytes of workspace; with a workspace, launches.
inline std::int64_t reconstruct(const Reconstruct& r, void* memory, Stream& stream) {
  Workspace workspace(memory);
  const ReconstructSpace s = lay_out(r, workspace);
  if (!memory || r.ladder == 0) return workspace.bytes();
  const bool targets = r.cross.data != nullptr;
  const auto weights = [&](const std::int64_t* rows, std::int64_t count, double* to) {
    const GatherParams q{r.weight,        r.d,   rows, nullptr, count, r.d_out, to,
                         s.linear_stride, false, true};
    launch(gather_kernel, {blocks_for(count), 1, 1}, 256, 0, stream, q);
  };
  launch(index_kernel, {1, 1, 1}, 1024, sizeof(SumShared), stream,
         IndexParams{r, s.removed, s.mean});
  weights(r.kept, r.n, s.kept_weight);
  if (!targets) weights(s.removed, s.removed_count, s.removed_weight);
  for (const Fold& fold : s.folds)
    if (fold.gram.data) prepare(r, s, fold, stream);

  // The right-hand side: L itself, or C_K − G_KK W_Kᵀ.
  const Fold& first = s.folds[0];
  const double* rhs = first.linear;
  if (targets) {
    const GatherParams copy{r.cross, r.d,   r.kept,          nullptr, r.n,
                            r.d_out, s.rhs, s.linear_stride, false,   false};
    launch(gather_kernel, {blocks_for(r.n), 1, 1}, 256, 0, stream, copy);
    multiply({first.square, s.square_stride, r.n, 0}, {s.kept_weight, s.linear_stride, r.d_out, 0},
             r.n, s.rhs, s.linear_stride, -1, true, stream);
    rhs = s.rhs;
  }
  const int group = s.system.batches;
  for (int l = 0; l < r.ladder; l += group) {
    System system = s.system;
    system.batches = smaller(group, r.ladder - l);
    const auto batches = static_cast<unsigned>(system.batches);
    launch(start_kernel, {blocks_for(r.n), batches, 1}, 256, 0, stream,
           StartParams{system, first.square, rhs, s.square_stride, s.linear_stride, r.damps + l,
                       s.mean});
    solve(system, stream);
    const auto tiles = static_cast<unsigned>(divide_up(r.n, 32) * divide_up(r.d_out, 32));
    const auto output = [&](bool in_place, bool add, double* out) {
      launch(output_kernel, {tiles, batches, 1}, 256, sizeof(TransposeShared), stream,
             OutputParams{system, s.kept_weight, s.mean, s.linear_stride, in_place, add, out});
    };
    if (targets) output(true, false, nullptr);
    if (r.weight_out) output(false, !targets, r.weight_out + l * r.d_out * r.n);
    for (int f = 0; f < 2; ++f) {
      const Fold& fold = s.folds[f];
      if (!fold.gram.data) continue;
      multiply({fold.square, s.square_stride, r.n, 0},
               {system.data + system.right, system.stride, r.d_out, system.batch()}, r.n, s.product,
               s.linear_stride, 1, false, stream, system.batches, r.n * s.linear_stride);
      launch(form_kernel, {kFormBlocks, batches, 1}, kFormThreads, sizeof(SumShared), stream,
             FormParams{system, s.product, fold.linear, s.linear_stride, s.partial});
      launch(finish_kernel, {batches, 1, 1}, kFormThreads, sizeof(SumShared), stream,
             FinishParams{system, s.partial, fold.constant, s.mean,
                          (f == 0 ? r.error : r.holdout_error) + l,
                          f == 0 ? r.info + 2 * l : nullptr});
    }
  }
  return workspace.bytes();
}

}  // namespace liar::cuda
