// SPDX-License-Identifier: Apache-2.0
// Fills a codebook's image with the same bytes on every machine: float64 sums are in index order, and float16 is
// rounded to nearest even on every ISA.
#include "codebook/image.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "codebook/checks.h"
#include "cpu/simd/kernels.h"

namespace hisac {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kPart = 64;  // columns at a time

/// Fills one level of an image of zeros. `flush` is sqrt(D) 2^-14: the largest error that the subnormal numbers of
/// float16 can cause, in B or in tensor cores.
void fill(const Codebook& book, int l, const CodebookImage& image, std::byte* out) noexcept {
  const simd::Kernels& k = simd::kernels();
  const CodebookImage::Level& layout = image.level[l];
  const int64_t width = image.width;
  auto* const centers = reinterpret_cast<float*>(out + layout.centers);
  auto* const screen = reinterpret_cast<CodebookImage::Screen*>(out + layout.screen);
  auto* const mean = reinterpret_cast<float*>(screen + 1);
  auto* const heads = reinterpret_cast<float*>(out + layout.heads);
  auto* const panels = reinterpret_cast<uint16_t*>(out + layout.panels);
  const double flush = std::sqrt(static_cast<double>(width)) * 0x1p-14;
  const auto center = [&](int64_t c) { return book.centers(l) + c * width; };
  double largest = 0;  // |center - mean|
  for (int64_t c = 0; c < layout.size; ++c) std::copy_n(center(c), width, centers + c * image.pitch);
  for (int64_t d = 0; d < width; ++d) {
    double sum = 0;
    for (int64_t c = 0; c < layout.size; ++c) sum += double(center(c)[d]);
    mean[d] = static_cast<float>(sum / static_cast<double>(layout.size));
  }
  for (int64_t c = 0; c < layout.size; ++c) {
    double squares = 0;
    for (int64_t d = 0; d < width; ++d) {
      const double y = double(center(c)[d] - mean[d]);
      squares += y * y;
    }
    largest = std::max(largest, std::sqrt(squares));
  }
  const bool usable = largest < 1e30 && width < (1 << 17);
  screen->scale = 1;
  if (usable && largest > 0) screen->scale = static_cast<float>(std::ldexp(1, std::min(6 - std::ilogb(largest), 100)));
  screen->largest = usable ? 0.f : kInfinity;
  for (int64_t c = 0; c < layout.tiles * CodebookImage::kCodes; ++c) {
    float* const head = heads + c / CodebookImage::kCodes * CodebookImage::kHead;
    float &half = head[c % CodebookImage::kCodes], *const bounds = head + CodebookImage::kCodes;
    half = c >= layout.size || (c > 0 && std::equal(center(c), center(c) + width, center(c - 1))) ? -kInfinity : 0.f;
    if (c >= layout.size || !usable) continue;
    double squares = 0, errors = 0;
    for (int64_t first = 0; first < width; first += kPart) {
      const int64_t n = std::min(kPart, width - first);
      uint16_t* const rounded = panels + c * image.depth + first;
      float b[kPart], restored[kPart];
      for (int64_t d = 0; d < n; ++d) b[d] = (center(c)[first + d] - mean[first + d]) * screen->scale;
      k.store_row(rounded, DType::float16, n, b, 1);
      k.load_row(rounded, DType::float16, n, restored);
      for (int64_t d = 0; d < n; ++d) {
        squares += double(b[d]) * double(b[d]);
        errors += (double(restored[d]) - double(b[d])) * (double(restored[d]) - double(b[d]));
      }
    }
    // b itself is rounded: 2^-24 |b|
    const double norm = 1.0001 * std::sqrt(squares) + flush;
    const double error = 1.0001 * std::sqrt(errors) + 0x1p-22 * norm + flush;
    if (half == 0) half = static_cast<float>(-squares / 2);
    bounds[0] = std::max(bounds[0], static_cast<float>(norm * 1.0001));
    bounds[1] = std::max(bounds[1], static_cast<float>(error * 1.0001));
    screen->largest = std::max(screen->largest, bounds[0]);
  }
}

}  // namespace

CodebookImage::CodebookImage(const Codebook& book) noexcept
    : levels(book.levels()),
      width(static_cast<int>(book.width())),
      pitch((width + 3) / 4 * 4),
      depth((width + 15) / 16 * 16) {
  const auto take = [&](int64_t n) {
    const int64_t offset = bytes;
    bytes += (n + 63) / 64 * 64;
    return offset;
  };
  for (int l = 0; l < levels; ++l) {
    const int64_t size = book.size(l), tiles = (size + kCodes - 1) / kCodes;
    level[l] = {size,
                tiles,
                take(size * pitch * 4),
                take(int64_t{sizeof(Screen)} + depth * 4),
                take(tiles * kHead * 4),
                take(tiles * kCodes * depth * 2)};
  }
}

size_t codebook_image_size(const Codebook& book) noexcept { return static_cast<size_t>(CodebookImage(book).bytes); }

Status codebook_image(const Codebook& book, Array<std::byte, 1> out) noexcept {
  HISAC_TRY(check_book("codebook_image", &book));
  const CodebookImage image(book);
  HISAC_TRY(check_shape("codebook_image", "out", {image.bytes}, out));
  if (reinterpret_cast<uintptr_t>(out.data) % alignof(float))
    return Status::error(Code::invalid_argument, "codebook_image: out expected aligned to %zu bytes, got address %p",
                         alignof(float), static_cast<void*>(out.data));
  std::memset(out.data, 0, static_cast<size_t>(image.bytes));
  for (int l = 0; l < image.levels; ++l) fill(book, l, image, out.data);
  return {};
}

}  // namespace hisac
