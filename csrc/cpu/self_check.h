// Whether an instruction set computes what it should on the machine at hand.
#pragma once

#include "panel_kernel.h"

namespace liar {

/// Adds up a small Gram matrix of integers by every kernel of a set, and compares it with plain
/// loops: such sums are exact in every arithmetic.
bool is_right(const KernelSet& set);

}  // namespace liar
