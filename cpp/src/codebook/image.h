// SPDX-License-Identifier: Apache-2.0
// The layout of a codebook's image, which is the codebook as CUDA kernels read it. Offsets are in bytes and follow from
// the codebook's shape, so a kernel's parameters carry them. All parts begin at multiples of 64.
//
// The screen of a level works on (center - mean) and (row - mean), times a power of two that brings the largest norm of
// a center to about [64, 128). In float16 such rows may have norms up to 2^15, and small elements stay normal numbers.
#pragma once
#include "base/checks.h"
#include "hisac/codebook.h"

namespace hisac {

struct CodebookImage {
  static constexpr int kCodes = 32;         // of a tile, the codes that a kernel screens together
  static constexpr int kHead = kCodes + 4;  // floats: -|b|^2 / 2 of each code, bounds of |b| and of |B - b|
  struct Screen {
    float scale;    // b = scale (center - mean), B = b in float16
    float largest;  // of the bounds of |b|; +inf where nothing bounds the screen's error
    float unused[2];
  };
  struct Level {
    int64_t size, tiles;
    int64_t centers;  // float32 [C, pitch]
    int64_t screen;   // a Screen, then the mean, float32 [depth]
    int64_t heads;    // float32 [tiles, kHead]; -inf for padding and for a copy of the center before
    int64_t panels;   // float16 [tiles * kCodes, depth]: B
  };

  int levels = 0, width = 0;
  int pitch = 0;  // floats of a center: D rounded up to a multiple of 4, zeros at the end
  int depth = 0;  // D rounded up to a multiple of 16
  Level level[kMaxLevels] = {};
  int64_t bytes = 0;

  explicit CodebookImage(const Codebook& book) noexcept;
};

/// context.codebook_image has the size and alignment of the image; its content cannot be read here.
inline Status check_image(const char* verb, const Context& context, const CodebookImage& book) noexcept {
  const auto& image = context.codebook_image;
  if (!image.data || image.shape[0] != book.bytes)
    return Status::error(Code::invalid_argument,
                         "%s: context.codebook_image expected [%" PRId64 "] on CUDA, got [%" PRId64 "]", verb,
                         book.bytes, image.data ? image.shape[0] : 0);
  if (reinterpret_cast<uintptr_t>(image.data) % 64)
    return Status::error(Code::invalid_argument,
                         "%s: context.codebook_image expected aligned to 64 bytes, got address %p", verb,
                         static_cast<const void*>(image.data));
  return {};
}

}  // namespace hisac
