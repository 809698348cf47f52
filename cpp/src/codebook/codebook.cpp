// SPDX-License-Identifier: Apache-2.0
#include "hisac/codebook.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "codebook/body.h"
#include "codebook/checks.h"

namespace hisac {
namespace {

Status check_centers(const Array<const float, 2>* centers, int levels) noexcept {
  if (levels < 1 || levels > kMaxLevels)
    return invalid("Codebook: expected 1 to %d levels, got %d", kMaxLevels, levels);
  const int64_t width = centers[0].shape[1];
  if (width < 1 || width > (1 << 20)) return invalid("Codebook: expected a width of 1 to 2^20, got %" PRId64, width);
  for (int l = 0; l < levels; ++l) {
    const int64_t size = centers[l].shape[0];
    if (centers[l].shape[1] != width)
      return invalid("Codebook: centers of level %d are %s, level 0 has D = %" PRId64 ": D differs", l,
                     ShapeText(centers[l].shape).text, width);
    if (size < 1 || size > (1 << 20))
      return invalid("Codebook: expected 1 to 2^20 codes at level %d, got %" PRId64, l, size);
    for (int64_t i = 0; i < size * width; ++i)
      if (!std::isfinite(centers[l].data[i]))
        return invalid("Codebook: expected finite centers, got %g at %s of level %d", double(centers[l].data[i]),
                       ShapeText({i / width, i % width}).text, l);
  }
  return {};
}

/// What stands beside the centers.
Status check_notes(int levels, const FitReport* report, float temperature) noexcept {
  if (!(temperature >= 0 && std::isfinite(temperature)))
    return invalid("Codebook: temperature expected finite and > 0, or 0 for none, got %g", double(temperature));
  if (!report) return {};
  bool right = report->rows > 0 && report->left_out >= 0;
  for (int l = 0; l < levels; ++l)
    right = right && report->iterations[l] >= 0 && report->error[l] >= 0 && std::isfinite(report->error[l]) &&
            report->unused[l] >= 0;
  return right ? Status() : invalid("Codebook: expected the report of a fit, got another");
}

/// The strides of a body, and whether it is wide. An error above 2^64 leaves, whose numbers have 64 bits.
Status count_leaves(const CodebookImage& layout, Codebook::Body* body) noexcept {
  constexpr uint64_t kMost = std::numeric_limits<uint64_t>::max();
  unsigned __int128 leaves = 1;
  for (int l = layout.levels - 1; l >= 0; --l) {
    body->stride[l] = static_cast<uint64_t>(leaves);
    leaves *= static_cast<uint64_t>(layout.level[l].size);
    if (leaves > kMost + static_cast<unsigned __int128>(l == 0))
      return invalid("Codebook: expected at most 2^64 leaves, got more");
  }
  body->wide = leaves > kMost / 2;
  return {};
}

constexpr int64_t kBodyBytes = (sizeof(Codebook::Body) + 63) / 64 * 64;

/// What a body and its packed levels take, a multiple of 64.
int64_t scratch_bytes(const CodebookImage& layout) noexcept {
  int64_t bytes = kBodyBytes;
  for (int l = 0; l < layout.levels; ++l)
    bytes += Level::floats(layout.level[l].size, layout.width) * int64_t{sizeof(float)};
  return bytes;
}

/// Puts the body at the start of `scratch`, and the levels of the image, packed, behind it.
Codebook::Body* pack(Codebook::Body body, const CodebookImage& layout, const std::byte* image,
                     std::byte* scratch) noexcept {
  static_assert(std::is_trivially_destructible_v<Codebook::Body>, "its memory is freed as it is");
  body.levels = layout.levels;
  body.width = layout.width;
  body.image = reinterpret_cast<const ImageHead*>(image);
  float* memory = reinterpret_cast<float*>(scratch + kBodyBytes);
  for (int l = 0; l < layout.levels; ++l) {
    const int64_t size = body.size[l] = layout.level[l].size;
    const auto* const centers = reinterpret_cast<const float*>(image + layout.level[l].centers);
    body.level[l] = Level::make(size, layout.width, centers, memory);
    memory += Level::floats(size, layout.width);
  }
  return new (scratch) Codebook::Body(body);
}

}  // namespace

Codebook::~Codebook() { std::free(memory_); }

Codebook& Codebook::operator=(Codebook&& other) noexcept {
  body_ = std::exchange(other.body_, nullptr);
  std::free(std::exchange(memory_, std::exchange(other.memory_, nullptr)));
  return *this;
}

Status Codebook::build(const Array<const float, 2>* centers, int levels, Codebook* out, const FitReport* report,
                       float temperature) noexcept {
  HISAC_TRY(check_centers(centers, levels));
  HISAC_TRY(check_notes(levels, report, temperature));
  if (report && temperature == 0) {
    const double found = kTemperatureOfError * report->error[levels - 1];
    if (found > 0 && found <= double(std::numeric_limits<float>::max())) temperature = static_cast<float>(found);
  }
  int64_t sizes[kMaxLevels];
  for (int l = 0; l < levels; ++l) sizes[l] = centers[l].shape[0];
  const CodebookImage layout(levels, centers[0].shape[1], sizes);
  Body body;
  HISAC_TRY(count_leaves(layout, &body));
  const int64_t scratch = scratch_bytes(layout), bytes = scratch + layout.bytes;
  std::byte* const memory = static_cast<std::byte*>(std::aligned_alloc(64, static_cast<size_t>(bytes)));
  if (!memory) return Status::error(Code::out_of_memory, "Codebook: out of memory for %" PRId64 " bytes", bytes);
  write_image(layout, centers, report, temperature, memory + scratch);
  Codebook made;
  made.body_ = pack(body, layout, memory + scratch, memory);
  made.memory_ = memory;
  *out = std::move(made);
  return {};
}

Array<const std::byte, 1> Codebook::image() const noexcept {
  if (!body_) return {};
  return {reinterpret_cast<const std::byte*>(body_->image), {body_->image->bytes}};
}

size_t Codebook::view_scratch(Array<const std::byte, 1> image) noexcept {
  ImageHead head;
  return read_head(image, &head).ok() ? static_cast<size_t>(scratch_bytes(CodebookImage(head))) : 0;
}

Status Codebook::view(Array<const std::byte, 1> image, Array<std::byte, 1> scratch, Codebook* out) noexcept {
  ImageHead head;
  HISAC_TRY(read_head(image, &head));
  if (reinterpret_cast<uintptr_t>(image.data) % 64)
    return invalid("codebook image: expected aligned to 64 bytes, got address %p",
                   static_cast<const void*>(image.data));
  const CodebookImage layout(head);
  HISAC_TRY(check_parts(layout, head, image.data));
  Array<const float, 2> centers[kMaxLevels];
  for (int l = 0; l < layout.levels; ++l)
    centers[l] = {reinterpret_cast<const float*>(image.data + layout.level[l].centers), {head.size[l], head.width}};
  Body body;
  Status parts = check_centers(centers, layout.levels);
  if (parts.ok()) parts = check_notes(layout.levels, head.report.rows ? &head.report : nullptr, head.temperature);
  if (parts.ok()) parts = count_leaves(layout, &body);
  if (!parts.ok()) return Status::error(Code::corrupt_file, "codebook image: %s", parts.what());
  if (!scratch.data || scratch.shape[0] < scratch_bytes(layout) || reinterpret_cast<uintptr_t>(scratch.data) % 64)
    return invalid("codebook image: scratch expected [%" PRId64 "] aligned to 64 bytes, got [%" PRId64 "] at %p",
                   scratch_bytes(layout), scratch.shape[0], static_cast<void*>(scratch.data));
  Codebook made;
  made.body_ = pack(body, layout, image.data, scratch.data);
  *out = std::move(made);
  return {};
}

int Codebook::levels() const noexcept { return body_ ? body_->levels : 0; }
int64_t Codebook::width() const noexcept { return body_ ? body_->width : 0; }
int64_t Codebook::size(int level) const noexcept { return body_->size[level]; }
const float* Codebook::centers(int level) const noexcept { return body_->level[level].centers; }
uint64_t Codebook::fingerprint() const noexcept { return body_ ? body_->image->fingerprint : 0; }
float Codebook::temperature() const noexcept { return body_ ? body_->image->temperature : 0; }
const FitReport* Codebook::report() const noexcept {
  return body_ && body_->image->report.rows > 0 ? &body_->image->report : nullptr;
}

bool Codebook::valid(const int32_t* codes) const noexcept {
  bool ok = true;
  for (int l = 0; l < body_->levels; ++l) ok &= static_cast<uint32_t>(codes[l]) < static_cast<uint32_t>(body_->size[l]);
  return ok;
}

uint64_t Codebook::leaf(const int32_t* codes) const noexcept {
  uint64_t leaf = 0;
  for (int l = 0; l < body_->levels; ++l) leaf += static_cast<uint64_t>(codes[l]) * body_->stride[l];
  return leaf;
}

void Codebook::prototype(const int32_t* codes, float* out) const noexcept {
  const int64_t width = body_->width;
  std::memset(out, 0, sizeof(float) * static_cast<size_t>(width));
  if (!valid(codes)) return;
  for (int l = 0; l < body_->levels; ++l) {
    const float* const c = body_->level[l].centers + codes[l] * width;
    for (int64_t d = 0; d < width; ++d) out[d] += c[d];
  }
}

Status leaves(const Codebook& book, Array<const int32_t, 2> codes, Array<int64_t, 1> out) noexcept {
  HISAC_TRY(check_book("leaves", &book));
  HISAC_TRY(check_codes("leaves", book, codes, codes.shape[0]));
  HISAC_TRY(check_shape("leaves", "out", {codes.shape[0]}, out));
  if (book.body().wide) return invalid("leaves: expected fewer than 2^63 leaves in the codebook, got more");
  for (int64_t i = 0; i < codes.shape[0]; ++i) {
    const int32_t* const c = codes.data + i * book.levels();
    out.data[i] = book.valid(c) ? static_cast<int64_t>(book.leaf(c)) : -1;
  }
  return {};
}

}  // namespace hisac
