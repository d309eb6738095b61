// reconstruct: single sites and batches, with dense targets and held-out sums, against the errors
// summed token by token.
#include <limits>
#include <string>

#include "check.h"
#include "cpu/panel_kernel.h"
#include "cpu/reconstruct.h"

namespace liar::native {
namespace {

const Values kDamps = {0, 1e-3, 0.5, std::numeric_limits<double>::infinity()};

/// Calibration and held-out tokens of a site, what it has to give, and what came of it.
struct Site {
  int64_t d, d_out, tokens;
  std::vector<int64_t> kept;
  Values x, held_x, weight, target, held_target;  // target: (tokens, d_out)
  Values gram, holdout, cross, holdout_cross;
  Float64View gram_view, holdout_view, cross_view, holdout_cross_view;
  Values out, error, held_out, info;

  int64_t n() const { return static_cast<int64_t>(kept.size()); }
};

Values cross_of(const Site& s, const Values& x, const Values& target) {
  Values cross = zeros(s.d * s.d_out);
  for (int64_t t = 0; t < s.tokens; ++t) {
    for (int64_t i = 0; i < s.d; ++i) {
      for (int64_t o = 0; o < s.d_out; ++o) {
        cross[at(i * s.d_out + o)] += x[at(t * s.d + i)] * target[at(t * s.d_out + o)];
      }
    }
  }
  return cross;
}

/// Keeps what `stays` says; more tokens than features, so that no λ is needed.
template <class Stays>
Site make_site(int64_t d, int64_t d_out, uint64_t seed, const Stays& stays) {
  Site s{};
  s.d = d;
  s.d_out = d_out;
  s.tokens = 4 * d + 3;
  for (int64_t i = 0; i < d; ++i) {
    if (stays(i)) s.kept.push_back(i);
  }
  s.x = random_values(s.tokens * d, seed);
  s.held_x = random_values(s.tokens * d, seed + 1);
  s.weight = random_values(d_out * d, seed + 2);
  s.target = random_values(s.tokens * d_out, seed + 3);
  s.held_target = random_values(s.tokens * d_out, seed + 4);
  s.gram = gram_of(s.x, s.tokens, d);
  s.holdout = gram_of(s.held_x, s.tokens, d);
  s.cross = cross_of(s, s.x, s.target);
  s.holdout_cross = cross_of(s, s.held_x, s.held_target);
  return s;
}

Reconstruct job_of(Site& s, bool dense, bool held_out, bool errors_only) {
  const auto ladder = static_cast<int64_t>(kDamps.size());
  s.gram_view = {s.gram.data(), s.d};
  s.holdout_view = {s.holdout.data(), s.d};
  s.cross_view = {s.cross.data(), s.d_out};
  s.holdout_cross_view = {s.holdout_cross.data(), s.d_out};
  s.out = zeros(errors_only ? 0 : ladder * s.d_out * s.n());
  s.error = zeros(ladder);
  s.held_out = zeros(held_out ? ladder : 0);
  s.info = zeros(2 * ladder);
  Reconstruct job{};
  job.d_out = s.d_out;
  job.d = s.d;
  job.n = s.n();
  job.ladder = ladder;
  job.weight = {s.weight.data(), s.d};
  job.gram = s.gram_view;
  job.kept = s.kept.data();
  job.damps = kDamps.data();
  job.holdout = held_out ? &s.holdout_view : nullptr;
  job.cross = dense ? &s.cross_view : nullptr;
  job.holdout_cross = dense && held_out ? &s.holdout_cross_view : nullptr;
  job.weight_out = errors_only ? nullptr : s.out.data();
  job.error_out = s.error.data();
  job.holdout_out = s.held_out.data();
  job.info_out = s.info.data();
  return job;
}

/// Σ |V x − y*|² less Σ |y*|² with `target`, else Σ |ΔW x|², of the weights of every λ.
Values errors(const Site& s, const Values& out, const Values& x, const Values* target) {
  Values errors = zeros(static_cast<int64_t>(kDamps.size()));
  for (size_t l = 0; l < errors.size(); ++l) {
    for (int64_t t = 0; t < s.tokens; ++t) {
      for (int64_t o = 0; o < s.d_out; ++o) {
        const double* w = out.data() + (static_cast<int64_t>(l) * s.d_out + o) * s.n();
        double value = 0, want = 0;
        for (int64_t k = 0; k < s.n(); ++k) value += w[k] * x[at(t * s.d + s.kept[at(k)])];
        if (target != nullptr) {
          want = (*target)[at(t * s.d_out + o)];
        } else {
          for (int64_t i = 0; i < s.d; ++i) want += s.weight[at(o * s.d + i)] * x[at(t * s.d + i)];
        }
        errors[l] += (value - want) * (value - want) - (target != nullptr ? want * want : 0);
      }
    }
  }
  return errors;
}

void check_site(Site site, bool dense, const Pool& pool) {
  const std::string name = "reconstruct, d " + std::to_string(site.d) + ", outputs " +
                           std::to_string(site.d_out) + (dense ? ", dense targets" : "");
  Site only = site, bare = site;
  const Reconstruct full_job = job_of(site, dense, true, false);
  const Reconstruct only_job = job_of(only, dense, true, true);
  const Reconstruct bare_job = job_of(bare, dense, false, false);
  for (const Reconstruct* job : {&full_job, &only_job, &bare_job}) {
    reconstruct(job, 1, *kernels().f64, pool);
  }
  const Values want = errors(site, site.out, site.x, dense ? &site.target : nullptr);
  const Values held = errors(site, site.out, site.held_x, dense ? &site.held_target : nullptr);
  expect_near(site.error, want, 1e-10, name + ": error");
  expect_near(site.held_out, held, 1e-10, name + ": held-out error");
  expect_near(only.error, want, 1e-9, name + ", errors only: error");
  expect_near(only.held_out, held, 1e-9, name + ", errors only: held-out error");
  expect_near(bare.out, site.out, 1e-10, name + ", no held-out sums: weights");
  expect_near(bare.error, want, 1e-10, name + ", no held-out sums: error");
  for (size_t l = 0; l < kDamps.size(); ++l) expect(site.info[2 * l] == 0, name + ": code");
  // No λ leaves less error on the calibration tokens than λ = 0, and dropping leaves the most.
  for (size_t l = 1; l < kDamps.size(); ++l) {
    expect(site.error[l] >= site.error[l - 1] - 1e-9 * std::fabs(want.back()), name + ": order");
  }
}

/// Every site of a batch gets what a call of its own gives it, bit for bit.
void check_batch(int64_t d, int64_t d_out, bool dense, const Pool& pool) {
  std::vector<Site> sites;
  for (const int64_t skip : {0, 1, 2}) {
    sites.push_back(
        make_site(3 * d, d_out, 40 + 10 * at(skip), [&](int64_t i) { return i % 3 != skip; }));
  }
  std::vector<Site> alone = sites;
  std::vector<Reconstruct> jobs;
  for (Site& site : sites) jobs.push_back(job_of(site, dense, true, false));
  reconstruct(jobs.data(), static_cast<int64_t>(jobs.size()), *kernels().f64, pool);
  for (size_t i = 0; i < sites.size(); ++i) {
    const Reconstruct job = job_of(alone[i], dense, true, false);
    reconstruct(&job, 1, *kernels().f64, Pool{});
    const std::string name = "site " + std::to_string(i) + " of a batch";
    expect_near(sites[i].out, alone[i].out, 0, name + ": weights");
    expect_near(sites[i].error, alone[i].error, 0, name + ": error");
    expect_near(sites[i].held_out, alone[i].held_out, 0, name + ": held-out error");
    expect_near(sites[i].info, alone[i].info, 0, name + ": info");
  }
}

/// A feature twice, and no λ: the order of the minor is told, and nothing passes for a result.
void check_singular(const Pool& pool) {
  Site site = make_site(9, 4, 70, [](int64_t i) { return i != 4; });
  for (int64_t t = 0; t < site.tokens; ++t) site.x[at(t * 9 + 2)] = 0;
  site.gram = gram_of(site.x, site.tokens, 9);
  const Reconstruct job = job_of(site, false, true, false);
  reconstruct(&job, 1, *kernels().f64, pool);
  expect(site.info[0] == 3 && std::isnan(site.info[1]), "reconstruct, singular: info");
  expect(std::isnan(site.error[0]) && std::isnan(site.held_out[0]),
         "reconstruct, singular: errors");
  for (int64_t i = 0; i < site.d_out * site.n(); ++i) {
    expect(std::isnan(site.out[at(i)]), "reconstruct, singular: weights");
  }
  expect(site.info[2] == 0 && site.error[1] >= 0, "reconstruct, singular: the λ after it");
}

/// Sites go side by side only where that keeps no thread idle that a site alone would use.
void check_side_by_side() {
  struct Case {
    int64_t sites, n, threads;
    bool want;
  };
  const Case cases[] = {
      {1, 64, 8, false},     // nothing beside it
      {2, 64, 2, true},      // small ones, as many as threads
      {2, 64, 32, true},     // a small one keeps one thread busy, wherever it runs
      {2, 1024, 2, true},    // two threads, two sites
      {2, 1024, 8, false},   // two threads side by side, four inside
      {2, 2048, 32, false},  // two side by side, eight inside
      {8, 2048, 8, true},    // as many as threads
      {9, 2048, 8, false},   // seven threads would wait for the ninth
      {16, 4096, 8, false},  // each has work for all
  };
  for (const Case& one : cases) {
    expect(side_by_side(one.sites, one.n, one.threads) == one.want,
           "side by side: " + std::to_string(one.sites) + " sites of " + std::to_string(one.n) +
               " on " + std::to_string(one.threads) + " threads");
  }
}

}  // namespace

void test_reconstruct(const Pool& pool) {
  check_side_by_side();
  const auto two_thirds = [](int64_t i) { return i % 3 != 1; };
  for (const bool dense : {false, true}) {
    for (const int64_t d : {2, 9, 65, 150}) {
      check_site(make_site(d, 1, 5, two_thirds), dense, pool);
      check_site(make_site(d, 80, 6, two_thirds), dense, pool);
    }
    Site blind = make_site(40, 30, 9, two_thirds);
    for (int64_t o = 0; o < blind.d_out; ++o) blind.weight[at(o * 40 + 1)] = 0;
    check_site(blind, dense, pool);  // a removed feature that no output reads
    check_site(make_site(40, 7, 7, [](int64_t) { return true; }), dense, pool);
    check_site(make_site(40, 7, 8, [](int64_t) { return false; }), dense, pool);
    check_batch(11, 5, dense, pool);
    check_batch(33, 50, dense, pool);
  }
  check_singular(pool);
  reconstruct(nullptr, 0, *kernels().f64, pool);
}

}  // namespace liar::native
