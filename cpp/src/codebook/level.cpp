// SPDX-License-Identifier: Apache-2.0
#include "codebook/level.h"

#include <algorithm>

namespace hisac {

Level Level::make(int64_t size, int64_t width, const float* centers, float* memory) noexcept {
  const simd::Kernels& k = simd::kernels();
  const int64_t padded = simd::pad(size), pairs = simd::pairs_of(width);
  float* const packed = memory;
  float* const mean = packed + (width + 1) * padded;
  float* const half = mean + simd::pad(width);
  float* const norm = half + padded;
  Level out{size, width, centers, packed, mean, half, norm};
  out.floor = std::sqrt(static_cast<double>(width)) * 0x1p-50;
  std::fill_n(mean, width, 0.f);
  std::fill_n(half, padded, INFINITY);
  std::fill_n(norm, padded, 0.f);
  if (k.matmul_bf16)
    for (int64_t c = 0; c < size; ++c) k.add_row(width, centers + c * width, 1.f / static_cast<float>(size), mean);
  uint32_t* const rounded = reinterpret_cast<uint32_t*>(packed + pairs * padded);
  for (int64_t c = 0; c < size; ++c) {
    const float* const center = centers + c * width;
    double squares = 0;
    for (int64_t d = 0; d < width; ++d) {
      const double x = double(center[d] - mean[d]);
      squares += x * x;
    }
    const double bound = std::sqrt(squares) * 1.0001 + out.floor;
    const bool copy_of_last = c > 0 && std::equal(center, center + width, center - width);
    if (!copy_of_last) half[c] = static_cast<float>(squares / 2);
    norm[c] = static_cast<float>(bound);
    out.largest = std::max(out.largest, bound);
    if (!k.matmul_bf16) continue;
    const double error = rounding_of(k.round_bf16(width, center, mean, rounded + c * pairs), bound, width);
    out.rounding = std::max(out.rounding, error / bound);
  }
  if (k.matmul_bf16)
    k.pack_columns(pairs, size, reinterpret_cast<const float*>(rounded), pairs, packed);
  else
    k.pack_columns(width, size, centers, width, packed);
  return out;
}

}  // namespace hisac
