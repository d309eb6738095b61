// One dtype's half of gram_update_; each is compiled in a file of its own.
#pragma once

#include "kernels/gram.cuh"
#include "place.cuh"

namespace liar::cuda {

static_assert(static_cast<int>(Weights::kNone) == static_cast<int>(WeightType::kNone) &&
              static_cast<int>(Weights::kBool) == static_cast<int>(WeightType::kBool) &&
              static_cast<int>(Weights::kFloat32) == static_cast<int>(WeightType::kFloat) &&
              static_cast<int>(Weights::kFloat64) == static_cast<int>(WeightType::kDouble));

template <class T>
std::int64_t gram_update_of(const GramCall& call, void* workspace, Place place) {
  GramUpdate<T> g;
  g.x = {static_cast<const T*>(call.x), call.x_stride, call.d, 0};
  if (call.y) g.y = {static_cast<const T*>(call.y), call.y_stride, call.d_right, 0};
  g.tokens = call.tokens;
  g.weight = call.weight;
  g.weight_type = static_cast<WeightType>(call.weights);
  g.gram = call.gram;
  g.gram_stride = call.gram_stride;
  g.gram_f64 = call.wide;
  g.total = call.total;
  g.count = call.count;
  g.limit = call.limit;
  Stream stream = open_stream("gram_update_", place);
  const std::int64_t bytes = gram_update(g, workspace, stream);
  require("gram_update_", stream.error);
  return bytes;
}

}  // namespace liar::cuda
