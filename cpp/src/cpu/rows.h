// SPDX-License-Identifier: Apache-2.0
// The loading of a behaviour's row of x or v. Types, scales, ids and their absence end here: what comes out is float32
// and its sum of squares, the same bits whether a row was gathered or stood in order.
#pragma once
#include <cfloat>
#include <cstddef>

#include "cpu/simd/kernels.h"
#include "hisac/array.h"

namespace hisac::cpu {

/// Rows of one behaviour each, t in [0, T).
class RowSource {
 public:
  RowSource(const Rows& rows, const Ids& ids, Array<const float, 1> scale = {}) noexcept;

  explicit operator bool() const noexcept { return data_ != nullptr; }
  bool has(int64_t t) const noexcept { return static_cast<uint64_t>(row_of(t)) < static_cast<uint64_t>(rows_); }

  /// out [width] = the row of behaviour t and *norm its sum of squares; false where there is none.
  bool load(int64_t t, float* out, float* norm) const noexcept;

  /// The row of behaviour t, which there is, if it is of bfloat16; else null.
  const std::byte* as_bfloat16(int64_t t) const noexcept {
    return data_ && dtype_ == DType::bfloat16 ? data_ + row_of(t) * bytes_ : nullptr;
  }

  /// sum [width] += factor times the row of behaviour t, which there is; room [width].
  void add(int64_t t, float factor, float* sum, float* room) const noexcept;

  /// Asks for the row of behaviour t ahead of its use. Inlined always: GCC drops a call that has no result and only
  /// prefetches.
  __attribute__((always_inline)) void prefetch(int64_t t) const noexcept {
    if (!data_ || !has(t)) return;
    const std::byte* const row = data_ + row_of(t) * bytes_;
    for (int64_t i = 0; i < bytes_; i += 64) __builtin_prefetch(row + i);
    __builtin_prefetch(row + bytes_ - 1);  // rows need not begin with a cache line
  }

  /// Adds the rows of behaviours [begin, end) to what is to be fetched; at most a span each.
  void look_ahead(int64_t begin, int64_t end, simd::Ahead& ahead) const noexcept;

 private:
  int64_t row_of(int64_t t) const noexcept { return ids_ ? ids_[t] : t; }

  const simd::Kernels& k_;
  const std::byte* data_;
  DType dtype_;
  int64_t rows_, width_, bytes_;
  Ids ids_;
  Array<const float, 1> scale_;
};

/// Where float32 is too near to tell.
bool below_limit_in_float64(const float* x, int64_t width) noexcept;
/// |x|^2 below 2^100, decided in float64 where float32 is too near; NaN is not.
inline bool below_limit(float norm, const float* x, int64_t width) noexcept {
  return norm < 0x1p99f || (norm < 0x1p101f && below_limit_in_float64(x, width));
}
/// No NaN, no infinity.
bool finite(const float* x, int64_t width) noexcept;
/// The same, given the sum of squares, which decides unless it overflows.
inline bool finite(const float* x, int64_t width, float squares) noexcept {
  return squares <= FLT_MAX || finite(x, width);
}

}  // namespace hisac::cpu
