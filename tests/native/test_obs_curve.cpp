// obs_curve against solving and downdating the weights themselves, unit by unit.
#include <limits>
#include <string>

#include "check.h"
#include "cpu/obs_curve.h"
#include "cpu/panel_kernel.h"

namespace liar::native {
namespace {

constexpr double kDamp = 1e-3;

struct Curve {
  std::vector<int64_t> order;
  Values error;
};

struct Shape {
  int64_t d, d_out, width, groups, at_least;

  int64_t units() const { return d / width; }
  int64_t removed() const { return units() - at_least; }
  std::string name() const {
    return "obs_curve, d " + std::to_string(d) + ", width " + std::to_string(width) + ", groups " +
           std::to_string(groups);
  }
};

/// a (n, n) ← a⁻¹ by Gauss and Jordan; a is symmetric positive definite.
void invert(Values& a, int64_t n) {
  for (int64_t p = 0; p < n; ++p) {
    const double pivot = a[at(p * n + p)];
    a[at(p * n + p)] = 1;
    for (int64_t j = 0; j < n; ++j) a[at(p * n + j)] /= pivot;
    for (int64_t i = 0; i < n; ++i) {
      if (i == p) continue;
      const double factor = a[at(i * n + p)];
      a[at(i * n + p)] = 0;
      for (int64_t j = 0; j < n; ++j) a[at(i * n + j)] -= factor * a[at(p * n + j)];
    }
  }
}

/// S⁻¹ of the unit's block of H.
Values inverse_block(const Values& h, const Shape& s, int64_t unit) {
  Values block = zeros(s.width * s.width);
  for (int64_t i = 0; i < s.width; ++i) {
    for (int64_t j = 0; j < s.width; ++j) {
      block[at(i * s.width + j)] = h[at((unit * s.width + i) * s.d + unit * s.width + j)];
    }
  }
  invert(block, s.width);
  return block;
}

/// tr(W_u S⁻¹ W_uᵀ)
double cost_of(const Values& w, const Values& block, const Shape& s, int64_t unit) {
  double cost = 0;
  for (int64_t o = 0; o < s.d_out; ++o) {
    const double* row = &w[at(o * s.d + unit * s.width)];
    for (int64_t i = 0; i < s.width; ++i) {
      for (int64_t j = 0; j < s.width; ++j) cost += row[i] * block[at(i * s.width + j)] * row[j];
    }
  }
  return cost;
}

/// W ← W − W_u S⁻¹ H_u:, H ← H − H_:u S⁻¹ H_u:
void eliminate(Values& w, Values& h, const Values& block, const Shape& s, int64_t unit) {
  const int64_t first = unit * s.width;
  Values step = zeros(s.width * s.d);  // S⁻¹ H_u:
  for (int64_t i = 0; i < s.width; ++i) {
    for (int64_t k = 0; k < s.width; ++k) {
      for (int64_t j = 0; j < s.d; ++j) {
        step[at(i * s.d + j)] += block[at(i * s.width + k)] * h[at((first + k) * s.d + j)];
      }
    }
  }
  const auto downdate = [&](double* row) {
    Values scale(row + first, row + first + s.width);
    for (int64_t k = 0; k < s.width; ++k) {
      for (int64_t j = 0; j < s.d; ++j) row[j] -= scale[at(k)] * step[at(k * s.d + j)];
    }
  };
  for (int64_t o = 0; o < s.d_out; ++o) downdate(&w[at(o * s.d)]);
  for (int64_t i = 0; i < s.d; ++i) downdate(&h[at(i * s.d)]);
}

Curve plain_curve(Values w, const Values& gram, const Shape& s) {
  Values h = zeros(s.d * s.d);
  double mean = 0;
  for (int64_t i = 0; i < s.d; ++i) mean += gram[at(i * (s.d + 1))] / static_cast<double>(s.d);
  for (int64_t i = 0; i < s.d; ++i) {
    for (int64_t j = 0; j < s.d; ++j)
      h[at(i * s.d + j)] = gram[at(std::max(i, j) * s.d + std::min(i, j))];
    if (h[at(i * (s.d + 1))] == 0) {
      for (int64_t o = 0; o < s.d_out; ++o) w[at(o * s.d + i)] = 0;
    }
    h[at(i * (s.d + 1))] += kDamp * mean;
  }
  invert(h, s.d);
  Curve curve{{}, {0}};
  std::vector<bool> gone(at(s.units()));
  for (int64_t k = 0; k < s.removed(); ++k) {
    std::vector<bool> lost(at(s.groups));
    for (int64_t past = k / s.groups * s.groups; past < k; ++past)
      lost[at(curve.order[at(past)] / (s.units() / s.groups))] = true;
    int64_t best = -1;
    double least = std::numeric_limits<double>::infinity();
    for (int64_t u = 0; u < s.units(); ++u) {
      if (gone[at(u)] || lost[at(u / (s.units() / s.groups))]) continue;
      const double cost = cost_of(w, inverse_block(h, s, u), s, u);
      if (cost < least) {
        best = u;
        least = cost;
      }
    }
    eliminate(w, h, inverse_block(h, s, best), s, best);
    gone[at(best)] = true;
    curve.order.push_back(best);
    curve.error.push_back(curve.error.back() + least);
  }
  return curve;
}

struct Result {
  Curve curve;
  Values info;
};

Result run(Values weight, Values gram, const Shape& s, double damp, const Pool& pool) {
  Result result{{std::vector<int64_t>(at(s.removed())), zeros(s.removed() + 1)}, zeros(2)};
  Values energy(gram.size(), std::numeric_limits<double>::quiet_NaN());
  obs_curve(
      {s.d_out, s.d, s.width, s.groups, s.at_least, damp, weight.data(), gram.data(), energy.data(),
       result.curve.order.data(), result.curve.error.data(), result.info.data()},
      *kernels().f64, pool);
  return result;
}

/// Tokens of which feature 3, where there is one, is dead.
Values tokens_of(int64_t d) {
  Values x = random_values((2 * d + 5) * d, 11);
  for (int64_t t = 0; d > 4 && t < 2 * d + 5; ++t) x[at(t * d + 3)] = 0;
  return x;
}

void check(const Shape& s, const Pool& pool) {
  const Values gram = gram_of(tokens_of(s.d), 2 * s.d + 5, s.d),
               weight = random_values(s.d_out * s.d, 12);
  const Result got = run(weight, gram, s, kDamp, pool);
  const Curve want = plain_curve(weight, gram, s);
  expect(got.info[0] == 0 && got.info[1] >= 1, s.name() + ": info");
  expect(got.curve.order == want.order, s.name() + ": order");
  expect_near(got.curve.error, want.error, 1e-9, s.name() + ": error");
}

void expect_failed(const Result& got, double code, const std::string& what) {
  expect(got.info[0] == code && std::isnan(got.info[1]), "obs_curve, " + what + ": info");
  for (const double error : got.curve.error) {
    expect(std::isnan(error), "obs_curve, " + what + ": errors");
  }
  for (size_t k = 0; k < got.curve.order.size(); ++k) {
    expect(got.curve.order[k] == static_cast<int64_t>(k), "obs_curve, " + what + ": order");
  }
}

void check_failures(const Pool& pool) {
  const Shape narrow{70, 5, 1, 1, 0}, wide{70, 5, 7, 2, 0};
  const Values zero = zeros(70 * 70), gram = gram_of(tokens_of(70), 145, 70);
  Values weight = random_values(5 * 70, 13), spoilt = gram;
  for (const Shape& s : {narrow, wide}) {
    expect_failed(run(weight, zero, s, 0, pool), 1, "no tokens");
    spoilt[at(40 * 70 + 40)] = -1e9;
    const Result got = run(weight, spoilt, s, 0, pool);
    expect(got.info[0] > 0 && got.info[0] <= 70, "obs_curve, indefinite: the order of a minor");
    expect_failed(got, got.info[0], "indefinite");
  }
  weight[69] = std::numeric_limits<double>::quiet_NaN();
  for (const Shape& s : {narrow, wide}) {
    const Result got = run(weight, gram, s, kDamp, pool);
    expect(got.info[0] > 0, "obs_curve, a weight that is no number: code");
    expect_failed(got, got.info[0], "a weight that is no number");
  }
}

}  // namespace

void test_obs_curve(const Pool& pool) {
  for (const int64_t d : {1, 2, 7, 63, 64, 65}) check({d, 3, 1, 1, 0}, pool);
  check({130, 17, 1, 1, 0}, pool);  // panels of L and R end at 64 rows
  check({130, 40, 1, 10, 20}, pool);
  check({140, 9, 20, 1, 1}, pool);
  check({132, 5, 66, 2, 0}, pool);
  check({96, 1, 2, 4, 4}, pool);
  check({24, 3, 24, 1, 0}, pool);
  check({24, 0, 4, 2, 0}, pool);  // no outputs: the lower index goes
  check({24, 3, 4, 1, 6}, pool);  // nothing goes
  check_failures(pool);
}

}  // namespace liar::native
