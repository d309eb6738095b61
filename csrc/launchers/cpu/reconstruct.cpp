// The launcher of reconstruct: checks, float64 copies of what is not float64 yet, raw pointers.
#include "../../cpu/reconstruct.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../check_ops.h"
#include "../launch.h"
#include "../widen.h"
#include "on_cpu.h"
#include "torch_pool.h"

namespace liar {
namespace {

constexpr const char* kOp = "reconstruct: ";

/// What one site reads of a tensor: (rows, cols), or the site's own of (sites, rows, cols).
Float64View view(const Tensor& tensor, int64_t site) {
  const int64_t lead = tensor.dim() - 2;
  const auto* data = static_cast<const double*>(tensor.const_data_ptr());
  return {lead > 0 ? data + site * tensor.stride(0) : data, tensor.stride(lead)};
}

/// The float64 form of an argument that may be missing, and the view of it per site.
struct Optional64 {
  std::optional<Tensor> tensor;
  std::vector<Float64View> views;

  Optional64(const std::optional<Tensor>& source, int64_t sites) {
    if (!source.has_value()) return;
    tensor = as_float64(*source);
    for (int64_t site = 0; site < sites; ++site) views.push_back(view(*tensor, site));
  }
  const Float64View* of(int64_t site) const {
    return tensor.has_value() ? &views[static_cast<size_t>(site)] : nullptr;
  }
};

const int64_t* kept_of(const Tensor& kept, int64_t site) {
  const auto* index = static_cast<const int64_t*>(kept.const_data_ptr());
  return kept.dim() > 1 ? index + site * kept.stride(0) : index;
}

void check_kept(const int64_t* index, int64_t n, int64_t d) {
  for (int64_t k = 0; k < n; ++k) {
    check(index[k] >= 0 && index[k] < d, kOp, "kept must index ", d, " features, got ", index[k],
          " at position ", k);
    check(k == 0 || index[k - 1] < index[k], kOp, "kept must be strictly ascending, got ",
          k > 0 ? index[k - 1] : 0, " before ", index[k], "; sort it and drop duplicates");
  }
}

void check_damps(const Tensor& damps) {
  const auto* value = static_cast<const double*>(damps.const_data_ptr());
  for (int64_t l = 0; l < damps.size(0); ++l) {
    check(value[l] >= 0, kOp, "damps must be at least 0, got ", value[l], " at position ", l,
          "; use infinity for plain dropping");
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> reconstruct_cpu(
    Tensor weight, Tensor gram, Tensor kept, Tensor damps, std::optional<Tensor> holdout,
    std::optional<Tensor> cross, std::optional<Tensor> holdout_cross, bool errors_only) {
  const ReconstructSizes sizes =
      check_reconstruct(weight, gram, kept, damps, holdout, cross, holdout_cross);
  check_cpu(kOp, "weight", weight, "weight");
  check_cpu(kOp, "gram", gram, "weight");
  check_cpu(kOp, "kept", kept, "weight");
  check_cpu(kOp, "damps", damps, "weight");
  check_cpu(kOp, "holdout", holdout, "weight");
  check_cpu(kOp, "cross", cross, "weight");
  check_cpu(kOp, "holdout_cross", holdout_cross, "weight");
  const int64_t ladder = sizes.ladder, held_out = holdout.has_value() ? ladder : 0,
                solved = errors_only ? 0 : ladder;
  for (int64_t site = 0; site < sizes.sites; ++site) {
    check_kept(kept_of(kept, site), sizes.n, sizes.d);
  }
  check_damps(damps);

  const auto empty = [&](std::vector<int64_t> shape) {
    if (sizes.batched) shape.insert(shape.begin(), sizes.sites);
    return torch::stable::new_empty(weight, {shape.data(), shape.size()}, ScalarType::Double);
  };
  Tensor weight_out = empty({solved, sizes.d_out, sizes.n}), error = empty({ladder}),
         holdout_error = empty({held_out}), info = empty({ladder, 2});
  const auto out = [](Tensor& tensor, int64_t offset) {
    return static_cast<double*>(tensor.mutable_data_ptr()) + offset;
  };

  const Tensor weight64 = as_float64(weight), gram64 = as_float64(gram);
  const Optional64 holdout64(holdout, sizes.sites), cross64(cross, sizes.sites),
      holdout_cross64(holdout_cross, sizes.sites);
  std::vector<Reconstruct> jobs(static_cast<size_t>(sizes.sites));
  for (int64_t site = 0; site < sizes.sites; ++site) {
    Reconstruct& job = jobs[static_cast<size_t>(site)];
    job.d_out = sizes.d_out;
    job.d = sizes.d;
    job.n = sizes.n;
    job.ladder = ladder;
    job.weight = view(weight64, site);
    job.gram = view(gram64, site);
    job.kept = kept_of(kept, site);
    job.damps = static_cast<const double*>(damps.const_data_ptr());
    job.holdout = holdout64.of(site);
    job.cross = cross64.of(site);
    job.holdout_cross = holdout_cross64.of(site);
    job.weight_out = errors_only ? nullptr : out(weight_out, site * ladder * sizes.d_out * sizes.n);
    job.error_out = out(error, site * ladder);
    job.holdout_out = out(holdout_error, site * held_out);
    job.info_out = out(info, site * ladder * 2);
  }
  reconstruct(jobs.data(), sizes.sites, *kernels().f64, torch_pool());
  return {weight_out, error, holdout_error, info};
}

}  // namespace liar
