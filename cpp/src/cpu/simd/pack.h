// SPDX-License-Identifier: Apache-2.0
// The packed form of a product's right-hand matrix B [k, m]: panels of 48, 32 or 16 columns, each [k][panel width], so
// that a panel of a usual size stays in L1 while the rows of a tile pass by. The same for every ISA.
#pragma once
#include "cpu/simd/kernels.h"

namespace hisac::simd {

/// The next panel's columns in units of kLanes when `left` units remain: 3, but 2 where 3 would leave a panel of 1.
constexpr int64_t panel_group(int64_t left) { return left == 2 || left == 4 ? 2 : left == 1 ? 1 : 3; }

constexpr int64_t kPanel = 48;  // columns of the widest panel

/// body(first column, width) for each panel of m columns; a packed [k, m] has its panel at k * first.
template <class Body>
void for_panels(int64_t m, Body body) {
  int64_t first = 0;
  for (int64_t left = pad(m) / kLanes; left > 0;) {
    const int64_t group = panel_group(left);
    left -= group;
    body(first, group * kLanes);
    first += group * kLanes;
  }
}

/// Floats of a packed [k, m].
constexpr int64_t packed_size(int64_t k, int64_t m) { return k * pad(m); }

}  // namespace hisac::simd
