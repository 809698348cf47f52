// SPDX-License-Identifier: Apache-2.0
// A checksum of bytes: sums of words side by side, at the speed of memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace hisac {

/// FNV-1a, byte by byte.
inline uint64_t fnv(uint64_t hash, const void* data, size_t size) noexcept {
  const unsigned char* const bytes = static_cast<const unsigned char*>(data);
  for (size_t i = 0; i < size; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3u;
  return hash;
}
constexpr uint64_t kFnv = 0xcbf29ce484222325u;

template <int kSums>
class Checksum {
 public:
  Checksum() noexcept {
    for (int i = 0; i < kSums; ++i) sums_[i] = static_cast<uint64_t>(i) + 1;
  }
  /// A multiple of 8 kSums bytes.
  void add(const void* data, size_t bytes) noexcept {
    for (size_t at = 0; at < bytes; at += sizeof sums_) {
      uint64_t words[kSums];
      std::memcpy(words, static_cast<const std::byte*>(data) + at, sizeof words);
      for (int i = 0; i < kSums; ++i) {
        const uint64_t mixed = (sums_[i] ^ words[i]) * 0x9e3779b97f4a7c15u;
        sums_[i] = mixed << 29 | mixed >> 35;
      }
    }
  }
  uint64_t value() const noexcept { return fnv(kFnv, sums_, sizeof sums_); }

 private:
  uint64_t sums_[kSums];
};

}  // namespace hisac
