// SPDX-License-Identifier: Apache-2.0
// Writes a codebook's image with the same bytes on every machine: float64 sums are in index order, and float16 is
// rounded to nearest even on every ISA.
#include "codebook/image.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/checksum.h"
#include "codebook/body.h"
#include "cpu/simd/kernels.h"

namespace hisac {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kPart = 64;  // columns at a time

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "images and files are little-endian");

/// FNV-1a of D, then of each level C_l and its centers.
uint64_t fingerprint_of(const CodebookImage& layout, const std::byte* image) noexcept {
  const int64_t width = layout.width;
  uint64_t hash = fnv(kFnv, &width, sizeof width);
  for (int l = 0; l < layout.levels; ++l) {
    const int64_t size = layout.level[l].size;
    hash = fnv(hash, &size, sizeof size);
    hash = fnv(hash, image + layout.level[l].centers, sizeof(float) * static_cast<size_t>(size * width));
  }
  return hash;
}

/// Of an image with `head` in the place of its own; its size is a multiple of 64.
uint64_t checksum_of(ImageHead head, const std::byte* image) noexcept {
  Checksum<4> checksum;
  head.checksum = 0;
  checksum.add(&head, sizeof head);
  checksum.add(image + sizeof head, static_cast<size_t>(head.bytes) - sizeof head);
  return checksum.value();
}

/// Fills what CUDA reads of one level, in an image with its centers and zeros. `flush` is sqrt(D) 2^-14: the largest
/// error that the subnormal numbers of float16 can cause, in B or in tensor cores.
void fill_device_part(const CodebookImage& image, int l, std::byte* out) noexcept {
  const simd::Kernels& k = simd::kernels();
  const CodebookImage::Level& layout = image.level[l];
  const int64_t width = image.width;
  const auto* const centers = reinterpret_cast<const float*>(out + layout.centers);
  auto* const pitched = reinterpret_cast<float*>(out + layout.pitched);
  auto* const screen = reinterpret_cast<CodebookImage::Screen*>(out + layout.screen);
  auto* const mean = reinterpret_cast<float*>(screen + 1);
  auto* const heads = reinterpret_cast<float*>(out + layout.heads);
  auto* const panels = reinterpret_cast<uint16_t*>(out + layout.panels);
  const double flush = std::sqrt(static_cast<double>(width)) * 0x1p-14;
  const auto center = [&](int64_t c) { return centers + c * width; };
  double largest = 0;  // |center - mean|
  for (int64_t c = 0; c < layout.size && pitched != centers; ++c)
    std::copy_n(center(c), width, pitched + c * image.pitch);
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

CodebookImage::CodebookImage(int levels_, int64_t width_, const int64_t* sizes) noexcept
    : levels(levels_), width(static_cast<int>(width_)), pitch((width + 3) / 4 * 4), depth((width + 15) / 16 * 16) {
  const auto take = [&](int64_t n) {
    const int64_t offset = bytes;
    bytes += (n + 63) / 64 * 64;
    return offset;
  };
  for (int l = 0; l < levels; ++l) level[l].centers = take(sizes[l] * width * 4);
  for (int l = 0; l < levels; ++l) {
    const int64_t size = sizes[l], tiles = (size + kCodes - 1) / kCodes;
    level[l] = {size,
                tiles,
                level[l].centers,
                pitch == width ? level[l].centers : take(size * pitch * 4),
                take(int64_t{sizeof(Screen)} + depth * 4),
                take(tiles * kHead * 4),
                take(tiles * kCodes * depth * 2)};
  }
}

CodebookImage::CodebookImage(const Codebook& book) noexcept
    : CodebookImage(book.levels(), book.width(), book.body().size) {}

void seal(const CodebookImage& layout, std::byte* image) noexcept {
  ImageHead head;
  std::memcpy(&head, image, sizeof head);
  head.fingerprint = fingerprint_of(layout, image);
  head.checksum = checksum_of(head, image);
  std::memcpy(image, &head, sizeof head);
}

void write_image(const CodebookImage& layout, const Array<const float, 2>* centers, const FitReport* report,
                 float temperature, std::byte* image) noexcept {
  std::memset(image, 0, static_cast<size_t>(layout.bytes));
  ImageHead head{};
  std::copy_n(ImageHead::kMagic, sizeof head.magic, head.magic);
  head.version = ImageHead::kVersion;
  head.levels = static_cast<uint32_t>(layout.levels);
  head.width = layout.width;
  for (int l = 0; l < layout.levels; ++l) {
    head.size[l] = layout.level[l].size;
    std::memcpy(image + layout.level[l].centers, centers[l].data,
                sizeof(float) * static_cast<size_t>(head.size[l] * head.width));
    fill_device_part(layout, l, image);
  }
  head.bytes = layout.bytes;
  head.temperature = temperature;
  if (report) head.report = *report;
  std::memcpy(image, &head, sizeof head);
  seal(layout, image);
}

Status read_head(Array<const std::byte, 1> image, ImageHead* out) noexcept {
  const auto wrong = [](const char* what) { return Status::error(Code::corrupt_file, "codebook image: %s", what); };
  ImageHead head;
  if (!image.data || image.shape[0] < static_cast<int64_t>(sizeof head))
    return Status::error(Code::corrupt_file, "codebook image: expected at least %zu bytes, got %" PRId64, sizeof head,
                         image.data ? image.shape[0] : 0);
  std::memcpy(&head, image.data, sizeof head);
  if (std::memcmp(head.magic, ImageHead::kMagic, sizeof head.magic) != 0)
    return wrong("the bytes are no image; for a file of `save` there is load");
  if (head.version != ImageHead::kVersion)
    return Status::error(Code::corrupt_file, "codebook image: version expected %u, got %u", ImageHead::kVersion,
                         head.version);
  bool fits = head.levels >= 1 && head.levels <= kMaxLevels && within({head.width}, 1, 1 << 20);
  for (uint32_t l = 0; fits && l < head.levels; ++l) fits = within({head.size[l]}, 1, 1 << 20);
  if (!fits) return wrong("sizes are out of range");
  const int64_t bytes = CodebookImage(head).bytes;
  if (head.bytes != bytes || image.shape[0] != bytes)
    return Status::error(Code::corrupt_file, "codebook image: expected %" PRId64 " bytes, got %" PRId64, bytes,
                         image.shape[0]);
  *out = head;
  return {};
}

Status check_parts(const CodebookImage& layout, const ImageHead& head, const std::byte* image) noexcept {
  const uint64_t checksum = checksum_of(head, image), fingerprint = fingerprint_of(layout, image);
  if (head.checksum != checksum)
    return Status::error(Code::corrupt_file,
                         "codebook image: checksum expected %016" PRIx64 ", the bytes have %016" PRIx64, head.checksum,
                         checksum);
  if (head.fingerprint != fingerprint)
    return Status::error(Code::corrupt_file,
                         "codebook image: fingerprint expected %016" PRIx64 ", the centers have %016" PRIx64,
                         head.fingerprint, fingerprint);
  return {};
}

Status check_device_image(const char* verb, const Context& context, const Codebook& book) noexcept {
  const auto& image = context.codebook_image;
  const int64_t bytes = book.image().shape[0];
  if (!image.bytes.data || image.bytes.shape[0] != bytes)
    return invalid("%s: context.codebook_image expected [%" PRId64 "] on CUDA, got [%" PRId64 "]", verb, bytes,
                   image.bytes.data ? image.bytes.shape[0] : 0);
  if (reinterpret_cast<uintptr_t>(image.bytes.data) % 64)
    return invalid("%s: context.codebook_image expected aligned to 64 bytes, got address %p", verb,
                   static_cast<const void*>(image.bytes.data));
  if (image.fingerprint != book.fingerprint())
    return invalid("%s: context.codebook_image expected of codebook %016" PRIx64 ", got %016" PRIx64, verb,
                   book.fingerprint(), image.fingerprint);
  return {};
}

}  // namespace hisac
