// SPDX-License-Identifier: Apache-2.0
// The packed form of a product's right-hand matrix B [k, m]: panels of 48, 32 or 16 columns, each [k][panel width], so
// that a panel of a usual size stays in L1 while the rows of a tile pass by. The same for every ISA.
#pragma once
#include <cstring>

#include "kernels.h"

namespace hisac::cpu {

/// Sixteens of the next panel when `left` sixteens remain: threes, but no one left alone.
constexpr int64_t panel_group(int64_t left) { return left == 2 || left == 4 ? 2 : left == 1 ? 1 : 3; }

/// Floats of a packed [k, m].
constexpr int64_t packed_size(int64_t k, int64_t m) { return k * pad(m); }

/// Pack B, B[d][j] = get(d, j) for j < m, padded with zeros.
template <class Get>
void pack(int64_t k, int64_t m, float* out, Get get) {
  for (int64_t left = pad(m) / kLanes, j0 = 0; left > 0;) {
    const int64_t group = panel_group(left), width = group * kLanes;
    for (int64_t d = 0; d < k; ++d)
      for (int64_t j = 0; j < width; ++j) *out++ = j0 + j < m ? get(d, j0 + j) : 0.f;
    left -= group;
    j0 += width;
  }
}

/// Pack B from its transpose, columns [m, k] with stride ld: one row of `columns` is one column of B.
inline void pack_columns(int64_t k, int64_t m, const float* columns, int64_t ld, float* out) {
  pack(k, m, out, [=](int64_t d, int64_t j) { return columns[j * ld + d]; });
}

/// Pack B from its rows [k, m] with stride ld.
inline void pack_rows(int64_t k, int64_t m, const float* rows, int64_t ld, float* out) {
  pack(k, m, out, [=](int64_t d, int64_t j) { return rows[d * ld + j]; });
}

}  // namespace hisac::cpu
