// SPDX-License-Identifier: Apache-2.0
// What the fuzz targets share: a check that ends the program, and bytes read as shapes and hostile floats.
#pragma once
#include <cmath>
#include <cstdio>
#include <limits>

#include "support.h"

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                        \
    }                                                                      \
  } while (0)

namespace fuzz {

/// The input, byte by byte; zeros once it is used up.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}
  uint8_t byte() { return data_ < end_ ? *data_++ : uint8_t{0}; }
  int64_t between(int64_t low, int64_t high) { return low + byte() % (high - low + 1); }
  bool flag() { return byte() % 2 != 0; }

  /// Sixteenths within [-8, 8), and where `hostile` now and then anything at all.
  float value(bool hostile) {
    const uint8_t kind = byte();
    if (!hostile || kind < 224) return static_cast<float>(static_cast<int8_t>(byte())) / 16;
    constexpr float kMax = std::numeric_limits<float>::max(), kInf = std::numeric_limits<float>::infinity();
    const float special[] = {std::numeric_limits<float>::quiet_NaN(),
                             kInf,
                             -kInf,
                             -0.f,
                             kMax,
                             -kMax,
                             0x1p-149f,
                             0x1p50f,
                             0x1.fp49f,
                             -0x1p50f,
                             1e-30f,
                             0x1p-126f,
                             88.f,
                             -3e4f,
                             65504.f,
                             0x1p-24f};
    if (kind < 248) return special[byte() % 16];
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) bits = bits << 8 | byte();
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
  }

  /// n values from a pool of at most 64 drawn ones, so that a short input fills a large array.
  std::vector<float> values(int64_t n, bool hostile) {
    std::vector<float> pool(static_cast<size_t>(between(1, 64))), out(static_cast<size_t>(n));
    for (float& x : pool) x = value(hostile);
    const size_t step = static_cast<size_t>(between(0, 3)) * 2 + 1;
    for (size_t i = 0; i < out.size(); ++i) out[i] = pool[(i * step + i / pool.size()) % pool.size()];
    return out;
  }

 private:
  const uint8_t *data_, *end_;
};

}  // namespace fuzz
