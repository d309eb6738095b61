// What the native tests share: values that sum exactly, and comparison with plain loops.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/parallel.h"

namespace liar::native {

using Values = std::vector<double>;

/// Index of a vector by what sizes are counted in.
inline size_t at(int64_t i) { return static_cast<size_t>(i); }

/// Zeros, of exactly that size: the first stray access lies outside of the allocation.
inline Values zeros(int64_t count) { return Values(at(count), 0.0); }

/// Integers from −8 to 8: exact in every type, and so are their products and sums.
Values random_values(int64_t count, uint64_t seed);

/// G = xᵀ x, (d, d), with NaN above the diagonal: whatever reads that is found out.
Values gram_of(const Values& x, int64_t tokens, int64_t d);

/// Counts a failure, and prints `what`, unless `ok`.
void expect(bool ok, const std::string& what);

/// As above, unless every |got − want| is at most tolerance · max(1, max |want|). A NaN is off by
/// infinity.
void expect_near(const Values& got, const Values& want, double tolerance, const std::string& what);

// One for each file of kernels.
void test_gram(const Pool& pool);
void test_solve(const Pool& pool);
void test_reconstruct(const Pool& pool);
void test_sweep(const Pool& pool);
void test_obs_curve(const Pool& pool);

}  // namespace liar::native
