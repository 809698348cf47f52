// SPDX-License-Identifier: Apache-2.0
// One level of a codebook, packed once for `encode` on the CPU.
#pragma once
#include <cmath>

#include "cpu/simd/kernels.h"

namespace hisac {

/// One level's codewords, packed for the screen. Where the ISA multiplies bfloat16, the screen works on centers and
/// rows less the centers' mean, so that an offset common to all costs no precision.
struct Level {
  int64_t size = 0, width = 0;
  const float* centers = nullptr;  // [C, D]
  const float* packed = nullptr;   // [D, C] in panels; in bfloat16 [(D + 1) / 2, C]
  const float* mean = nullptr;     // [D]; in bfloat16 alone, else zeros
  const float* half = nullptr;     // [C] |c|^2 / 2; +inf for padding and for a copy of the center before
  const float* norm = nullptr;     // [C] upper bounds of |c|, 0 for padding
  double largest = 0;              // the largest norm
  double rounding = 0;             // an upper bound of |rounded c - c| / norm

  static int64_t floats(int64_t size, int64_t width) noexcept {
    return size * width + (width + 1) * simd::pad(size) + simd::pad(width) + 2 * simd::pad(size);
  }
  /// Fills memory of floats(size, width): the centers (copied unless they are there already), panels, norms.
  static Level make(int64_t size, int64_t width, const float* centers, float* memory) noexcept;
};

constexpr double kUnitRoundoff = 0x1p-24;  // of float32

/// How much smaller a norm may be because squares underflow.
inline double norm_floor(int64_t width) noexcept { return std::sqrt(static_cast<double>(width)) * 0x1p-50; }

}  // namespace hisac
