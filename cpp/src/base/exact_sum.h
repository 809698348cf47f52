// SPDX-License-Identifier: Apache-2.0
// A sum of float64 values that does not depend on their order: fixed point, in digits of 32 bits over the whole range.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace hisac {

/// Values of at least 0, finite, of which a sum has fewer than 2^31 between two calls of `carry`. Digit i counts units
/// of 2^(32 i - 1074). Sums add digit by digit.
struct ExactSum {
  static constexpr int kDigits = 68;

  static void add(int64_t* digits, double value) noexcept {
    uint64_t bits;
    std::memcpy(&bits, &value, 8);
    const int exponent = static_cast<int>(bits >> 52), at = exponent ? exponent - 1 : 0, shift = at % 32;
    const uint64_t mantissa = (bits & ((uint64_t{1} << 52) - 1)) | (exponent ? uint64_t{1} << 52 : 0);
    const uint64_t low = (mantissa & 0xffffffffu) << shift, high = (mantissa >> 32) << shift;
    int64_t* const digit = digits + at / 32;
    digit[0] += static_cast<int64_t>(low & 0xffffffffu);
    digit[1] += static_cast<int64_t>((low >> 32) + (high & 0xffffffffu));
    digit[2] += static_cast<int64_t>(high >> 32);
  }

  /// The same sum with every digit below 2^32.
  static void carry(int64_t* digits) noexcept {
    for (int i = 0; i + 1 < kDigits; ++i) {
      digits[i + 1] += digits[i] >> 32;
      digits[i] &= 0xffffffff;
    }
  }

  /// The sum, rounded once, to nearest even. Digits as `carry` leaves them.
  static double value(const int64_t* digits) noexcept {
    int top = kDigits - 1;
    while (top > 1 && digits[top] == 0) --top;
    uint64_t head = static_cast<uint64_t>(digits[top]), tail = static_cast<uint64_t>(digits[top - 1]) << 32;
    if (top > 1) tail |= static_cast<uint64_t>(digits[top - 2]);
    bool more = false;
    for (int i = 0; i < top - 2; ++i) more |= digits[i] != 0;
    int shift = 0;  // the top 64 bits of head and tail, in head
    for (; shift < 64 && head >> 63 == 0; ++shift) {
      head = head << 1 | tail >> 63;
      tail <<= 1;
    }
    head |= static_cast<uint64_t>(tail != 0 || more);
    return std::ldexp(static_cast<double>(head), 32 * top - 1074 - shift);
  }
};

}  // namespace hisac
