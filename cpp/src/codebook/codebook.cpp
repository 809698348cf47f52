// SPDX-License-Identifier: Apache-2.0
#include "hisac/codebook.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>

#include "codebook/body.h"
#include "codebook/checks.h"

namespace hisac {
namespace {

uint64_t fnv(uint64_t hash, const void* data, size_t size) noexcept {
  const unsigned char* const bytes = static_cast<const unsigned char*>(data);
  for (size_t i = 0; i < size; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3u;
  return hash;
}

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
  return {};
}

}  // namespace

Codebook::~Codebook() { delete body_; }

Codebook& Codebook::operator=(Codebook&& other) noexcept {
  delete std::exchange(body_, std::exchange(other.body_, nullptr));
  return *this;
}

Status Codebook::build(const Array<const float, 2>* centers, int levels, Codebook* out) noexcept {
  HISAC_TRY(check_centers(centers, levels));
  const int64_t width = centers[0].shape[1];
  int64_t floats = 0;
  for (int l = 0; l < levels; ++l) floats += Level::floats(centers[l].shape[0], width);
  std::unique_ptr<Body> body(new (std::nothrow) Body);
  if (body) body->memory = static_cast<float*>(std::aligned_alloc(64, sizeof(float) * static_cast<size_t>(floats)));
  if (!body || !body->memory)
    return Status::error(Code::out_of_memory, "Codebook: out of memory for %" PRId64 " floats", floats);
  body->levels = levels;
  body->width = width;
  constexpr uint64_t kMost = std::numeric_limits<uint64_t>::max();
  unsigned __int128 leaves = 1;
  for (int l = levels - 1; l >= 0; --l) {
    body->size[l] = centers[l].shape[0];
    body->stride[l] = static_cast<uint64_t>(leaves);
    leaves *= static_cast<uint64_t>(body->size[l]);
    if (leaves > kMost + static_cast<unsigned __int128>(l == 0))  // 2^64 leaves have numbers of 64 bits
      return Status::error(Code::invalid_argument, "Codebook: expected at most 2^64 leaves, got more");
  }
  body->wide = leaves > kMost / 2;
  float* memory = body->memory;
  uint64_t hash = fnv(0xcbf29ce484222325u, &width, sizeof width);
  for (int l = 0; l < levels; ++l) {
    const int64_t size = body->size[l];
    body->level[l] = Level::make(size, width, centers[l].data, memory);
    memory += Level::floats(size, width);
    hash = fnv(hash, &size, sizeof size);
    hash = fnv(hash, body->level[l].centers, sizeof(float) * static_cast<size_t>(size * width));
  }
  body->fingerprint = hash;
  delete std::exchange(out->body_, body.release());
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
