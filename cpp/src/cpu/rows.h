// SPDX-License-Identifier: Apache-2.0
// Loads a behaviour's row of x or v. Types, scales and ids are handled here: a loaded row is float32 with its sum of
// squares, and has the same bits whether it was gathered by id or read in order.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstddef>

#include "base/radix_sort.h"
#include "cpu/simd/kernels.h"
#include "hisac/array.h"

namespace hisac::cpu {

/// out [width] = a row of float32, bfloat16 or float16; returns its sum of squares.
inline float load_row(const Rows& rows, int64_t row, float* out) noexcept {
  const std::byte* const source = static_cast<const std::byte*>(rows.data) + row * rows.width * bytes_of(rows.dtype);
  return simd::kernels().load_row(source, rows.dtype, rows.width, out);
}

/// The power of two that makes a sum of n weights, each at most 1, at most 1, so that a sum of large v stays finite.
inline float scale_of(int64_t n) noexcept {
  return 1.f / static_cast<float>(uint64_t{1} << bits_of(static_cast<uint64_t>(n > 1 ? n - 1 : 0)));
}

/// One row of x or v for each behaviour t in [0, T).
class RowSource {
 public:
  RowSource(const Rows& rows, const Ids& ids, Array<const float, 1> scale = {}) noexcept
      : k_(simd::kernels()), rows_(rows), bytes_(rows.width * bytes_of(rows.dtype)), ids_(ids), scale_(scale) {}

  explicit operator bool() const noexcept { return rows_.data != nullptr; }
  bool has(int64_t t) const noexcept { return static_cast<uint64_t>(number(t)) < static_cast<uint64_t>(rows_.rows); }
  /// The row of behaviour t.
  int64_t number(int64_t t) const noexcept { return ids_ ? ids_[t] : t; }

  /// out [width] = the existing row of behaviour t; returns its sum of squares.
  float load(int64_t t, float* out) const noexcept {
    if (rows_.dtype != DType::int8) return k_.load_row(row(t), rows_.dtype, rows_.width, out);
    const float scale = !scale_ ? 1.f : scale_.data[scale_.shape[0] == 1 ? 0 : number(t)];
    return k_.load_int8(reinterpret_cast<const int8_t*>(row(t)), scale, rows_.width, out);
  }

  /// The existing row of behaviour t where x is of bfloat16; else null.
  const std::byte* as_bfloat16(int64_t t) const noexcept {
    return rows_.data && rows_.dtype == DType::bfloat16 ? row(t) : nullptr;
  }

  /// sum [width] += factor times the existing row of behaviour t; scratch [width].
  void add(int64_t t, float factor, float* sum, float* scratch) const noexcept {
    const float* source = scratch;
    if (rows_.dtype == DType::float32)
      source = reinterpret_cast<const float*>(row(t));
    else
      load(t, scratch);
    k_.add_row(rows_.width, source, factor, sum);
  }

  /// Prefetches the row of behaviour t. Always inlined: GCC drops a call to a function that only prefetches.
  __attribute__((always_inline)) void prefetch(int64_t t) const noexcept {
    if (!rows_.data || !has(t)) return;
    const std::byte* const first = row(t);
    for (int64_t i = 0; i < bytes_; i += 64) __builtin_prefetch(first + i);
    __builtin_prefetch(first + bytes_ - 1);  // rows need not begin with a cache line
  }

  /// Queues the rows of behaviours [begin, end), one span each at most.
  void queue_rows(int64_t begin, int64_t end, simd::Prefetcher& prefetcher) const noexcept {
    if (!ids_) return prefetcher.add(rows_.data, begin * bytes_, end * bytes_);
    for (int64_t t = begin; t < end; ++t)
      if (has(t)) prefetcher.add(rows_.data, number(t) * bytes_, (number(t) + 1) * bytes_);
  }

 private:
  const std::byte* row(int64_t t) const noexcept {
    return static_cast<const std::byte*>(rows_.data) + number(t) * bytes_;
  }

  const simd::Kernels& k_;
  Rows rows_;
  int64_t bytes_;
  Ids ids_;
  Array<const float, 1> scale_;
};

/// |x|^2 < 2^100, summed in float64.
inline bool below_limit_in_float64(const float* x, int64_t width) noexcept {
  double squares = 0;
  for (int64_t d = 0; d < width; ++d) squares += double(x[d]) * x[d];
  return squares < 0x1p100;
}
/// Whether |x|^2 < 2^100; false for NaN. norm: |x|^2 in float32, whose error could decide only within a factor of 2.
inline bool below_limit(float norm, const float* x, int64_t width) noexcept {
  return norm < 0x1p99f || (norm < 0x1p101f && below_limit_in_float64(x, width));
}
/// No NaN, no infinity. squares: their sum, which decides unless it overflows.
inline bool finite(const float* x, int64_t width, float squares) noexcept {
  bool ok = true;
  if (squares <= FLT_MAX) return ok;
  for (int64_t d = 0; d < width; ++d) ok &= std::fabs(x[d]) <= FLT_MAX;
  return ok;
}

}  // namespace hisac::cpu
