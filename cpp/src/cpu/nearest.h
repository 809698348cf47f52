// SPDX-License-Identifier: Apache-2.0
// The exact nearest codeword of one level. Products in float32 or bfloat16 screen the codes. Codes that the screen
// leaves are re-scored in float64, in any order of summation. What still nearly ties is scored by the definition.
#pragma once
#include "base/arena.h"
#include "codebook/level.h"
#include "cpu/simd/kernels.h"

namespace hisac::cpu {

/// Rows that are screened together, so that their scores and a panel stay in L1 for codebooks of a usual size.
constexpr int kScreenRows = 16;

/// The definition of four square distances: the sum over d in index order of (r_d - c_d)^2 in float64. Four at once,
/// because the additions of one depend on each other.
void square_distances(const float* const (&r)[4], const float* const (&c)[4], int64_t width, double* out) noexcept;

/// *out = the screen of a row with these sums of squares, its threshold infinite; false where nothing bounds the row's
/// products.
bool screen_of(const Level& level, simd::Rounded sums, simd::Screen* out) noexcept;

/// The nearest of the candidates, which it overwrites. Float64 sums in any order decide unless they nearly tie.
int32_t closest(const Level& level, const float* r, int32_t* candidates, int64_t count) noexcept;

/// z [n, ldz] = products of rows with the codes [first, first + size); a panel starts at `first`. Rows are as
/// `screened` makes them: bfloat16 pairs, or floats where the ISA has no products of bfloat16.
void products(const Level& level, int n, const uint32_t* rows, int64_t first, int64_t size, float* z,
              int64_t ldz) noexcept;
/// Elements of a row as `screened` makes it.
inline int64_t screened_width(int64_t width) noexcept {
  return simd::kernels().matmul_bf16 ? simd::pairs_of(width) : width;
}
/// dst = r as products take it.
simd::Rounded screened(const Level& level, const float* r, uint32_t* dst) noexcept;

}  // namespace hisac::cpu
