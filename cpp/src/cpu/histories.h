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
      : x_source({histories.x.data, histories.x.dtype, histories.items(), histories.x.width}, histories.x_ids,
                 histories.x_scale),
        v_source(histories.v, histories.v_ids),
        book_(histories.codes ? book : nullptr),
        in_(histories),
        width_(width) {}

  /// Whether ids, codes, bias and spread let a row be present; its |x|^2 may still be too large.
  bool may_be_present(int64_t row) const noexcept {
    if (!x_source.has(row) || (v_source && !v_source.has(row))) return false;
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
    if (x_source) {
      *norm = x_source.load(row, x);
    } else {
      book_->prototype(codes_of(row), x);
      *norm = simd::kernels().load_row(x, DType::float32, width_, x);
    }
    return below_limit(*norm, x, width_);
  }
  float bias_of(int64_t row) const noexcept { return in_.bias ? in_.bias.data[row] : 0.f; }
  float spread_of(int64_t row) const noexcept { return in_.spread ? in_.spread.data[row] : 0.f; }
  /// [L] of a row that may be present, where codes are read.
  const int32_t* codes_of(int64_t row) const noexcept {
    return in_.codes.data + x_source.number(row) * in_.codes.shape[1];
  }

  /// The code of level 1 of a row; nodes() of one whose code or id is invalid. Where there is a book.
  int64_t node_of(int64_t row) const noexcept {
    const int64_t node = x_source.has(row) ? *codes_of(row) : -1;
    return node >= 0 && node < nodes() ? node : nodes();
  }
  int64_t nodes() const noexcept { return book_->body().size[0]; }

  /// Prefetches a row that may be present. Always inlined, as RowSource::prefetch.
  __attribute__((always_inline)) void prefetch(int64_t row) const noexcept {
    x_source.prefetch(row);
    v_source.prefetch(row);
    if (!x_source) __builtin_prefetch(codes_of(row));
    if (in_.bias) __builtin_prefetch(in_.bias.data + row);
  }

  const RowSource x_source, v_source;  // x_source without data: the rows of codes

 private:
  const Codebook* book_;
  const Histories& in_;
  int64_t width_;
};

}  // namespace hisac::cpu
