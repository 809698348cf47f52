// SPDX-License-Identifier: Apache-2.0
// Why the screen is safe. With s_c = |c|^2 / 2 - r . c (half the square distance, less a constant of the row) and u =
// 2^-24:
//   - the stored half norm errs by u |c|^2 / 2; the product of D terms, fused or not, by (D + 1) u |r| |c|;
//   - the subtraction by u (|c|^2 / 2 + |r| |c|), products that underflow by D 2^-149 in all;
//   - the definition's own float64 sum by (D + 2) 2^-53 (|r| + |c|)^2 / 2.
// So a computed score errs by at most E below, and the code that the definition chooses scores within 2 E of the
// smallest. Where a bound is not finite, every code survives.
#include "nearest.h"

#include <cmath>
#include <cstring>

#include "cpu/pack.h"

namespace hisac {

Level Level::make(int64_t size, int64_t width, const float* centers, float* memory) noexcept {
  float* const copy = memory;
  float* const packed = copy + size * width;
  float* const half = packed + cpu::packed_size(width, size);
  if (copy != centers) std::memcpy(copy, centers, sizeof(float) * static_cast<size_t>(size * width));
  cpu::kernels().pack_columns(width, size, copy, width, packed);
  double largest = 0;
  for (int64_t c = 0; c < cpu::pad(size); ++c) {
    double squares = 0;
    for (int64_t d = 0; c < size && d < width; ++d) squares += double(copy[c * width + d]) * copy[c * width + d];
    half[c] = c < size ? static_cast<float>(squares / 2) : INFINITY;
    if (squares > largest) largest = squares;
  }
  return {size, width, copy, packed, half, static_cast<float>(std::sqrt(largest) * 1.0001)};
}

double square_distance(const float* r, const float* c, int64_t width) noexcept {
  double total = 0;
  for (int64_t d = 0; d < width; ++d) {
    const double step = double(r[d]) - double(c[d]);
    total += step * step;
  }
  return total;
}

void NearestScratch::carve(Arena& arena, int64_t width, int64_t largest_size) noexcept {
  const int64_t fit = (int64_t{1} << 18) / cpu::pad(largest_size) / cpu::kRowStep * cpu::kRowStep;
  rows = static_cast<int>(fit < cpu::kRowStep ? cpu::kRowStep : fit > cpu::kBlock ? cpu::kBlock : fit);
  r = arena.take<float>(rows * width);
  squares = arena.take<float>(rows);
  scores = arena.take<float>(rows * cpu::pad(largest_size));
  smallest = arena.take<float>(rows);
  survivors = arena.take<int32_t>(largest_size);
}

namespace {

/// smallest + 2 E, rounded up.
float threshold(const Level& level, float smallest, float squares) noexcept {
  constexpr double kUlp = 0x1p-24;
  const double width = static_cast<double>(level.width), c = level.largest;
  const double r = std::sqrt(1.01 * squares + width * 0x1p-125);  // the float32 sum of squares may have lost this much
  const double screen = (width + 8) * kUlp * (r * c + c * c / 2) + width * 0x1p-149;
  const double definition = (width + 4) * 0x1p-53 * (r + c) * (r + c) / 2;
  const double bound = smallest + 2 * 1.01 * (screen + definition);
  if (!(r * c + c * c < 1e37) || width * kUlp > 0.01 || !(bound < 1e37)) return INFINITY;
  return std::nextafterf(static_cast<float>(bound), INFINITY);
}

}  // namespace

void nearest(const Level& level, int n, NearestScratch& s, int32_t* codes, int64_t stride) noexcept {
  const cpu::Kernels& k = cpu::kernels();
  const int64_t ld = cpu::pad(level.size);
  k.matmul(n, level.width, level.size, s.r, level.width, level.packed, s.scores, ld, nullptr);
  k.screen(n, level.size, s.scores, ld, level.half, s.smallest);
  for (int i = 0; i < n; ++i) {
    const int64_t found =
        k.survivors(level.size, s.scores + i * ld, threshold(level, s.smallest[i], s.squares[i]), s.survivors);
    int32_t best = s.survivors[0];
    if (found > 1) {
      const float* const r = s.r + i * level.width;
      double least = square_distance(r, level.centers + best * level.width, level.width);
      for (int64_t j = 1; j < found; ++j) {
        const double d = square_distance(r, level.centers + s.survivors[j] * level.width, level.width);
        if (d < least) {
          least = d;
          best = s.survivors[j];
        }
      }
    }
    codes[i * stride] = best;
  }
}

}  // namespace hisac
