// The CPU kernels without torch, meant to run under sanitizers: every result against plain loops,
// on buffers of exactly the needed size so that a stray access is seen.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/cholesky.h"
#include "cpu/dense.h"
#include "cpu/gram.h"
#include "cpu/reconstruct.h"
#include "cpu/scores.h"

namespace {

using liar::DType;
using liar::MatrixView;
using liar::Pool;
using Values = std::vector<double>;

int failures = 0;

void expect_near(const Values& got, const Values& want, double tolerance, const char* what) {
  double scale = 1, worst = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    scale = std::max(scale, std::fabs(want[i]));
    worst = std::isnan(got[i]) ? std::numeric_limits<double>::infinity()
                               : std::max(worst, std::fabs(got[i] - want[i]));
  }
  if (worst <= tolerance * scale) return;
  std::printf("FAILED %s: off by %g of %g\n", what, worst, scale);
  ++failures;
}

Values random_values(int64_t count, uint64_t seed) {
  std::mt19937_64 engine(seed);
  std::uniform_int_distribution<int> small(-8, 8);  // exact in every type, and so are their sums
  Values values(static_cast<size_t>(count));
  for (double& value : values) value = small(engine);
  return values;
}

void run_threads(int64_t threads, void (*worker)(void*), void* context) {
  std::vector<std::thread> crew;
  for (int64_t i = 0; i < threads; ++i) crew.emplace_back(worker, context);
  for (std::thread& one : crew) one.join();
}

/// The bytes of `values` as `dtype`; exact for small integers.
std::vector<char> encode(const Values& values, DType dtype) {
  const size_t bytes = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  std::vector<char> data(values.size() * bytes);
  for (size_t i = 0; i < values.size(); ++i) {
    const auto single = static_cast<float>(values[i]);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof(bits));
    uint16_t narrow = static_cast<uint16_t>(bits >> 16);
    if (dtype == DType::kFloat16) {
      const uint32_t exponent = bits >> 23 & 0xff;
      narrow = static_cast<uint16_t>(bits >> 16 & 0x8000);
      if (exponent == 0xff) {
        narrow = static_cast<uint16_t>(narrow | 0x7e00);
      } else if (exponent != 0) {
        narrow = static_cast<uint16_t>(narrow | (exponent - 112) << 10 | (bits >> 13 & 0x3ff));
      }
    }
    const void* source = dtype == DType::kFloat64   ? static_cast<const void*>(&values[i])
                         : dtype == DType::kFloat32 ? static_cast<const void*>(&single)
                                                    : static_cast<const void*>(&narrow);
    std::memcpy(data.data() + i * bytes, source, bytes);
  }
  return data;
}

void test_gram(DType dtype, int64_t tokens, int64_t d, int64_t cols, bool weighted, bool turned,
               const Pool& pool) {
  Values x = random_values(tokens * d, 1), y = random_values(tokens * cols, 2);
  const int64_t bad = tokens / 2;
  if (tokens > 2) x[static_cast<size_t>(turned ? bad : bad * d)] = NAN;
  const auto x_data = encode(x, dtype), y_data = encode(y, dtype);
  std::vector<float> weight(static_cast<size_t>(tokens));
  for (int64_t t = 0; t < tokens; ++t) weight[static_cast<size_t>(t)] = static_cast<float>(t % 3);
  const int64_t width = cols > 0 ? cols : d;
  Values gram(static_cast<size_t>(d * width), 0.0), total(static_cast<size_t>(d), 0.0);
  Values count(2, 0.0), want_gram = gram, want_total = total, want_count = count;
  const MatrixView y_view{dtype, y_data.data(), tokens, cols, cols, 1};
  liar::GramUpdate update{};
  update.gram = gram.data();
  update.gram_row = width;
  update.total = total.data();
  update.wide = true;
  update.count = count.data();
  update.x = {dtype, x_data.data(), tokens, d, turned ? 1 : d, turned ? tokens : 1};
  update.y = cols > 0 ? &y_view : nullptr;
  update.weight_type = weighted ? liar::WeightType::kFloat32 : liar::WeightType::kNone;
  update.weight = weight.data();
  update.weight_stride = 1;
  liar::gram_update(update, liar::kernels(), pool);
  for (int64_t t = 0; t < tokens; ++t) {
    const double w = weighted ? weight[static_cast<size_t>(t)] : 1;
    if (w == 0) continue;
    if (tokens > 2 && t == bad) {
      want_count[1] += 1;
      continue;
    }
    want_count[0] += w;
    const auto at = [&](int64_t i) {
      return x[static_cast<size_t>(turned ? i * tokens + t : t * d + i)];
    };
    for (int64_t i = 0; i < d; ++i) {
      want_total[static_cast<size_t>(i)] += w * at(i);
      for (int64_t j = 0; j < (cols > 0 ? cols : i + 1); ++j) {
        const double right = cols > 0 ? y[static_cast<size_t>(t * cols + j)] : at(j);
        want_gram[static_cast<size_t>(i * width + j)] += w * at(i) * right;
      }
    }
  }
  expect_near(gram, want_gram, 0, "gram");
  expect_near(total, want_total, 0, "total");
  expect_near(count, want_count, 0, "count");
}

void test_solve(int64_t n, int64_t columns, const Pool& pool) {
  const auto& kernel = *liar::kernels().f64;
  const Values x = random_values(n * n, 3), rhs = random_values(n * columns, 4);
  Values a(static_cast<size_t>(n * n), 0.0);
  liar::add_product({{x.data(), n}, {x.data(), n}, n, n, n, 1, a.data(), n, liar::Triangle::kUpper},
                    kernel, pool);
  for (int64_t i = 0; i < n; ++i)
    a[static_cast<size_t>(i * n + i)] += 10.0 * static_cast<double>(n);
  Values y = rhs, back(rhs.size(), 0.0);
  const liar::Cholesky factor(liar::TrianglePanels(a.data(), n, n, kernel), pool);
  if (factor.code() != 0) ++failures;
  liar::Panels solution(n, columns, kernel);
  for (int64_t i = 0; i < n; ++i) solution.read_step(i, &rhs[static_cast<size_t>(i * columns)]);
  factor.solve(solution, pool);
  for (int64_t i = 0; i < n; ++i) solution.write_step(i, &y[static_cast<size_t>(i * columns)]);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < n; ++k) {
      const double value = a[static_cast<size_t>(k >= i ? i * n + k : k * n + i)];
      for (int64_t c = 0; c < columns; ++c) {
        back[static_cast<size_t>(i * columns + c)] +=
            value * y[static_cast<size_t>(k * columns + c)];
      }
    }
  }
  expect_near(back, rhs, 1e-10, "Cholesky::solve");
}

void test_indefinite(int64_t n, int64_t at, const Pool& pool) {
  liar::TrianglePanels a(n, *liar::kernels().f64);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < i; ++k) a.at(k, i) = 0;
    a.at(i, i) = i == at ? -1 : 4;
  }
  if (liar::Cholesky(std::move(a), pool).code() != at + 1) ++failures;
}

void test_reconstruct(int64_t d, int64_t d_out, const Pool& pool) {
  const Values x = random_values(4 * d * d, 5), weight = random_values(d_out * d, 6);
  Values gram(static_cast<size_t>(d * d), 0.0);
  for (int64_t t = 0; t < 4 * d; ++t) {
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        gram[static_cast<size_t>(i * d + j)] +=
            x[static_cast<size_t>(t * d + i)] * x[static_cast<size_t>(t * d + j)];
      }
    }
  }
  std::vector<int64_t> kept;
  for (int64_t i = 0; i < d; ++i) {
    if (i % 3 != 1) kept.push_back(i);
  }
  const auto n = static_cast<int64_t>(kept.size());
  const Values damps = {0, 1e-3, std::numeric_limits<double>::infinity()};
  const liar::Float64View gram_view{gram.data(), d};
  Values out(static_cast<size_t>(3 * d_out * n)), error(3), holdout(3), info(6), want(3, 0.0);
  liar::Reconstruct args{};
  args.d_out = d_out;
  args.d = d;
  args.n = n;
  args.ladder = 3;
  args.weight = {weight.data(), d};
  args.gram = gram_view;
  args.kept = kept.data();
  args.damps = damps.data();
  args.holdout = &gram_view;
  args.weight_out = out.data();
  args.error_out = error.data();
  args.holdout_out = holdout.data();
  args.info_out = info.data();
  liar::reconstruct(&args, 1, *liar::kernels().f64, pool);
  for (int64_t l = 0; l < 3; ++l) {
    for (int64_t t = 0; t < 4 * d; ++t) {
      for (int64_t o = 0; o < d_out; ++o) {
        double change = 0;
        for (int64_t i = 0; i < d; ++i)
          change -= weight[static_cast<size_t>(o * d + i)] * x[static_cast<size_t>(t * d + i)];
        for (int64_t k = 0; k < n; ++k) {
          change += out[static_cast<size_t>((l * d_out + o) * n + k)] *
                    x[static_cast<size_t>(t * d + kept[static_cast<size_t>(k)])];
        }
        want[static_cast<size_t>(l)] += change * change;
      }
    }
  }
  expect_near(error, want, 1e-10, "error");
  expect_near(holdout, want, 1e-10, "holdout_error");
}

void test_scores(int64_t d, int64_t width, const Pool& pool) {
  const int64_t d_out = 11, sequences = 3, tokens = 5, units = d / width;
  const Values weight = random_values(d_out * d, 7), gram = random_values(d * d, 8),
               x = random_values(sequences * tokens * d, 9),
               grad = random_values(sequences * tokens * d, 10);
  Values energy(static_cast<size_t>(units)), fisher(energy.size(), 1.0), want(energy.size(), 0.0),
      squares(energy.size(), 1.0);
  liar::unit_energy({d_out, d, width, weight.data(), d, gram.data(), d, energy.data()},
                    *liar::kernels().f64, pool);
  liar::fisher_update<double>({sequences, tokens, d, width, x.data(), tokens * d, d, grad.data(),
                               tokens * d, d, fisher.data()},
                              pool);
  for (int64_t u = 0; u < units; ++u) {
    const auto unit = static_cast<size_t>(u);
    for (int64_t i = u * width; i < (u + 1) * width; ++i) {
      for (int64_t j = u * width; j < (u + 1) * width; ++j) {
        const double g = gram[static_cast<size_t>(std::max(i, j) * d + std::min(i, j))];
        for (int64_t o = 0; o < d_out; ++o) {
          want[unit] +=
              weight[static_cast<size_t>(o * d + i)] * g * weight[static_cast<size_t>(o * d + j)];
        }
      }
    }
    for (int64_t s = 0; s < sequences; ++s) {
      double sum = 0;
      for (int64_t t = s * tokens; t < (s + 1) * tokens; ++t) {
        for (int64_t i = t * d + u * width; i < t * d + (u + 1) * width; ++i)
          sum += x[static_cast<size_t>(i)] * grad[static_cast<size_t>(i)];
      }
      squares[unit] += sum * sum;
    }
  }
  expect_near(energy, want, 1e-12, "unit_energy");
  expect_near(fisher, squares, 1e-12, "fisher_update_");
}

}  // namespace

int main() {
  try {
    std::printf("kernels: %s\n", liar::kernels().name);
  } catch (const std::runtime_error& error) {
    std::printf("skipped: %s\n", error.what());
    return 77;
  }
  const Pool alone{}, crew{3, &run_threads};
  for (const Pool& pool : {alone, crew}) {
    for (DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
      for (int64_t tokens : {0, 1, 7, 129, 1100}) {
        for (int64_t d : {1, 7, 49, 129}) {
          test_gram(dtype, tokens, d, 0, tokens % 2 == 0, d == 7, pool);
          test_gram(dtype, tokens, d, 1 + d / 2, d != 49, d == 129, pool);
        }
      }
    }
    for (int64_t n : {1, 7, 16, 17, 100, 530}) test_solve(n, n % 7 + 1, pool);
    for (int64_t n : {23, 24, 25, 95, 96, 97, 193, 385}) test_solve(n, n % 3 + 23, pool);
    test_solve(70, 500, pool);
    for (int64_t n : {1, 8, 25, 200}) {
      for (int64_t at = 0; at < n; at += n / 9 + 1) test_indefinite(n, at, pool);
    }
    for (int64_t width : {1, 2, 9, 65}) test_scores(width * 17, width, pool);
    test_scores(600, 1, pool);
    for (int64_t d : {2, 9, 65, 150}) {
      test_reconstruct(d, 1, pool);
      test_reconstruct(d, 80, pool);
    }
  }
  std::printf(failures == 0 ? "all right\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
