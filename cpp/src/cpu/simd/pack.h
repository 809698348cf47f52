// SPDX-License-Identifier: Apache-2.0
// The packed form of a product's right-hand matrix B [k, m]: panels of 48, 32 or 16 columns, each [k][panel width], so
// that a panel of a usual size stays in L1 while the rows of a tile pass by. The same for every ISA.
#pragma once
#include "cpu/simd/kernels.h"

namespace hisac::simd {

constexpr int64_t kPanel = 48;  // columns of the widest panel

/// The columns of the panel of m columns that begins at column `first`: 48, but 32 where 48 would leave a panel of 16.
/// A packed [k, m] has the panel at k * first.
constexpr int64_t panel_width(int64_t m, int64_t first) {
  const int64_t left = pad(m) - first;
  return left == 64 ? 32 : left < kPanel ? left : kPanel;
}

/// Floats of a packed [k, m].
constexpr int64_t packed_size(int64_t k, int64_t m) { return k * pad(m); }

}  // namespace hisac::simd
