// SPDX-License-Identifier: Apache-2.0
// The layout of a codebook's image: a head, the centers of each level, and what CUDA kernels read beside them. Offsets
// are in bytes and follow from the codebook's shape, so a kernel's parameters carry them. All parts begin at multiples
// of 64, and the numbers in them are little-endian.
//
// The screen of a level works on (center - mean) and (row - mean), times a power of two that brings the largest norm of
// a center to about [64, 128). In float16 such rows may have norms up to 2^15, and small elements stay normal numbers.
#pragma once
#include "base/checks.h"
#include "hisac/codebook.h"

namespace hisac {

struct ImageHead {
  static constexpr char kMagic[8] = {'h', 'i', 's', 'a', 'c', 'b', 'k', 0};
  static constexpr uint32_t kVersion = 1;

  char magic[8];
  uint32_t version, levels;
  int64_t width, size[kMaxLevels];
  uint64_t fingerprint;
  int64_t bytes;      // of the whole image
  uint64_t checksum;  // of the whole image, with 0 in this place
  float temperature;  // 0: none
  uint32_t unused;
  FitReport report;  // no rows: none
  std::byte reserved[216];
};
static_assert(sizeof(ImageHead) == 512 && sizeof(FitReport) == 176, "no padding");

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
    int64_t centers;  // float32 [C, D]
    int64_t pitched;  // float32 [C, pitch]; the centers themselves where the pitch is D
    int64_t screen;   // a Screen, then the mean, float32 [depth]
    int64_t heads;    // float32 [tiles, kHead]; -inf for padding and for a copy of the center before
    int64_t panels;   // float16 [tiles * kCodes, depth]: B
  };

  int levels = 0, width = 0;
  int pitch = 0;  // floats of a center: D rounded up to a multiple of 4, zeros at the end
  int depth = 0;  // D rounded up to a multiple of 16
  Level level[kMaxLevels] = {};
  int64_t bytes = sizeof(ImageHead);

  CodebookImage(int levels, int64_t width, const int64_t* sizes) noexcept;
  explicit CodebookImage(const ImageHead& head) noexcept
      : CodebookImage(static_cast<int>(head.levels), head.width, head.size) {}
  explicit CodebookImage(const Codebook& book) noexcept;
};

/// Writes the fingerprint of an image's centers, and then its checksum, into its head.
void seal(const CodebookImage& layout, std::byte* image) noexcept;

/// image [layout.bytes]: its head and all parts. `centers`: those of each level.
void write_image(const CodebookImage& layout, const Array<const float, 2>* centers, const FitReport* report,
                 float temperature, std::byte* image) noexcept;

/// The head of what may be an image, checked.
Status read_head(Array<const std::byte, 1> image, ImageHead* head) noexcept;
/// Whether the parts are those that the head names. The values of the centers are not checked.
Status check_parts(const CodebookImage& layout, const ImageHead& head, const std::byte* image) noexcept;

/// context.codebook_image has the size, alignment and fingerprint of the codebook's image; its content cannot be read
/// here.
Status check_device_image(const char* verb, const Context& context, const Codebook& book) noexcept;

}  // namespace hisac
