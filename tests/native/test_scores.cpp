// unit_energy and fisher_update on rows that are further apart than they are long.
#include <string>

#include "check.h"
#include "cpu/scores.h"

namespace liar::native {
namespace {

void check_energy(int64_t d_out, int64_t d, int64_t width, int64_t padding, const Pool& pool) {
  const int64_t row = d + padding, units = d / width;
  const Values weight = random_values(d_out * row, 7), gram = random_values(d * row, 8);
  Values energy = zeros(units), want = zeros(units);
  unit_energy({d_out, d, width, weight.data(), row, gram.data(), row, energy.data()},
              *kernels().f64, pool);
  for (int64_t u = 0; u < units; ++u) {
    for (int64_t i = u * width; i < (u + 1) * width; ++i) {
      for (int64_t j = u * width; j < (u + 1) * width; ++j) {
        const double g = gram[at(std::max(i, j) * row + std::min(i, j))];
        for (int64_t o = 0; o < d_out; ++o) {
          want[at(u)] += weight[at(o * row + i)] * g * weight[at(o * row + j)];
        }
      }
    }
  }
  expect_near(energy, want, 0, "unit_energy of width " + std::to_string(width));
}

template <class T>
void check_fisher(int64_t sequences, int64_t tokens, int64_t d, int64_t width, int64_t padding,
                  const Pool& pool) {
  const int64_t row = d + padding, sequence = tokens * row + padding, units = d / width;
  const Values x = random_values(sequences * sequence, 9),
               grad = random_values(sequences * sequence, 10);
  const std::vector<T> x_data(x.begin(), x.end()), grad_data(grad.begin(), grad.end());
  Values fisher(at(units), 1.0), want(at(units), 1.0);
  fisher_update<T>({sequences, tokens, d, width, x_data.data(), sequence, row, grad_data.data(),
                    sequence, row, fisher.data()},
                   pool);
  for (int64_t u = 0; u < units; ++u) {
    for (int64_t s = 0; s < sequences; ++s) {
      double sum = 0;
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = u * width; i < (u + 1) * width; ++i) {
          sum += x[at(s * sequence + t * row + i)] * grad[at(s * sequence + t * row + i)];
        }
      }
      want[at(u)] += sum * sum;
    }
  }
  expect_near(fisher, want, 0, "fisher_update of width " + std::to_string(width));
}

}  // namespace

void test_scores(const Pool& pool) {
  for (const int64_t width : {1, 2, 9, 65, 600}) {
    for (const int64_t d_out : {0, 1, 11}) check_energy(d_out, 2 * width, width, d_out, pool);
    check_fisher<double>(3, 5, 2 * width, width, 0, pool);
    check_fisher<float>(2, 4, 2 * width, width, 3, pool);
  }
  check_energy(3, 1100, 1, 0, pool);  // several spans of features
  check_energy(3, 1100, 2, 1, pool);
  check_fisher<float>(0, 5, 6, 2, 0, pool);
  check_fisher<double>(3, 0, 6, 2, 0, pool);
  check_fisher<float>(2, 3, 1100, 1, 0, pool);
  check_fisher<double>(2, 3, 1100, 4, 1, pool);
}

}  // namespace liar::native
