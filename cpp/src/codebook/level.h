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
  double floor = 0;                // how much smaller a norm may be because squares underflow
  double rounding = 0;             // an upper bound of |rounded c - c| / norm

  /// What `make` needs, a multiple of 16.
  static int64_t floats(int64_t size, int64_t width) noexcept {
    return (width + 3) * simd::pad(size) + simd::pad(width);
  }
  /// Fills memory of floats(size, width): panels, mean, norms. The centers stay where they are.
  static Level make(int64_t size, int64_t width, const float* centers, float* memory) noexcept;
};

constexpr double kUnitRoundoff = 0x1p-24;  // of float32

/// A bound of the rounding error |e| of a row or a center with these sums of squares; the float32 difference to the
/// mean errs too.
inline double rounding_of(simd::Rounded sums, double norm, int64_t width) noexcept {
  return 1.01 * std::sqrt(double(sums.errors) + static_cast<double>(width) * 0x1p-124) + kUnitRoundoff * norm;
}

}  // namespace hisac
