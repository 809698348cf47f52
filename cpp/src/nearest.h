// SPDX-License-Identifier: Apache-2.0
// The exact nearest codeword of one level: float32 products screen, near-ties are re-scored as the definition says.
#pragma once
#include "arena.h"
#include "cpu/kernels.h"

namespace hisac {

/// One level's codewords, packed for the screen.
struct Level {
  int64_t size = 0, width = 0;
  const float* centers = nullptr;  // [C, D]
  const float* packed = nullptr;   // [D, C] in panels
  const float* half = nullptr;     // [C] |c|^2 / 2, padded with +inf
  float largest = 0;               // an upper bound of |c|

  static int64_t floats(int64_t size, int64_t width) noexcept {
    return size * width + width * cpu::pad(size) + cpu::pad(size);
  }
  /// Fills memory of floats(size, width): the centers (copied unless they are there already), panels, norms.
  static Level make(int64_t size, int64_t width, const float* centers, float* memory) noexcept;
};

/// The definition: sum over d in index order of (r_d - c_d)^2 in float64.
double square_distance(const float* r, const float* c, int64_t width) noexcept;

/// A worker's scratch for blocks of rows.
struct NearestScratch {
  int rows = 0;               // rows of a block: fewer for very large codebooks
  float* r = nullptr;         // [rows, width] the residuals
  float* squares = nullptr;   // [rows] their squared norms
  float* scores = nullptr;    // [rows, pad(C)]
  float* smallest = nullptr;  // [rows]
  int32_t* survivors = nullptr;

  void carve(Arena& arena, int64_t width, int64_t largest_size) noexcept;
};

/// codes[i * stride] = the nearest code of residual i for n rows of scratch.
void nearest(const Level& level, int n, NearestScratch& scratch, int32_t* codes, int64_t stride) noexcept;

}  // namespace hisac
