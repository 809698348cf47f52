// SPDX-License-Identifier: Apache-2.0
// Loads a user's behaviours. Absent rows, prototypes in place of x, biases and spreads are handled here, as types,
// scales and ids are in rows.h.
#pragma once
#include <cfloat>
#include <cmath>

#include "codebook/body.h"
#include "cpu/rows.h"
#include "cpu/simd/kernels.h"
#include "hisac/histories.h"

namespace hisac::cpu {

class RowLoader {
 public:
  /// width: D. book null: codes are not read.
  RowLoader(const Codebook* book, const Histories& histories, int64_t width) noexcept
      : book_(histories.codes ? book : nullptr),
        in_(histories),
        width_(width),
        x_({histories.x.data, histories.x.dtype, histories.items(), histories.x.width}, histories.x_ids,
           histories.x_scale),
        v_(histories.v, histories.v_ids) {}

  /// Whether ids, codes, bias and spread let a row be present; its |x|^2 may still be too large.
  bool may_be_present(int64_t row) const noexcept {
    if (!x_.has(row) || (v_ && !v_.has(row))) return false;
    const float spread = spread_of(row);
    return std::fabs(bias_of(row)) <= FLT_MAX && spread >= 0 && spread <= FLT_MAX &&  // false for NaN
           (!book_ || book_->valid(codes_of(row)));
  }
  /// x [D] = a row, *norm = its sum of squares; false for an absent row.
  bool load_x(int64_t row, float* x, float* norm) const noexcept {
    return may_be_present(row) && load_x_unchecked(row, x, norm);
  }
  /// load_x of a row that may be present.
  bool load_x_unchecked(int64_t row, float* x, float* norm) const noexcept {
    if (x_) {
      *norm = x_.load(row, x);
    } else {
      book_->prototype(codes_of(row), x);
      *norm = simd::kernels().load_row(x, DType::float32, width_, x);
    }
    return below_limit(*norm, x, width_);
  }
  /// A row that may be present where x is of bfloat16; else null.
  const std::byte* x_as_bfloat16(int64_t row) const noexcept { return x_.as_bfloat16(row); }
  /// Loads v [V] of a row that may be present.
  void load_v(int64_t row, float* v) const noexcept { v_.load(row, v); }
  /// sum [V] += factor times v of a present row; scratch [V].
  void add_v(int64_t row, float factor, float* sum, float* scratch) const noexcept {
    v_.add(row, factor, sum, scratch);
  }
  float bias_of(int64_t row) const noexcept { return in_.bias ? in_.bias.data[row] : 0.f; }
  float spread_of(int64_t row) const noexcept { return in_.spread ? in_.spread.data[row] : 0.f; }
  /// [L] of a row that may be present, where codes are read.
  const int32_t* codes_of(int64_t row) const noexcept { return in_.codes.data + x_.number(row) * in_.codes.shape[1]; }

  /// Prefetches a row that may be present. Always inlined, as RowSource::prefetch.
  __attribute__((always_inline)) void prefetch(int64_t row) const noexcept {
    x_.prefetch(row);
    v_.prefetch(row);
    if (!x_) __builtin_prefetch(codes_of(row));
    if (in_.bias) __builtin_prefetch(in_.bias.data + row);
  }
  /// Queues x and v of the rows [begin, end).
  void queue_rows(int64_t begin, int64_t end, simd::Prefetcher& prefetcher) const noexcept {
    x_.queue_rows(begin, end, prefetcher);
    v_.queue_rows(begin, end, prefetcher);
  }

 private:
  const Codebook* book_;
  const Histories& in_;
  int64_t width_;
  RowSource x_, v_;  // x_ without data: the rows of codes
};

}  // namespace hisac::cpu
