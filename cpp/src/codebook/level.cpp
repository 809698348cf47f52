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
  for (int64_t d = 0; d < width; ++d) mean[d] = 0;
  if (k.matmul_bf16)
    for (int64_t c = 0; c < size; ++c) k.add_row(width, centers + c * width, 1.f / static_cast<float>(size), mean);
  uint32_t* const rounded = reinterpret_cast<uint32_t*>(packed + pairs * padded);
  for (int64_t c = 0; c < padded; ++c) {
    double squares = 0;
    for (int64_t d = 0; c < size && d < width; ++d) {
      const double x = double(centers[c * width + d] - mean[d]);
      squares += x * x;
    }
    const double bound = c < size ? std::sqrt(squares) * 1.0001 + out.floor : 0;
    const bool copy_of_last =
        c > 0 && c < size && std::equal(centers + c * width, centers + (c + 1) * width, centers + (c - 1) * width);
    half[c] = c < size && !copy_of_last ? static_cast<float>(squares / 2) : INFINITY;
    norm[c] = static_cast<float>(bound);
    if (bound > out.largest) out.largest = bound;
    if (k.matmul_bf16 && c < size) {
      const double error =
          rounding_of(k.round_bf16(width, centers + c * width, mean, rounded + c * pairs), bound, width);
      if (error / bound > out.rounding) out.rounding = error / bound;
    }
  }
  if (k.matmul_bf16)
    k.pack_columns(pairs, size, reinterpret_cast<const float*>(rounded), pairs, packed);
  else
    k.pack_columns(width, size, centers, width, packed);
  return out;
}

}  // namespace hisac
