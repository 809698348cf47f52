// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "base/parallel.h"
#include "cpu/verbs.h"

namespace hisac::cpu {

Status sum_rows(const Context& context, Array<const float, 2> rows, Array<const int64_t, 1> order,
                Array<const int64_t, 1> begin, Array<float, 2> sums) noexcept {
  const int64_t count = rows.shape[0], width = rows.shape[1], groups = sums.shape[0];
  parallel_for(context, groups, [&](int64_t first, int64_t last, int) {
    constexpr int64_t kColumns = 64;
    for (int64_t g = first; g < last; ++g) {
      const int64_t begin_entry = std::max<int64_t>(begin.data[g], 0),
                    end_entry = std::min(begin.data[g + 1], order.shape[0]);
      for (int64_t c = 0; c < width; c += kColumns) {
        const int64_t n = std::min(kColumns, width - c);
        double sum[kColumns] = {};
        for (int64_t i = begin_entry; i < end_entry; ++i) {
          const int64_t row = order.data[i];
          if (row < 0 || row >= count) continue;
          const float* const x = rows.data + row * width + c;
          for (int64_t d = 0; d < n; ++d) sum[d] += double(x[d]);
        }
        for (int64_t d = 0; d < n; ++d) sums.data[g * width + c + d] = static_cast<float>(sum[d]);
      }
    }
  });
  return {};
}

}  // namespace hisac::cpu
