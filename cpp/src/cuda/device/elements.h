// SPDX-License-Identifier: Apache-2.0
// Elements of all types as floats, and floats as sums of bfloat16, which is what tensor cores multiply.
#pragma once
#include "cuda/device/simt.h"
#include "hisac/array.h"

namespace hisac::cuda {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLargest = 3.402823466e38f;
constexpr float kLargestBfloat16 = 3.38953139e38f;
constexpr float kLog2e = 1.44269504088896341f;
constexpr double kLn2 = 0.69314718055994531;

using simt::larger;
using simt::smaller;
SIMT_DEVICE bool finite(float x) { return (simt::bits_of(x) & 0x7f800000u) != 0x7f800000u; }
SIMT_BOTH int least(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

SIMT_BOTH int size_of(DType type) { return type == DType::float32 ? 4 : type == DType::int8 ? 1 : 2; }
SIMT_DEVICE float of_bfloat16(uint32_t low) { return simt::float_of(low << 16); }
/// Number k of a pair of bfloat16 or float16.
SIMT_DEVICE float half_of(uint32_t pair, int k, DType type) {
  const uint32_t bits = pair >> (16 * k);
  return type == DType::bfloat16 ? of_bfloat16(bits) : simt::from_half(static_cast<uint16_t>(bits));
}

SIMT_DEVICE float element(const void* p, DType type, int64_t i) {
  if (type == DType::float32) return static_cast<const float*>(p)[i];
  if (type == DType::int8) return static_cast<const int8_t*>(p)[i];
  return half_of(static_cast<const uint16_t*>(p)[i], 0, type);
}

SIMT_DEVICE void store(void* p, DType type, int64_t i, float x) {
  if (type == DType::float32)
    static_cast<float*>(p)[i] = x;
  else
    static_cast<uint16_t*>(p)[i] = type == DType::bfloat16 ? static_cast<uint16_t>(simt::pack(x, 0)) : simt::to_half(x);
}

/// Eight neighbours; p is aligned to 16 bytes, or 8 of int8, in shared memory.
SIMT_DEVICE void load8(const void* p, DType type, float (&f)[8]) {
  if (type == DType::int8) {
    SIMT_EACH (i, 8) f[i] = static_cast<const int8_t*>(p)[i];
    return;
  }
  const simt::Quad a = *static_cast<const simt::Quad*>(p);
  if (type == DType::float32) {
    const simt::Quad b = static_cast<const simt::Quad*>(p)[1];
    SIMT_EACH (i, 4) {
      f[i] = simt::float_of(a.word[i]);
      f[4 + i] = simt::float_of(b.word[i]);
    }
    return;
  }
  SIMT_EACH (i, 8) f[i] = half_of(a.word[i / 2], i % 2, type);
}

/// The sum of x over four neighbouring lanes.
SIMT_DEVICE float over_quad(float x) {
  x += simt::shuffle_xor(x, 1);
  return x + simt::shuffle_xor(x, 2);
}

/// The number of the lowest bit that is set.
SIMT_DEVICE int lowest(uint32_t bits) { return simt::count_bits((bits & (0u - bits)) - 1); }

/// Thread 0 takes work and the block does it, until there is none: take() sets `found`, which lies in shared memory.
template <class Take, class Do>
SIMT_DEVICE void each_taken(const int32_t& found, Take take, Do work) {
  for (;;) {
    if (simt::thread() == 0) take();
    simt::sync();
    if (!found) return;
    work();
    SIMT_UNLESS_PLANTED(1, simt::sync());
  }
}

/// Whether rows are of whole 16 bytes, and at multiples of 16.
inline bool aligned(const Rows& m) {
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.width * bytes_of(m.dtype) % 16 == 0;
}

/// The row that behaviour b has in a table of so many rows; without ids b; -1: none.
SIMT_DEVICE int64_t row_in_table(const Ids& ids, int64_t b, int64_t table) {
  if (!ids.data) return b;
  const int64_t id = ids.dtype == DType::int64 ? static_cast<const int64_t*>(ids.data)[b]
                                               : int64_t{static_cast<const int32_t*>(ids.data)[b]};
  return static_cast<uint64_t>(id) < static_cast<uint64_t>(table) ? id : -1;
}

/// The users' rows among `rows`, whatever the offsets hold: clamped to [0, rows], and an end to its start.
struct ClampedSpans : Spans {
  int64_t rows = 0;

  SIMT_DEVICE int64_t start(int64_t b) const {
    const int64_t s = value(starts, b);
    return s < 0 ? 0 : s > rows ? rows : s;
  }
  SIMT_DEVICE int64_t end(int64_t b) const {
    const int64_t s = start(b), e = value(ends, b);
    return e < s ? s : e > rows ? rows : e;
  }
  SIMT_DEVICE int64_t length(int64_t b) const {  // end - start, in fewer registers
    const int64_t e = value(ends, b), n = (e > rows ? rows : e) - start(b);
    return n < 0 ? 0 : n;
  }

 private:
  SIMT_DEVICE int64_t value(const void* p, int64_t b) const {
    return dtype == DType::int64 ? static_cast<const int64_t*>(p)[b] : static_cast<const int32_t*>(p)[b];
  }
};

SIMT_DEVICE float rounded(float x) { return of_bfloat16(simt::pack(x, 0)); }

/// Two floats rounded to bfloat16, and in `low` what they lose, in bfloat16 again: x = high + low within 2^-17 |x|.
SIMT_DEVICE uint32_t bf16_parts(float x, float y, uint32_t* low) {
  const uint32_t high = simt::pack(x, y);
  *low = simt::pack(x - of_bfloat16(high), y - simt::float_of(high & 0xffff0000u));
  return high;
}

/// The same for any finite or infinite number. A finite one that would round to infinity is clamped. An infinity is in
/// the high part, and its low part is 0.
SIMT_DEVICE uint32_t bf16_parts_keeping_infinity(float x, float y, uint32_t* low) {
  const float a = finite(x) ? smaller(larger(x, -kLargestBfloat16), kLargestBfloat16) : x,
              b = finite(y) ? smaller(larger(y, -kLargestBfloat16), kLargestBfloat16) : y;
  const uint32_t high = simt::pack(a, b);
  const float da = finite(x) ? x - of_bfloat16(high) : 0.f,
              db = finite(y) ? y - simt::float_of(high & 0xffff0000u) : 0.f;
  *low = simt::pack(da, db);
  return high;
}

/// A logit to which another may be added without overflow; NaN loses.
SIMT_DEVICE float bounded(float x) { return smaller(larger(x, -1.7e38f), 1.7e38f); }
/// A natural logit in base 2, bounded.
SIMT_DEVICE float base2(float x) { return bounded(x * kLog2e); }

}  // namespace hisac::cuda
