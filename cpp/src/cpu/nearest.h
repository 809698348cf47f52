// SPDX-License-Identifier: Apache-2.0
// The exact nearest codeword of one level: products in float32 or bfloat16 screen, what the screen cannot decide is
// re-scored in float64, and what that cannot decide as the definition says.
#pragma once
#include "base/arena.h"
#include "codebook/level.h"
#include "cpu/simd/kernels.h"

namespace hisac::cpu {

/// The definition: sum over d in index order of (r_d - c_d)^2 in float64; four at once, so that none waits for the
/// additions of another.
void square_distances(const float* const (&r)[4], const float* const (&c)[4], int64_t width, double* out) noexcept;

/// What turns a row's sums of squares into its screen.
class Bounds {
 public:
  explicit Bounds(const Level& level) noexcept;
  /// The screen of a row, its threshold still open; false where nothing bounds its products.
  bool screen(simd::Rounded sums, simd::Screen* out) const noexcept;

 private:
  const Level& level_;
  double floor_, tiny_, product_, second_;
};

/// The nearest of the candidates, which it overwrites; float64 sums in any order decide unless they nearly tie.
int32_t closest(const Level& level, const float* r, int32_t* candidates, int64_t count) noexcept;

/// products [n, ldz] of rows with the codes from column `first` (where a panel starts) on, `size` of them. Rows are as
/// `screened` makes them: pairs, or floats where the ISA has no pairs.
void products(const Level& level, int n, const uint32_t* rows, int64_t first, int64_t size, float* z,
              int64_t ldz) noexcept;
/// Elements of a row for products.
inline int64_t screened_width(int64_t width) noexcept {
  return simd::kernels().matmul_bf16 ? simd::pairs_of(width) : width;
}
/// dst = r for products.
simd::Rounded screened(const Level& level, const float* r, uint32_t* dst) noexcept;

/// A worker's scratch for blocks of rows.
struct NearestScratch {
  static constexpr int rows = 16;  // of a block: their scores and a panel stay in L1 for codebooks of a usual size
  float* r = nullptr;              // [rows, width] the residuals
  uint32_t* screened = nullptr;    // [rows, screened_width] the same for products
  float* scores = nullptr;         // [rows, pad(C)]
  int32_t* survivors = nullptr;    // [C]

  void carve(Arena& arena, int64_t width, int64_t largest_size) noexcept;
};

/// codes[i * stride] = the nearest code of residual i for n rows of scratch.
void nearest(const Level& level, int n, NearestScratch& scratch, int32_t* codes, int64_t stride) noexcept;

}  // namespace hisac::cpu
