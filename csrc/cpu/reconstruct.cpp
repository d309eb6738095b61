#include "reconstruct.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

// BLAS and LAPACK as torch's library exports them (column-major).
extern "C" {
void dpotrf_(const char* uplo, const int* n, double* a, const int* lda, int* info);
void dtrsm_(const char* side, const char* uplo, const char* trans, const char* diag, const int* m,
            const int* n, const double* alpha, const double* a, const int* lda, double* b,
            const int* ldb);
void dgemm_(const char* ta, const char* tb, const int* m, const int* n, const int* k,
            const double* alpha, const double* a, const int* lda, const double* b, const int* ldb,
            const double* beta, double* c, const int* ldc);
}

namespace liar {
namespace {

using Matrix = std::vector<double>;

/// c (rows, cols) = alpha · a (rows, inner) b (inner, cols) + beta · c, all row-major.
void gemm(int64_t rows, int64_t cols, int64_t inner, double alpha, const double* a, int64_t a_row,
          const double* b, int64_t b_row, double beta, double* c) {
  const int m = static_cast<int>(cols), n = static_cast<int>(rows), k = static_cast<int>(inner);
  const int lda = static_cast<int>(b_row), ldb = static_cast<int>(a_row), ldc = m;
  if (rows == 0 || cols == 0) return;
  if (inner == 0) {
    for (int64_t i = 0; i < rows * cols; ++i) c[i] *= beta;
    return;
  }
  dgemm_("N", "N", &m, &n, &k, &alpha, b, &lda, a, &ldb, &beta, c, &ldc);
}

double lower_at(const Float64View& m, int64_t i, int64_t j) {
  return i >= j ? m.data[i * m.row_stride + j] : m.data[j * m.row_stride + i];
}

Matrix symmetric_full(const Float64View& m, int64_t d) {
  Matrix full(static_cast<size_t>(d * d));
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j < d; ++j) full[static_cast<size_t>(i * d + j)] = lower_at(m, i, j);
  }
  return full;
}

/// tr(v m vᵀ) − 2 tr(v c), v (rows, d); c null: 0.
double quadratic(const Matrix& v, const Matrix& m, const Float64View* c, int64_t rows, int64_t d) {
  Matrix product(static_cast<size_t>(rows * d));
  gemm(rows, d, d, 1.0, v.data(), d, m.data(), d, 0.0, product.data());
  double sum = 0;
  for (size_t i = 0; i < product.size(); ++i) sum += product[i] * v[i];
  if (c != nullptr) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < d; ++j) {
        sum -= 2 * v[static_cast<size_t>(i * d + j)] * c->data[j * c->row_stride + i];
      }
    }
  }
  return sum;
}

}  // namespace

void reconstruct(const Reconstruct& a, const Pool&) {
  const int64_t d = a.d, n = a.n, m = a.d_out;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  std::vector<char> stays(static_cast<size_t>(d), 0);
  for (int64_t k = 0; k < n; ++k) stays[static_cast<size_t>(a.kept[k])] = 1;

  const Matrix gram = symmetric_full(a.gram, d);
  const Matrix holdout = a.holdout != nullptr ? symmetric_full(*a.holdout, d) : Matrix();

  // R = G_KP W_Pᵀ (or C_K − G_KK W_Kᵀ): rows K of G times the weights with the other part zeroed.
  Matrix rows(static_cast<size_t>(n * d)), masked(static_cast<size_t>(d * m)),
      rhs(static_cast<size_t>(n * m));
  for (int64_t k = 0; k < n; ++k)
    std::copy_n(&gram[static_cast<size_t>(a.kept[k] * d)], d, &rows[static_cast<size_t>(k * d)]);
  for (int64_t i = 0; i < d; ++i) {
    const bool take = (stays[static_cast<size_t>(i)] != 0) == (a.cross != nullptr);
    for (int64_t o = 0; o < m; ++o) {
      masked[static_cast<size_t>(i * m + o)] =
          take ? a.weight.data[o * a.weight.row_stride + i] : 0.0;
    }
  }
  double beta = 0;
  if (a.cross != nullptr) {
    beta = 1;
    for (int64_t k = 0; k < n; ++k) {
      std::copy_n(a.cross->data + a.kept[k] * a.cross->row_stride, m,
                  &rhs[static_cast<size_t>(k * m)]);
    }
  }
  gemm(n, m, d, a.cross != nullptr ? -1.0 : 1.0, rows.data(), d, masked.data(), m, beta,
       rhs.data());

  double mean = 0;
  for (int64_t k = 0; k < n; ++k) mean += gram[static_cast<size_t>(a.kept[k] * d + a.kept[k])];
  mean = n > 0 ? mean / static_cast<double>(n) : 1;
  if (mean == 0) mean = 1;

  for (int64_t l = 0; l < a.ladder; ++l) {
    double* out = a.weight_out + l * m * n;
    const bool drop = std::isinf(a.damps[l]);
    Matrix delta;
    double code = 0, condition = 1;
    if (!drop && n > 0) {
      Matrix factor(static_cast<size_t>(n * n));
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j <= i; ++j)
          factor[static_cast<size_t>(i * n + j)] = rows[static_cast<size_t>(i * d + a.kept[j])];
        factor[static_cast<size_t>(i * n + i)] += a.damps[l] * mean;
      }
      int order = static_cast<int>(n), width = static_cast<int>(m), failed = 0;
      const double one = 1;
      dpotrf_("U", &order, factor.data(), &order, &failed);  // row-major lower
      code = failed;
      if (failed == 0) {
        double low = factor[0], high = factor[0];
        for (int64_t i = 0; i < n; ++i) {
          low = std::min(low, factor[static_cast<size_t>(i * n + i)]);
          high = std::max(high, factor[static_cast<size_t>(i * n + i)]);
        }
        condition = high / low * (high / low);
        delta = rhs;  // (n, m) row-major is (m, n) column-major: solve X U = B from the right
        dtrsm_("R", "U", "N", "N", &width, &order, &one, factor.data(), &order, delta.data(),
               &width);
        dtrsm_("R", "U", "T", "N", &width, &order, &one, factor.data(), &order, delta.data(),
               &width);
      }
    }
    a.info_out[2 * l] = code;
    a.info_out[2 * l + 1] = code == 0 ? condition : nan;
    if (code != 0) {
      std::fill_n(out, m * n, nan);
      a.error_out[l] = nan;
      if (a.holdout != nullptr) a.holdout_out[l] = nan;
      continue;
    }
    // v is ΔW over all d features, or with `cross` the new weights themselves.
    Matrix v(static_cast<size_t>(m * d), 0.0);
    for (int64_t o = 0; o < m; ++o) {
      const double* w = a.weight.data + o * a.weight.row_stride;
      for (int64_t i = 0; i < d; ++i) {
        if (stays[static_cast<size_t>(i)] == 0 && a.cross == nullptr)
          v[static_cast<size_t>(o * d + i)] = -w[i];
      }
      for (int64_t k = 0; k < n; ++k) {
        const double change = drop || n == 0 ? 0.0 : delta[static_cast<size_t>(k * m + o)];
        const double updated = w[a.kept[k]] + change;
        out[o * n + k] = updated;
        v[static_cast<size_t>(o * d + a.kept[k])] = a.cross != nullptr ? updated : change;
      }
    }
    a.error_out[l] = quadratic(v, gram, a.cross, m, d);
    if (a.holdout != nullptr) a.holdout_out[l] = quadratic(v, holdout, a.holdout_cross, m, d);
  }
}

}  // namespace liar
