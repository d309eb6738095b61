// The host side of obs_curve: the workspace, and the order of launches. No value is read back.
#pragma once

#include "curve.cuh"

namespace liar::cuda {

// out (+)= α AᵀB of rows of `stride`, or the lower triangle of it.
struct CurveProduct {
  const double *a, *b;
  std::int64_t in_stride, rows, columns, depth;
  double* out;
  std::int64_t out_stride;
  double alpha = -1;
  bool accumulate = true;
  int batches = 1;
  std::int64_t in_batch = 0, out_batch = 0;
};

inline ProductParams<double> to_params(const CurveProduct& c, bool triangle) {
  ProductParams<double> p;
  p.a = {c.a, c.in_stride, c.rows, c.in_batch};
  if (c.b != c.a) p.b = {c.b, c.in_stride, c.columns, c.in_batch};
  p.triangle = triangle;
  p.depth = c.depth;
  p.out = c.out;
  p.out_stride = c.out_stride;
  p.out_batch = c.out_batch;
  p.alpha = c.alpha;
  p.accumulate = c.accumulate;
  p.batches = c.batches;
  return p;
}

// H −= LᵀL and V −= EᵀR + RᵀE for `batches` matrices of `size` columns, lower triangles.
inline void downdate(const CurveState& s, std::int64_t first, std::int64_t depth, std::int64_t size,
                     double* h, std::int64_t h_stride, double* v, std::int64_t v_stride,
                     int batches, Stream& stream) {
  const std::int64_t at = first * s.stride;
  const auto add = [&](const double* a, const double* b, double* out, std::int64_t out_stride) {
    auto p = to_params({a + at, b + at, s.stride, size, size, depth, out, out_stride, -1, true,
                        batches, size, size * size},
                       true);
    p.most_batches = s.curve.most_batches;
    product<Mma64>(p, stream);
  };
  add(s.l, s.l, h, h_stride);
  add(s.e, s.r, v, v_stride);
  add(s.r, s.e, v, v_stride);
}

inline void find_costs(const UnitParams& q, Stream& stream) {
  const auto units = static_cast<unsigned>(q.state.units);
  launch(cost_systems_kernel, {units, 1, 1}, kCurveThreads, 0, stream, q);
  solve(q.costs, stream);
  const auto blocks = static_cast<unsigned>(divide_up(units, kCurveThreads / kWarp));
  launch(unit_costs_kernel, {blocks, 1, 1}, kCurveThreads, 0, stream, q);
}

// One elimination of a unit of width above 1.
inline void eliminate_unit(const UnitParams& q, Stream& stream) {
  const CurveState& s = q.state;
  const std::int64_t w = s.curve.width, d = s.curve.d;
  const auto spans = static_cast<unsigned>(divide_up(d, kCurveThreads));
  const auto width = static_cast<unsigned>(w);
  const auto keep = [&](double* to) {
    launch(keep_rows_kernel, {spans, width, 1}, kCurveThreads, 0, stream,
           KeepParams{q.pivot, to + s.rows * s.stride, s.stride});
  };
  launch(choose_unit_kernel, {1, 1, 1}, kCurveThreads, sizeof(CandidateShared), stream, q);
  launch(unit_rows_kernel, {spans, width, 1}, kCurveThreads, 0, stream, q);
  solve_forward(q.pivot, stream);
  keep(s.l);
  solve_backward(q.pivot, stream);
  keep(s.e);
  ProductParams<double> half;
  half.a = {q.square, w, w, 0};
  half.b = {s.e + s.rows * s.stride, s.stride, d, 0};
  half.depth = w;
  half.out = s.r + s.rows * s.stride;
  half.out_stride = s.stride;
  half.alpha = -0.5;
  product<Mma64>(half, stream);
  downdate(s, s.rows, w, w, s.h_block, w, s.v_block, w, static_cast<int>(s.units), stream);
}

// Returns the bytes of workspace; with a workspace, launches.
inline std::int64_t obs_curve(const Curve& c, void* memory, Stream& stream) {
  Workspace workspace(memory);
  const std::int64_t d = c.d, w = c.width;
  const bool wide = w > 1;
  const auto blocks = static_cast<unsigned>(divide_up(d, kCurveThreads));
  CurveParams params{c, System::lay_out(d, d, 1, workspace), workspace.take<double>(1)};
  UnitParams q{};
  CurveState& s = q.state;
  s.curve = c;
  s.units = d / w;
  s.stride = divide_up(d, 2) * 2;
  s.h_stride = params.system.stride;
  s.code = params.system.code;
  const std::int64_t panel = larger<std::int64_t>(1, kLazy / w) * w;
  s.l = workspace.take<double>(panel * s.stride);
  s.e = wide ? workspace.take<double>(panel * s.stride) : s.l;
  s.r = workspace.take<double>(panel * s.stride);
  s.v = workspace.take<double>(d * s.stride);
  s.h_block = workspace.take<double>(d * w);
  s.v_block = workspace.take<double>(d * w);
  s.gone = workspace.take<unsigned char>(s.units);
  s.lost = workspace.take<std::int64_t>(c.groups);
  if (wide) {
    s.cost = workspace.take<double>(s.units);
    s.pivot = workspace.take<std::int64_t>(1);
    q.square = workspace.take<double>(w * w);
    q.pivot = System::lay_out(w, d, 1, workspace);
    q.costs = System::lay_out(w, w, static_cast<int>(s.units), workspace);
  } else {
    s.lowest = workspace.take<double>(2 * blocks);
    s.lowest_at = workspace.take<std::int64_t>(2 * blocks);
  }
  if (!memory) return workspace.bytes();

  launch(curve_mean_kernel, {1, 1, 1}, kCurveThreads, sizeof(CurveSumShared), stream, params);
  const auto rows = static_cast<unsigned>(smaller<std::int64_t>(d, 65535));
  launch(curve_system_kernel, {rows, 1, 1}, 256, 0, stream, params);
  solve(params.system, stream);
  s.h = params.system.data + params.system.right;
  product<Mma64>(
      to_params({c.weight, c.weight, c.weight_stride, d, d, c.d_out, s.v, s.stride, 1, false},
                true),
      stream);
  launch(start_curve_kernel, {blocks, 1, 1}, kCurveThreads, 0, stream, s);
  launch(unit_blocks_kernel, {static_cast<unsigned>(s.units), 1, 1}, kCurveThreads, 0, stream, s);
  if (!wide)
    launch(first_features_kernel, {blocks, 1, 1}, kCurveThreads, sizeof(CandidateShared), stream,
           s);
  for (s.step = 0; s.step < c.steps; ++s.step) {
    if (wide) {
      find_costs(q, stream);
      eliminate_unit(q, stream);
    } else {
      launch(eliminate_kernel, {blocks, 1, 1}, kCurveThreads, sizeof(CandidateShared), stream, s);
    }
    s.rows += static_cast<int>(w);
    if (s.rows + w > panel && s.step + 1 < c.steps) {
      downdate(s, 0, s.rows, d, s.h, s.h_stride, s.v, s.stride, 1, stream);
      s.rows = 0;
    }
  }
  launch(curve_info_kernel, {1, 1, 1}, kWarp, 0, stream, params);
  return workspace.bytes();
}

}  // namespace liar::cuda
