// The rules that every device has for the operators' arguments: shapes and dtypes, no values.
#pragma once

#include <optional>
#include <utility>

#include "check.h"
#include "written.h"

namespace liar {

inline bool is_float(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float ||
         type == ScalarType::Double;
}

inline void check_gram_update(const Tensor& gram, const Tensor& total, const Tensor& count,
                              const Tensor& x, const std::optional<Tensor>& y,
                              const std::optional<Tensor>& weight) {
  constexpr const char* kOp = "gram_update_: ";
  check(total.dim() == 1 && columns_contiguous(total), kOp,
        "total must be (d,) and contiguous, got ", shape_of(total));
  const int64_t d = total.size(0);
  check(x.dim() == 2 && x.size(1) == d, kOp, "x must be (tokens, ", d, "), got ", shape_of(x),
        "; flatten batch and sequence first");
  const int64_t tokens = x.size(0);
  if (y.has_value()) {
    check(y->dim() == 2 && y->size(0) == tokens, kOp, "y must be (", tokens, ", dy), got ",
          shape_of(*y), "; give one row per row of x");
    check(y->scalar_type() == x.scalar_type(), kOp, "y must have the dtype of x; convert it first");
  }
  const int64_t cols = y.has_value() ? y->size(1) : d;
  check(gram.dim() == 2 && gram.size(0) == d && gram.size(1) == cols, kOp, "gram must be (", d,
        ", ", cols, "), got ", shape_of(gram));
  check(columns_contiguous(gram) && (d <= 1 || gram.stride(0) >= cols), kOp,
        "gram must have contiguous columns and rows that do not overlap; allocate it with "
        "torch.zeros");
  check((gram.scalar_type() == ScalarType::Float || gram.scalar_type() == ScalarType::Double) &&
            gram.scalar_type() == total.scalar_type(),
        kOp, "gram and total must both be float32 or both be float64");
  check(count.dim() == 1 && count.size(0) == 2 && count.scalar_type() == ScalarType::Double &&
            count.is_contiguous(),
        kOp, "count must be (2,) float64 and contiguous, got ", shape_of(count));
  if (weight.has_value()) {
    check(weight->dim() == 1 && weight->size(0) == tokens, kOp, "weight must be (", tokens,
          ",), got ", shape_of(*weight), "; give one weight per row of x");
  }
}

/// The largest size that an entry of x or y, a weight, or an entry times its weight may have; a row
/// beyond it is dropped and counted, as one that is not finite. Products are at most 2^96 then, and
/// 2^31 of them still fit a float32 sum; in float64 throughout, 2^23 products of 2^1000 fit.
inline double largest_entry(const Tensor& gram, const Tensor& x) {
  const bool wide = x.scalar_type() == ScalarType::Double && gram.scalar_type() == x.scalar_type();
  return wide ? 0x1p500 : 0x1p48;
}

/// What gram_update_ writes, when it is known to be on one device with what it reads.
inline void check_and_mark_sums(Tensor& gram, Tensor& total, Tensor& count, const Tensor& x,
                                const std::optional<Tensor>& y,
                                const std::optional<Tensor>& weight) {
  constexpr const char* kOp = "gram_update_: ";
  check_apart(kOp, "gram", gram, "total", total);
  check_apart(kOp, "gram", gram, "count", count);
  check_apart(kOp, "total", total, "count", count);
  const std::pair<const char*, Tensor*> sums[] = {
      {"gram", &gram}, {"total", &total}, {"count", &count}};
  for (const auto& [name, sum] : sums) {
    check_apart(kOp, name, *sum, "x", x);
    check_apart(kOp, name, *sum, "y", y);
    check_apart(kOp, name, *sum, "weight", weight);
  }
  for (const auto& [name, sum] : sums) mark_changed(kOp, name, *sum);
}

namespace checks {

constexpr const char* kOp = "reconstruct: ";

/// Whether `tensor` is (rows, cols), or (sites, rows, cols) where `batched`.
inline bool is_matrix(const Tensor& tensor, bool batched, int64_t sites, int64_t rows,
                      int64_t cols) {
  const int64_t lead = batched ? 1 : 0;
  return tensor.dim() == 2 + lead && (!batched || tensor.size(0) == sites) &&
         tensor.size(lead) == rows && tensor.size(lead + 1) == cols;
}

inline std::string site_shape(bool batched, int64_t sites, int64_t rows, int64_t cols) {
  std::ostringstream text;
  text << '(';
  if (batched) text << sites << ", ";
  text << rows << ", " << cols << ')';
  return text.str();
}

}  // namespace checks

/// The sizes of a call to reconstruct. All tensors but damps have a leading batch of sites, or none
/// has.
struct ReconstructSizes {
  bool batched;
  int64_t sites;  // 1 unless batched
  int64_t d_out, d, n, ladder;
};

inline ReconstructSizes check_reconstruct(const Tensor& weight, const Tensor& gram,
                                          const Tensor& kept, const Tensor& damps,
                                          const std::optional<Tensor>& holdout,
                                          const std::optional<Tensor>& cross,
                                          const std::optional<Tensor>& holdout_cross) {
  using namespace checks;
  const bool batched = weight.dim() == 3;
  check((batched || weight.dim() == 2) && is_float(weight), kOp,
        "weight must be a float tensor (d_out, d), or (sites, d_out, d), got ", shape_of(weight));
  const int64_t lead = batched ? 1 : 0, sites = batched ? weight.size(0) : 1;
  const int64_t d_out = weight.size(lead), d = weight.size(lead + 1);
  const auto check_square = [&](const Tensor& tensor, const char* name) {
    check(is_matrix(tensor, batched, sites, d, d), kOp, name, " must be ",
          site_shape(batched, sites, d, d), ", got ", shape_of(tensor),
          "; give the moments of the layer that weight is of");
    check(tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double,
          kOp, name, " must be float32 or float64; convert it first");
  };
  const auto check_cross = [&](const Tensor& tensor, const char* name) {
    check(is_matrix(tensor, batched, sites, d, d_out), kOp, name, " must be ",
          site_shape(batched, sites, d, d_out), ", got ", shape_of(tensor));
    check(is_float(tensor), kOp, name, " must be a float tensor; convert it first");
  };
  check_square(gram, "gram");
  check(kept.dim() == 1 + lead && kept.scalar_type() == ScalarType::Long &&
            (!batched || kept.size(0) == sites) && columns_contiguous(kept),
        kOp, "kept must be ", batched ? "(sites, n)" : "(n,)", " int64 and contiguous, got ",
        shape_of(kept));
  check(damps.dim() == 1 && damps.scalar_type() == ScalarType::Double && damps.is_contiguous(), kOp,
        "damps must be (L,) float64 and contiguous, got ", shape_of(damps));
  if (holdout.has_value()) check_square(*holdout, "holdout");
  if (cross.has_value()) check_cross(*cross, "cross");
  if (holdout_cross.has_value()) check_cross(*holdout_cross, "holdout_cross");
  check(holdout_cross.has_value() == (holdout.has_value() && cross.has_value()), kOp,
        "holdout_cross must be given exactly when both holdout and cross are");
  return {batched, sites, d_out, d, kept.size(lead), damps.size(0)};
}

}  // namespace liar
