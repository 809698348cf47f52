// SPDX-License-Identifier: Apache-2.0
#include "cpu/row_gradient.h"

#include <numeric>

#include "base/parallel.h"
#include "base/radix_sort.h"

namespace hisac::cpu {

constexpr int64_t kAhead = 8;  // slots

void fill(const Context& context, float* p, int64_t n, float value) noexcept {
  if (!p) return;
  parallel_pieces(context, n, int64_t{1} << 16,
                  [&](int64_t begin, int64_t end, int) { std::fill(p + begin, p + end, value); });
}

void RowGradient::clear(const Context& context, const Waves& waves) noexcept {
  if (*this) fill(context, row_, (gathers() ? waves.behaviours() : out_.shape[0]) * out_.shape[1]);
}

/// Slots are read in the order of the table, which is any order.
__attribute__((always_inline)) inline void RowGradient::prefetch(int64_t at, int64_t n) const noexcept {
  const int64_t bytes = 4 * out_.shape[1];
  if (at >= n) return;
  const auto* const row = reinterpret_cast<const std::byte*>(row_) + slot_[at] * bytes;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

/// out [width] = the sum of the slots at [begin, end).
void RowGradient::add_up(int64_t begin, int64_t end, float* out) const noexcept {
  constexpr int64_t kColumns = 64;
  const int64_t width = out_.shape[1];
  for (int64_t c = 0; c < width; c += kColumns) {
    const int64_t n = std::min(kColumns, width - c);
    double sum[kColumns] = {};
    for (int64_t i = begin; i < end; ++i) {
      const float* const x = row_ + slot_[i] * width + c;
      for (int64_t d = 0; d < n; ++d) sum[d] += double(x[d]);
    }
    for (int64_t d = 0; d < n; ++d) out[c + d] = static_cast<float>(sum[d]);
  }
}

void RowGradient::finish(const Context& context, const Waves& waves) noexcept {
  if (!gathers()) return;
  const int64_t n = waves.behaviours();
  std::iota(slot_, slot_ + n, int64_t{0});
  radix_sort<true>(n, 0, bits_of(static_cast<uint64_t>(table_rows_)), key_, spare_key_, slot_, spare_slot_);
  parallel_for(context, out_.shape[0], [&](int64_t first, int64_t last, int) {
    int64_t at = n;  // the first slot of a row, if the row has any
    for (int64_t r = first; r < last; ++r) {
      const uint64_t row = static_cast<uint64_t>(rows_ ? rows_[r] : r);
      const bool here = (at == 0 || key_[at - 1] < row) && (at == n || key_[at] >= row);
      if (!here) at = std::lower_bound(key_, key_ + n, row) - key_;
      const int64_t begin = at;
      while (at < n && key_[at] == row && row < static_cast<uint64_t>(table_rows_)) prefetch(kAhead + at++, n);
      add_up(begin, at, out_.data + r * out_.shape[1]);
    }
  });
}

}  // namespace hisac::cpu
