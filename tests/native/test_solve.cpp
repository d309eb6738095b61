// Cholesky factors, their solves, and inverses, on sizes around register tiles, strips and panels.
#include <limits>
#include <string>
#include <utility>

#include "check.h"
#include "cpu/cholesky.h"
#include "cpu/dense.h"
#include "cpu/sweep.h"

namespace liar::native {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// XᵀX + 10 n I of random X; NaN on one side of the diagonal.
Values positive_definite(int64_t n, bool upper) {
  Values gram = gram_of(random_values(n * n, 3), n, n), a(at(n * n), kNan);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const double value = gram[at(i * n + j)] + (i == j ? 10.0 * static_cast<double>(n) : 0);
      a[at(upper ? j * n + i : i * n + j)] = value;
    }
  }
  return a;
}

/// A symmetric matrix (n, n) from one triangle, times y (n, columns).
Values symmetric_product(const Values& a, bool upper, const Values& y, int64_t n, int64_t columns) {
  Values product = zeros(n * columns);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < n; ++k) {
      const double value = a[at((k >= i) == upper ? i * n + k : k * n + i)];
      for (int64_t c = 0; c < columns; ++c) {
        product[at(i * columns + c)] += value * y[at(k * columns + c)];
      }
    }
  }
  return product;
}

void check_solve(int64_t n, int64_t columns, const Pool& pool) {
  const PanelKernel& kernel = *kernels().f64;
  const Values a = positive_definite(n, true), rhs = random_values(n * columns, 4);
  const std::string name = "Cholesky of " + std::to_string(n);
  const Cholesky factor(TrianglePanels(a.data(), n, n, kernel), pool);
  expect(factor.code() == 0, name);
  Panels solution(n, columns, kernel);
  for (int64_t i = 0; i < n; ++i) solution.read_step(i, &rhs[at(i * columns)]);
  factor.solve(solution, pool);
  Values y = zeros(n * columns);
  for (int64_t i = 0; i < n; ++i) solution.write_step(i, &y[at(i * columns)]);
  expect_near(symmetric_product(a, true, y, n, columns), rhs, 1e-10, name + ": solve");
}

void check_indefinite(int64_t n, int64_t bad, const Pool& pool) {
  TrianglePanels a(n, *kernels().f64);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < i; ++k) a.at(k, i) = 0;
    a.at(i, i) = i == bad ? -1 : 4;
  }
  const std::string name =
      "indefinite from row " + std::to_string(bad) + " of " + std::to_string(n);
  expect(Cholesky(std::move(a), pool).code() == bad + 1, "Cholesky, " + name);

  Values square = zeros(n * n);
  for (int64_t i = 0; i < n; ++i) square[at(i * (n + 1))] = i == bad ? -1 : 4;
  double condition = 0;
  expect(invert_lower(square.data(), n, &condition, *kernels().f64, pool) == bad + 1,
         "invert_lower, " + name);
}

/// A A⁻¹ = I, and the condition is that of the plain Cholesky factor. Of n = 0 there is none.
void check_inverse(int64_t n, const Pool& pool) {
  const std::string name = "invert_lower of " + std::to_string(n);
  Values a = positive_definite(n, false), inverse = a, unit = zeros(n * n);
  double condition = 0;
  expect(invert_lower(inverse.data(), n, &condition, *kernels().f64, pool) == 0, name);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i + 1; j < n; ++j) {
      expect(std::isnan(inverse[at(i * n + j)]), name + ": writes above the diagonal");
      inverse[at(i * n + j)] = inverse[at(j * n + i)];
    }
    unit[at(i * (n + 1))] = 1;
  }
  expect_near(symmetric_product(a, false, inverse, n, n), unit, 1e-10, name);
  double least = std::numeric_limits<double>::infinity(), largest = 0;
  for (int64_t j = 0; j < n; ++j) {  // L over the lower triangle of a
    for (int64_t i = j; i < n; ++i) {
      for (int64_t k = 0; k < j; ++k) a[at(i * n + j)] -= a[at(i * n + k)] * a[at(j * n + k)];
      a[at(i * n + j)] /= i == j ? std::sqrt(a[at(j * n + j)]) : a[at(j * n + j)];
    }
    least = std::min(least, a[at(j * n + j)]);
    largest = std::max(largest, a[at(j * n + j)]);
  }
  if (n > 0) expect_near({condition}, {std::pow(largest / least, 2)}, 1e-10, name + ": condition");
}

}  // namespace

void test_solve(const Pool& pool) {
  for (const int64_t n : {1, 7, 16, 17, 100, 530}) check_solve(n, n % 7 + 1, pool);
  for (const int64_t n : {23, 24, 25, 95, 96, 97, 193, 385}) check_solve(n, n % 3 + 23, pool);
  check_solve(70, 500, pool);
}

void test_sweep(const Pool& pool) {
  for (const int64_t n : {0, 1, 7, 96, 127, 128, 129, 300}) check_inverse(n, pool);
  for (const int64_t n : {1, 8, 25, 200}) {
    for (int64_t bad = 0; bad < n; bad += n / 9 + 1) check_indefinite(n, bad, pool);
  }
}

}  // namespace liar::native
