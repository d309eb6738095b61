#include "gram_rows.h"

namespace liar {
namespace {

double weight_at(const GramUpdate& u, int64_t row) {
  switch (u.weight_type) {
    case WeightType::kBool:
      return static_cast<const uint8_t*>(u.weight)[row * u.weight_stride] != 0 ? 1.0 : 0.0;
    case WeightType::kFloat32:
      return static_cast<const float*>(u.weight)[row * u.weight_stride];
    case WeightType::kFloat64:
      return static_cast<const double*>(u.weight)[row * u.weight_stride];
    default:
      return 1.0;
  }
}

}  // namespace

ChosenRows choose_rows(const GramUpdate& u) {
  ChosenRows rows;
  rows.size = u.x.rows;
  rows.all = u.weight_type == WeightType::kNone;
  if (rows.all) return rows;
  bool ones = true;
  for (int64_t t = 0; t < u.x.rows; ++t) {
    const double w = weight_at(u, t);
    if (w == 0) continue;
    if (!(w > 0 && w <= u.limit)) {
      rows.dropped += 1;
      continue;
    }
    rows.index.push_back(t);
    rows.weight.push_back(w);
    ones = ones && w == 1;
  }
  rows.size = static_cast<int64_t>(rows.index.size());
  if (ones) rows.weight.clear();
  return rows;
}

}  // namespace liar
