// gram_update: every type of rows and of sums, with and without weights, y, and strides.
#include <cstring>
#include <string>

#include "check.h"
#include "cpu/gram.h"
#include "cpu/self_check.h"

namespace liar::native {
namespace {

struct GramCase {
  DType dtype;
  int64_t tokens, d;
  int64_t cols;     // of y; 0: the Gram matrix of x
  bool weighted;    // weights 0, 1 and 2, in `weight_type`
  bool turned;      // x by columns
  bool wide;        // sums in float64
  int64_t padding;  // from the end of a row of the sums, and of y, to the next one
};

/// The 16 bits of a small integer, an infinity or a NaN.
uint16_t narrow(double value, DType dtype) {
  const auto single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof(bits));
  if (dtype == DType::kBFloat16) return static_cast<uint16_t>(bits >> 16);
  const uint32_t exponent = bits >> 23 & 0xff, sign = bits >> 16 & 0x8000;
  if (exponent == 0xff) return static_cast<uint16_t>(sign | 0x7e00);
  if (exponent == 0) return static_cast<uint16_t>(sign);
  return static_cast<uint16_t>(sign | (exponent - 112) << 10 | (bits >> 13 & 0x3ff));
}

/// The bytes of `values` as `dtype`.
std::vector<char> encode(const Values& values, DType dtype) {
  const size_t bytes = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  std::vector<char> data(values.size() * bytes);
  for (size_t i = 0; i < values.size(); ++i) {
    const auto single = static_cast<float>(values[i]);
    const uint16_t half = narrow(values[i], dtype);
    const void* source = dtype == DType::kFloat64   ? static_cast<const void*>(&values[i])
                         : dtype == DType::kFloat32 ? static_cast<const void*>(&single)
                                                    : static_cast<const void*>(&half);
    std::memcpy(data.data() + i * bytes, source, bytes);
  }
  return data;
}

/// What encode() wrote, for the sums: float32 or float64.
Values decode(const std::vector<char>& data, bool wide) {
  Values values = zeros(static_cast<int64_t>(data.size()) / (wide ? 8 : 4));
  for (size_t i = 0; i < values.size(); ++i) {
    float single;
    if (wide) {
      std::memcpy(&values[i], data.data() + i * 8, 8);
    } else {
      std::memcpy(&single, data.data() + i * 4, 4);
      values[i] = single;
    }
  }
  return values;
}

void check(const GramCase& c, const Pool& pool) {
  const int64_t width = c.cols > 0 ? c.cols : c.d, row = width + c.padding, bad = c.tokens / 2;
  Values x = random_values(c.tokens * c.d, 1), y = random_values(c.tokens * row, 2);
  const auto x_at = [&](int64_t t, int64_t i) {
    return at(c.turned ? i * c.tokens + t : t * c.d + i);
  };
  const bool bad_x = c.tokens > 2 && c.d > 0;
  if (bad_x) x[x_at(bad, 0)] = NAN;
  if (c.cols > 0 && c.tokens > 5) y[at((bad + 1) * row)] = INFINITY;
  std::vector<float> weight(at(c.tokens));
  for (int64_t t = 0; t < c.tokens; ++t) weight[at(t)] = static_cast<float>(t % 3);

  const DType sums = c.wide ? DType::kFloat64 : DType::kFloat32;
  const int64_t size = c.d == 0 ? 0 : (c.d - 1) * row + width;
  auto gram = encode(zeros(size), sums), total = encode(zeros(c.d), sums);
  Values count = zeros(2), want_gram = zeros(size), want_total = zeros(c.d), want_count = zeros(2);
  const auto x_data = encode(x, c.dtype), y_data = encode(y, c.dtype);
  const MatrixView y_view{c.dtype, y_data.data(), c.tokens, c.cols, row, 1};
  GramUpdate update{};
  update.gram = gram.data();
  update.gram_row = row;
  update.total = total.data();
  update.wide = c.wide;
  update.count = count.data();
  update.x = {c.dtype, x_data.data(), c.tokens, c.d, c.turned ? 1 : c.d, c.turned ? c.tokens : 1};
  update.y = c.cols > 0 ? &y_view : nullptr;
  update.weight_type = c.weighted ? WeightType::kFloat32 : WeightType::kNone;
  update.weight = weight.data();
  update.weight_stride = 1;
  gram_update(update, kernels(), pool);

  for (int64_t t = 0; t < c.tokens; ++t) {
    const double w = c.weighted ? weight[at(t)] : 1;
    if (w == 0) continue;
    const bool bad_y = c.cols > 0 && c.tokens > 5 && t == bad + 1;
    if ((bad_x && t == bad) || bad_y) {
      want_count[1] += 1;
      continue;
    }
    want_count[0] += w;
    for (int64_t i = 0; i < c.d; ++i) {
      const double left = w * x[x_at(t, i)];
      want_total[at(i)] += left;
      for (int64_t j = 0; j < (c.cols > 0 ? c.cols : i + 1); ++j) {
        want_gram[at(i * row + j)] += left * (c.cols > 0 ? y[at(t * row + j)] : x[x_at(t, j)]);
      }
    }
  }
  const std::string name = "gram_update, " + std::to_string(c.tokens) + " tokens, d " +
                           std::to_string(c.d) + ", type " +
                           std::to_string(static_cast<int>(c.dtype));
  expect_near(decode(gram, c.wide), want_gram, 0, name + ": gram");
  expect_near(decode(total, c.wide), want_total, 0, name + ": total");
  expect_near(count, want_count, 0, name + ": count");
}

/// A bool and a float64 weight of any stride; what is negative or not finite is counted.
void check_weights(const Pool& pool) {
  const Values x = random_values(6 * 3, 3);
  const bool mask[] = {true, false, false, false, true, true, true, false, true, false, false};
  const double wide[] = {1, 9, 0, 9, -1, 9, NAN, 9, 2, 9, INFINITY};
  for (const bool is_bool : {true, false}) {
    Values gram = zeros(9), total = zeros(3), count = zeros(2), want = zeros(3);
    GramUpdate update{};
    update.gram = gram.data();
    update.gram_row = 3;
    update.total = total.data();
    update.wide = true;
    update.count = count.data();
    update.x = {DType::kFloat64, x.data(), 6, 3, 3, 1};
    update.weight_type = is_bool ? WeightType::kBool : WeightType::kFloat64;
    update.weight = is_bool ? static_cast<const void*>(mask) : wide;
    update.weight_stride = 2;
    gram_update(update, kernels(), pool);
    double sum = 0;
    for (int64_t t = 0; t < 6; ++t) {
      const double w = is_bool ? mask[2 * t] : wide[2 * t];
      if (!(w > 0) || std::isinf(w)) continue;
      sum += w;
      for (int64_t i = 0; i < 3; ++i) want[at(i)] += w * x[at(t * 3 + i)];
    }
    expect_near(total, want, 0, "gram_update with strided weights: total");
    expect_near(count, {sum, is_bool ? 0.0 : 3.0}, 0, "gram_update with strided weights: count");
  }
}

/// The self-check that decides which set is taken, on this one and with each kernel at fault.
void check_self_check() {
  expect(is_right(kernels()), "the self-check passes");
  PanelKernel short_f32 = kPortableF32, short_f64 = kPortableF64, loose = kPortableF32;
  short_f32.multiply_f64 = [](const PanelProduct& p) {
    PanelProduct less = p;
    --less.steps;
    kPortableF32.multiply_f64(less);
  };
  short_f64.multiply_f64 = [](const PanelProduct& p) {
    PanelProduct less = p;
    --less.i1;
    kPortableF64.multiply_f64(less);
  };
  loose.pack = [](const PackRows& p) {
    PackRows no_sums = p;
    no_sums.sums = nullptr;
    return kPortableF32.pack(no_sums);
  };
  const KernelSet wrong[] = {{"f32", &short_f32, &kPortableF64, nullptr},
                             {"f64", &kPortableF32, &short_f64, nullptr},
                             {"bf16", &kPortableF32, &kPortableF64, &short_f32},
                             {"sums", &loose, &kPortableF64, nullptr}};
  for (const KernelSet& set : wrong) {
    expect(!is_right(set), std::string("the self-check finds the fault of ") + set.name);
  }
}

}  // namespace

void test_gram(const Pool& pool) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
    for (const int64_t tokens : {0, 1, 7, 129, 1100}) {
      for (const int64_t d : {0, 1, 7, 49, 129}) {
        check({dtype, tokens, d, 0, tokens % 2 == 0, d == 7, d != 49, d % 5}, pool);
        check({dtype, tokens, d, 1 + d / 2, d != 49, d == 129, d != 7, d % 3}, pool);
      }
    }
    check({dtype, 2100, 49, 0, false, false, true, 0}, pool);  // more than a chunk
    check({dtype, 40, 600, 0, false, false, true, 0}, pool);   // in strips and in blocks
    check({dtype, 40, 300, 520, true, false, false, 1}, pool);
  }
  check_weights(pool);
  check_self_check();
}

}  // namespace liar::native
