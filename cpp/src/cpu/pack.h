// SPDX-License-Identifier: Apache-2.0
// The packed form of a product's right-hand matrix B [k, m]: panels of 48, 32 or 16 columns, each [k][panel width], so
// that a panel of a usual size stays in L1 while the rows of a tile pass by. The same for every ISA.
#pragma once
#include "kernels.h"

namespace hisac::cpu {

/// Sixteens of the next panel when `left` sixteens remain: threes, but no one left alone.
constexpr int64_t panel_group(int64_t left) { return left == 2 || left == 4 ? 2 : left == 1 ? 1 : 3; }

/// Floats of a packed [k, m].
constexpr int64_t packed_size(int64_t k, int64_t m) { return k * pad(m); }

}  // namespace hisac::cpu
