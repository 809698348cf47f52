// SPDX-License-Identifier: Apache-2.0
// Why the screen is safe. With s_c = |c|^2 / 2 - r . c (half the square distance, less a constant of the row), u =
// 2^-24, n_c the norm bound of c, R of r, and r + e, c + f what is multiplied in place of r and c:
//   - the product errs by |e| n_c + (R + |e|) |f| before rounding and by (D + 2) u (R + |e|) (n_c + |f|) through it;
//   - the stored half norm errs by u n_c^2, the steps from product to bounds by 5 u (n_c^2 / 2 + R n_c);
//   - what underflows, D 2^-125 at most, and what squares lose by it, is below the floors of R and n_c;
//   - the definition's own float64 sums err by (D + 2) 2^-53 (R + n_c)^2 / 2 each.
// All but the last are at most `error` n_c below. Where a product might overflow, every code survives.
#include "cpu/nearest.h"

#include <cmath>
#include <cstring>

namespace hisac::cpu {

void square_distances(const float* const (&r)[4], const float* const (&c)[4], int64_t width, double* out) noexcept {
  double total[4] = {};
  for (int64_t d = 0; d < width; ++d)
    for (int i = 0; i < 4; ++i) {
      const double step = double(r[i][d]) - double(c[i][d]);
      total[i] += step * step;
    }
  std::memcpy(out, total, sizeof total);
}

bool screen_of(const Level& level, simd::Rounded sums, simd::Screen* out) noexcept {
  const double product = static_cast<double>(level.width + 12) * kUnitRoundoff * (1 + level.rounding);
  const double c = level.largest, r = 1.01 * std::sqrt(double(sums.squares)) + level.floor;
  const double e = level.rounding > 0 ? rounding_of(sums, r, level.width) : 0;
  const double error = e + (r + e) * (level.rounding + product) + 5 * kUnitRoundoff * (r + c);
  const double sum_error = static_cast<double>(level.width + 4) * 0x1p-53 * (r + c) * (r + c);
  *out = {level.half, level.norm, static_cast<float>(1.02 * error), static_cast<float>(sum_error), INFINITY, 0};
  return r * c + c * c < 1e37 && level.width < (1 << 17);
}

int32_t closest(const Level& level, const float* r, int32_t* candidates, int64_t count) noexcept {
  const simd::Kernels& k = simd::kernels();
  const double tie = 1 + static_cast<double>(level.width + 4) * 0x1p-51;
  double least = INFINITY;
  int64_t kept = 0;
  for (int64_t j = 0; j < count; ++j) {
    const double d = k.square_distance(level.width, r, level.centers + candidates[j] * level.width);
    if (d > least * tie) continue;
    if (d * tie < least) kept = 0;
    if (d < least) least = d;
    candidates[kept++] = candidates[j];
  }
  int32_t best = candidates[0];
  for (int64_t j = 0; j < kept && kept > 1; j += 4) {
    const float *const row[4] = {r, r, r, r}, *center[4];
    double exact[4];
    for (int64_t i = 0; i < 4; ++i) center[i] = level.centers + candidates[j + i < kept ? j + i : j] * level.width;
    square_distances(row, center, level.width, exact);
    for (int64_t i = 0; i < 4 && j + i < kept; ++i)
      if (j + i == 0 || exact[i] < least || (exact[i] == least && candidates[j + i] < best)) {
        least = exact[i];
        best = candidates[j + i];
      }
  }
  return best;
}

simd::Rounded screened(const Level& level, const float* r, uint32_t* dst) noexcept {
  const simd::Kernels& k = simd::kernels();
  if (k.matmul_bf16) return k.round_bf16(level.width, r, level.mean, dst);
  return {k.load_row(r, DType::float32, level.width, reinterpret_cast<float*>(dst)), 0};
}

void products(const Level& level, int n, const uint32_t* rows, int64_t first, int64_t size, float* z,
              int64_t ldz) noexcept {
  const simd::Kernels& k = simd::kernels();
  const int64_t width = screened_width(level.width);
  const float* const packed = level.packed + first * width;
  if (k.matmul_bf16)
    k.matmul_bf16(n, width, size, rows, width, reinterpret_cast<const uint32_t*>(packed), z, ldz, nullptr);
  else
    k.matmul(n, width, size, reinterpret_cast<const float*>(rows), width, packed, z, ldz, nullptr);
}

}  // namespace hisac::cpu
