// SPDX-License-Identifier: Apache-2.0
// What the fuzz targets share: a check that ends the program, and bytes read as shapes and hostile floats, of any type.
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

  /// Small ones of both signs, and where `hostile` now and then anything at all.
  int64_t integer(bool hostile) {
    const uint8_t kind = byte();
    if (!hostile || kind < 192) return static_cast<int8_t>(byte());
    constexpr int64_t k40 = int64_t{1} << 40;  // a user's votes are fewer, and a row's are
    const int64_t special[] = {INT64_MAX, INT64_MIN, k40, k40 - 1, k40 + 1, k40 / 2, k40 / 2 - 1, int64_t{1} << 62};
    if (kind < 224) return special[byte() % 8];
    uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) bits = bits << 8 | byte();
    return static_cast<int64_t>(bits >> kind % 32);
  }

  /// n values from a pool of at most 64 drawn ones, so that a short input fills a large array.
  std::vector<float> values(int64_t n, bool hostile) {
    return fill<float>(n, [&] { return value(hostile); });
  }
  std::vector<int64_t> integers(int64_t n, bool hostile) {
    return fill<int64_t>(n, [&] { return integer(hostile); });
  }

 private:
  template <class T, class Draw>
  std::vector<T> fill(int64_t n, Draw draw) {
    std::vector<T> pool(static_cast<size_t>(between(1, 64))), out(static_cast<size_t>(n));
    for (T& x : pool) x = draw();
    const size_t step = static_cast<size_t>(between(0, 3)) * 2 + 1;
    for (size_t i = 0; i < out.size(); ++i) out[i] = pool[(i * step + i / pool.size()) % pool.size()];
    return out;
  }

  const uint8_t *data_, *end_;
};

using test::decode;

/// Floats as rows of a type, by truncation; NaN stays NaN in float32 and float16. int8: their bits.
class Typed {
 public:
  Typed(const std::vector<float>& values, hisac::DType dtype, int64_t width)
      : dtype_(dtype), width_(width), memory_(static_cast<int64_t>(values.size()) * hisac::bytes_of(dtype)) {
    for (size_t i = 0; i < values.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, &values[i], 4);
      uint16_t half = static_cast<uint16_t>(bits >> 16);
      if (dtype == hisac::DType::float16) half = to_half(values[i]);
      if (dtype == hisac::DType::int8)
        memory_.data()[i] = static_cast<std::byte>(bits >> 16);
      else if (dtype == hisac::DType::float32)
        std::memcpy(memory_.data() + i * 4, &bits, 4);
      else
        std::memcpy(memory_.data() + i * 2, &half, 2);
    }
  }
  hisac::Rows rows() { return {memory_.data(), dtype_, memory_.count() / (width_ * hisac::bytes_of(dtype_)), width_}; }
  /// What the rows stand for, as floats.
  std::vector<float> values() {
    std::vector<float> out;
    for (const std::byte* at = memory_.data(); at < memory_.data() + memory_.count(); at += hisac::bytes_of(dtype_))
      out.push_back(decode(at, dtype_));
    return out;
  }

 private:
  static uint16_t to_half(float x) {
    if (std::isnan(x)) return 0x7e00;
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float magnitude = std::fabs(x);
    if (magnitude >= 65504.f) return static_cast<uint16_t>(sign | (std::isinf(x) ? 0x7c00 : 0x7bff));
    int exponent;
    const float mantissa = std::frexp(magnitude, &exponent);
    if (exponent < -13) return static_cast<uint16_t>(sign | static_cast<int>(std::ldexp(magnitude, 24)));
    return static_cast<uint16_t>(sign | (exponent + 14) << 10 | (static_cast<int>(std::ldexp(mantissa, 11)) & 0x3ff));
  }
  hisac::DType dtype_;
  int64_t width_;
  test::Guarded<std::byte> memory_;
};

}  // namespace fuzz
