// SPDX-License-Identifier: Apache-2.0
#include "hisac/codebook.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "codebook/body.h"
#include "codebook/checks.h"

namespace hisac {
namespace {

struct Fnv {
  uint64_t value = 0xcbf29ce484222325u;
  void add(const void* data, size_t size) noexcept {
    const unsigned char* bytes = static_cast<const unsigned char*>(data);
    for (size_t i = 0; i < size; ++i) value = (value ^ bytes[i]) * 0x100000001b3u;
  }
};

Status check_centers(const Array<const float, 2>* centers, int levels) noexcept {
  if (levels < 1 || levels > kMaxLevels)
    return Status::error(Code::invalid_argument, "Codebook: expected 1 to %d levels, got %d", kMaxLevels, levels);
  const int64_t width = centers[0].shape[1];
  if (width < 1 || width > (1 << 20))
    return Status::error(Code::invalid_argument, "Codebook: expected a width of 1 to 2^20, got %" PRId64, width);
  for (int l = 0; l < levels; ++l) {
    const int64_t size = centers[l].shape[0];
    if (centers[l].shape[1] != width)
      return Status::error(Code::invalid_argument,
                           "Codebook: centers of level %d are [%" PRId64 ", %" PRId64 "], level 0 has D = %" PRId64
                           ": D differs",
                           l, size, centers[l].shape[1], width);
    if (size < 1 || size > (1 << 20))
      return Status::error(Code::invalid_argument, "Codebook: expected 1 to 2^20 codes at level %d, got %" PRId64, l,
                           size);
    for (int64_t i = 0; i < size * width; ++i)
      if (!std::isfinite(centers[l].data[i]))
        return Status::error(Code::invalid_argument,
                             "Codebook: expected finite centers, got %g at [%" PRId64 ", %" PRId64 "] of level %d",
                             double(centers[l].data[i]), i / width, i % width, l);
  }
  constexpr uint64_t kMost = std::numeric_limits<uint64_t>::max();
  uint64_t below = 1;  // leaves below a node of the level
  for (int l = levels - 1; l >= 0; --l) {
    const uint64_t size = static_cast<uint64_t>(centers[l].shape[0]);
    const bool fits = l > 0 ? below <= kMost / size : size - 1 <= (kMost - (below - 1)) / below;
    if (!fits) return Status::error(Code::invalid_argument, "Codebook: expected at most 2^64 leaves, got more");
    below *= size;
  }
  return {};
}

void destroy(Codebook::Body* body) noexcept {
  if (body) std::free(body->memory);
  delete body;
}

}  // namespace

Codebook::~Codebook() { destroy(body_); }

Codebook& Codebook::operator=(Codebook&& other) noexcept {
  Body* const taken = other.body_;
  other.body_ = nullptr;
  destroy(body_);
  body_ = taken;
  return *this;
}

Status Codebook::build(const Array<const float, 2>* centers, int levels, Codebook* out) noexcept {
  HISAC_TRY(check_centers(centers, levels));
  const int64_t width = centers[0].shape[1];
  int64_t floats = 0;
  for (int l = 0; l < levels; ++l) floats += (Level::floats(centers[l].shape[0], width) + 15) / 16 * 16;
  Body* const body = new (std::nothrow) Body;
  float* memory = static_cast<float*>(std::aligned_alloc(64, sizeof(float) * static_cast<size_t>(floats)));
  if (!body || !memory) {
    std::free(memory);
    delete body;
    return Status::error(Code::out_of_memory, "Codebook: out of memory for %" PRId64 " floats", floats);
  }
  body->memory = memory;
  body->levels = levels;
  body->width = width;
  Fnv hash;
  hash.add(&width, sizeof width);
  for (int l = 0; l < levels; ++l) {
    const int64_t size = body->size[l] = centers[l].shape[0];
    body->level[l] = Level::make(size, width, centers[l].data, memory);
    memory += (Level::floats(size, width) + 15) / 16 * 16;
    hash.add(&size, sizeof size);
    hash.add(body->level[l].centers, sizeof(float) * static_cast<size_t>(size * width));
  }
  body->fingerprint = hash.value;
  uint64_t stride = 1;
  for (int l = levels - 1; l >= 0; --l) {
    body->stride[l] = stride;
    const uint64_t size = static_cast<uint64_t>(body->size[l]);
    if (l == 0 && stride > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) / size) body->wide = true;
    stride *= size;
  }
  destroy(out->body_);
  out->body_ = body;
  return {};
}

int Codebook::levels() const noexcept { return body_ ? body_->levels : 0; }
int64_t Codebook::width() const noexcept { return body_ ? body_->width : 0; }
int64_t Codebook::size(int level) const noexcept { return body_->size[level]; }
const float* Codebook::centers(int level) const noexcept { return body_->level[level].centers; }
uint64_t Codebook::fingerprint() const noexcept { return body_ ? body_->fingerprint : 0; }

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
  if (book.body().wide)
    return Status::error(Code::invalid_argument, "leaves: expected fewer than 2^63 leaves in the codebook, got more");
  for (int64_t i = 0; i < codes.shape[0]; ++i) {
    const int32_t* const c = codes.data + i * book.levels();
    out.data[i] = book.valid(c) ? static_cast<int64_t>(book.leaf(c)) : -1;
  }
  return {};
}

}  // namespace hisac
