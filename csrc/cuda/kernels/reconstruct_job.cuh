// The host side of reconstruct: the workspace, and the order of launches. No value is read back.
#pragma once

#include "small.cuh"

namespace liar::cuda {

inline std::int64_t even(std::int64_t n) { return divide_up(n, 2) * 2; }

// How many items of the batch, and λ of each, go through a launch together: all that fit 2 GiB, as
// small matrices leave most of the machine idle one by one. Several items bring all their λ.
struct Group {
  std::int64_t items = 1;
  int ladder = 1;
};

inline Group group_of(const Reconstruct& r) {
  constexpr std::int64_t kMost = 32768;  // systems: a grid has room for twice as many
  const std::int64_t p = r.d - r.n, folds = r.holdout.data ? 2 : 1;
  const std::int64_t system = r.n + 1;
  const std::int64_t gathered = (r.n + 1) * (folds * (r.n + r.d_out) + 2 * r.d_out);
  const std::int64_t removed = r.cross.data ? 0 : p * (r.n + p + 2 * r.d_out);
  const auto fit = [&](std::int64_t doubles, std::int64_t most) {
    const std::int64_t count = smaller(r.group_bytes / 8 / larger<std::int64_t>(1, doubles), most);
    return larger<std::int64_t>(1, count);
  };
  Group group;
  const std::int64_t ladder = larger(1, r.ladder);
  group.items =
      smaller(fit(gathered + removed + ladder * system, larger<std::int64_t>(1, kMost / ladder)),
              r.batches);
  group.ladder = group.items > 1 ? r.ladder : static_cast<int>(smaller(fit(system, kMost), ladder));
  return group;
}

inline ReconstructSpace lay_out(const Reconstruct& r, Group group, Workspace& workspace) {
  ReconstructSpace s{};
  const std::int64_t p = r.d - r.n, items = group.items, systems = items * group.ladder;
  s.removed_count = p;
  s.square_stride = even(r.n);
  s.linear_stride = even(r.d_out);
  s.removed = workspace.take<std::int64_t>(items * p);
  s.mean = workspace.take<double>(items * 2);
  s.kept_weight = workspace.take<double>(items * r.n * s.linear_stride);
  if (!r.cross.data) {
    s.removed_weight = workspace.take<double>(items * p * s.linear_stride);
    s.mixed = workspace.take<double>(items * p * s.square_stride);
    s.removed_square = workspace.take<double>(items * p * even(p));
    s.removed_product = workspace.take<double>(items * p * s.linear_stride);
  }
  s.folds[0].gram = r.gram;
  s.folds[0].cross = r.cross;
  s.folds[1].gram = r.holdout;
  s.folds[1].cross = r.holdout_cross;
  for (Fold& fold : s.folds) {
    if (!fold.gram.data) continue;
    fold.square = workspace.take<double>(items * r.n * s.square_stride);
    fold.linear = workspace.take<double>(items * r.n * s.linear_stride);
    fold.constant = r.cross.data ? nullptr : workspace.take<double>(items * kFormBlocks);
  }
  s.rhs = r.cross.data ? workspace.take<double>(items * r.n * s.linear_stride) : s.folds[0].linear;
  const int batches = static_cast<int>(systems);
  s.system = {r.n, r.d_out, batches, workspace.take<double>(systems * r.n),
              workspace.take<double>(systems)};
  s.parts = static_cast<int>(larger<std::int64_t>(1, divide_up(r.d_out, kSlice)));
  s.partial = workspace.take<double>(2 * systems * s.parts);
  return s;
}

inline unsigned blocks_for(std::int64_t rows) {
  return static_cast<unsigned>(smaller<std::int64_t>(larger<std::int64_t>(rows, 1), 65535));
}

// out = α AᵀB (+ out), for matrices that lie in the workspace.
inline void multiply(Operand<double> a, Operand<double> b, std::int64_t depth, double* out,
                     std::int64_t stride, std::int64_t out_batch, int batches, double alpha,
                     bool accumulate, Stream& stream) {
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

// What a group's systems have in common: P, the weights, and of each fold H_KK, L and c.
class Gatherer {
 public:
  Gatherer(const Reconstruct& r, const ReconstructSpace& s, std::int64_t items, Stream& stream)
      : r_(r), s_(s), items_(static_cast<int>(items)), stream_(stream) {}

  void run() const {
    const std::int64_t p = s_.removed_count;
    launch(index_kernel, {static_cast<unsigned>(items_), 1, 1}, 1024, sizeof(SumShared), stream_,
           IndexParams{r_, s_.removed, s_.mean});
    look_for_nans();
    weights(kept(), s_.kept_weight);
    if (!r_.cross.data) weights(removed(), s_.removed_weight);
    for (const Fold& fold : s_.folds) {
      if (!fold.gram.data) continue;
      gather(fold.gram, kept(), kept(), fold.square, s_.square_stride);
      if (r_.cross.data) {
        gather(fold.cross, kept(), outputs(), fold.linear, s_.linear_stride);
        continue;
      }
      gather(fold.gram, removed(), kept(), s_.mixed, s_.square_stride);
      gather(fold.gram, removed(), removed(), s_.removed_square, even(p));
      product(s_.mixed, s_.square_stride, r_.n, s_.removed_weight, p, fold.linear, 1, false);
      product(s_.removed_square, even(p), p, s_.removed_weight, p, s_.removed_product, 1, false);
      launch(dot_kernel, {kFormBlocks, static_cast<unsigned>(items_), 1}, kFormThreads,
             sizeof(SumShared), stream_,
             DotParams{s_.removed_weight, s_.removed_product, p, r_.d_out, s_.linear_stride,
                       fold.constant});
    }
    if (!r_.cross.data) return;
    // The right-hand side with targets, C_K − G_KK W_Kᵀ.
    gather(r_.cross, kept(), outputs(), s_.rhs, s_.linear_stride);
    product(s_.folds[0].square, s_.square_stride, r_.n, s_.kept_weight, r_.n, s_.rhs, -1, true);
  }

 private:
  void look_for_nans() const {
    const auto look = [&](const Matrix& from, std::int64_t rows, std::int64_t columns, bool lower) {
      if (from.data)
        launch(finite_kernel, {blocks_for(rows), static_cast<unsigned>(items_), 1}, 256, 0, stream_,
               FiniteParams{from, rows, columns, lower, s_.mean});
    };
    look(r_.weight, r_.d_out, r_.d, false);
    for (const Fold& fold : s_.folds) {
      look(fold.gram, r_.d, r_.d, true);
      look(fold.cross, r_.d, r_.d_out, false);
    }
  }

  Indices kept() const { return {r_.kept, r_.n, r_.n}; }
  Indices removed() const { return {s_.removed, s_.removed_count, s_.removed_count}; }
  Indices outputs() const { return {nullptr, r_.d_out, 0}; }

  void launch_gather(const GatherParams& q) const {
    launch(gather_kernel, {blocks_for(q.rows.count), static_cast<unsigned>(items_), 1}, 256, 0,
           stream_, q);
  }

  void gather(Matrix from, Indices rows, Indices columns, double* to, std::int64_t stride) const {
    launch_gather({from, r_.d, rows, columns, to, stride, rows.count * stride,
                   columns.data != nullptr, false});
  }

  void weights(Indices features, double* to) const {
    launch_gather({r_.weight, r_.d, features, outputs(), to, s_.linear_stride,
                   features.count * s_.linear_stride, false, true});
  }

  // Left (depth × rows) and right (depth × d_out), both of each item.
  void product(const double* left, std::int64_t stride, std::int64_t rows, const double* right,
               std::int64_t depth, double* out, double alpha, bool accumulate) const {
    multiply({left, stride, rows, depth * stride},
             {right, s_.linear_stride, r_.d_out, depth * s_.linear_stride}, depth, out,
             s_.linear_stride, rows * s_.linear_stride, items_, alpha, accumulate, stream_);
  }

  const Reconstruct& r_;
  const ReconstructSpace& s_;
  int items_;
  Stream& stream_;
};

// The problem that starts at one item of the batch and one λ.
inline Reconstruct from(Reconstruct r, std::int64_t item, std::int64_t damp) {
  for (Matrix* m : {&r.weight, &r.gram, &r.holdout, &r.cross, &r.holdout_cross})
    if (m->data) m->data += item * m->batch;
  r.kept += item * r.n;
  r.damps += damp;
  const std::int64_t at = item * r.ladder + damp;
  if (r.weight_out) r.weight_out += at * r.d_out * r.n;
  r.error += at;
  if (r.holdout_error) r.holdout_error += at;
  r.info += 2 * at;
  return r;
}

// Returns the bytes of workspace; with a workspace, launches.
inline std::int64_t reconstruct(const Reconstruct& r, void* memory, Stream& stream) {
  Workspace workspace(memory);
  const Group group = group_of(r);
  const ReconstructSpace space = lay_out(r, group, workspace);
  if (!memory || r.ladder == 0) return workspace.bytes();
  for (std::int64_t item = 0; item < r.batches; item += group.items) {
    const std::int64_t items = smaller(group.items, r.batches - item);
    GroupParams q{from(r, item, 0), space, 1, 0};
    for (Fold& fold : q.s.folds) {
      if (!fold.gram.data) continue;
      fold.gram.data += item * fold.gram.batch;
      if (fold.cross.data) fold.cross.data += item * fold.cross.batch;
    }
    Gatherer(q.r, q.s, items, stream).run();
    for (int l = 0; l < r.ladder; l += group.ladder) {
      q.r = from(r, item, l);
      q.ladder = smaller(group.ladder, r.ladder - l);
      q.s.system.batches = static_cast<int>(items) * q.ladder;
      solve_small_systems(q, stream);
      for (q.fold = 0; q.fold < (r.holdout.data ? 2 : 1); ++q.fold)
        launch(finish_kernel, {static_cast<unsigned>(q.s.system.batches), 1, 1}, kFormThreads,
               sizeof(SumShared), stream, q);
    }
  }
  return workspace.bytes();
}

}  // namespace liar::cuda
