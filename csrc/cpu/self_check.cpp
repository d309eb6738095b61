#include "self_check.h"

#include <algorithm>
#include <vector>

#include "gram.h"

namespace liar {
namespace {

constexpr int64_t kTokens = 301, kFeatures = 75;  // ragged for every tile and every step
// −2, −1, 0, 1, 2 by their bits.
constexpr uint16_t kHalves[] = {0xc000, 0xbc00, 0, 0x3c00, 0x4000};
constexpr uint16_t kBrains[] = {0xc000, 0xbf80, 0, 0x3f80, 0x4000};

size_t at(int64_t i) { return static_cast<size_t>(i); }

struct Problem {
  std::vector<int> digit = std::vector<int>(at(kTokens * kFeatures));  // 0 to 4: a value and 2
  std::vector<int> gram = std::vector<int>(at(kFeatures * kFeatures));
  std::vector<int> total = std::vector<int>(at(kFeatures));

  Problem() {
    uint32_t state = 1;
    for (int& each : digit) {
      state = state * 1664525 + 1013904223;
      each = static_cast<int>((state >> 16) % 5);
    }
    for (int64_t t = 0; t < kTokens; ++t) {
      const int* row = &digit[at(t * kFeatures)];
      for (int64_t i = 0; i < kFeatures; ++i) {
        total[at(i)] += row[i] - 2;
        for (int64_t j = 0; j <= i; ++j) gram[at(i * kFeatures + j)] += (row[i] - 2) * (row[j] - 2);
      }
    }
  }
};

template <class Value, class Make>
bool exact(const KernelSet& set, DType dtype, const Problem& problem, Make make) {
  std::vector<Value> x(problem.digit.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = make(problem.digit[i]);
  std::vector<double> gram(problem.gram.size()), total(problem.total.size()), count(2);
  GramUpdate update{};
  update.gram = gram.data();
  update.gram_row = kFeatures;
  update.total = total.data();
  update.wide = true;
  update.count = count.data();
  update.x = {dtype, x.data(), kTokens, kFeatures, kFeatures, 1};
  gram_update(update, set, Pool{});
  return std::equal(gram.begin(), gram.end(), problem.gram.begin()) &&
         std::equal(total.begin(), total.end(), problem.total.begin()) && count[0] == kTokens &&
         count[1] == 0;
}

}  // namespace

bool is_right(const KernelSet& set) {
  const Problem problem;
  // Bfloat16 last, whose steps have most room behind them, when memory is no longer fresh.
  return exact<double>(set, DType::kFloat64, problem, [](int k) { return k - 2.0; }) &&
         exact<float>(set, DType::kFloat32, problem, [](int k) { return k - 2.0F; }) &&
         exact<uint16_t>(set, DType::kFloat16, problem, [](int k) { return kHalves[k]; }) &&
         exact<uint16_t>(set, DType::kBFloat16, problem, [](int k) { return kBrains[k]; });
}

}  // namespace liar
