// SPDX-License-Identifier: Apache-2.0
// Sums of listed rows in their order and in float64, a thread for a column: neighbours read neighbours.
#include "cuda/device/elements.h"
#include "cuda/device/launcher.h"
#include "cuda/verbs.h"

namespace hisac::cuda {
namespace {

constexpr int kThreads = 256;

SIMT_KERNEL(kThreads)
sum_listed(Array<const float, 2> rows, Array<const int64_t, 1> order, Array<const int64_t, 1> begin,
           Array<float, 2> sums) {
  const int64_t width = rows.shape[1], size = sums.shape[0] * width;
  const int64_t step = int64_t{simt::blocks()} * kThreads;
  for (int64_t i = int64_t{simt::block()} * kThreads + simt::thread(); i < size; i += step) {
    const int64_t g = i / width, column = i % width;
    const int64_t first = begin.data[g], last = begin.data[g + 1];
    double sum = 0;
    for (int64_t n = first < 0 ? 0 : first; n < last && n < order.shape[0]; ++n) {
      const int64_t row = order.data[n];
      if (row >= 0 && row < rows.shape[0]) sum = simt::plain_sum(sum, rows.data[row * width + column]);
    }
    sums.data[i] = static_cast<float>(sum);
  }
}

}  // namespace

Status sum_rows(const Context& context, Array<const float, 2> rows, Array<const int64_t, 1> order,
                Array<const int64_t, 1> begin, Array<float, 2> sums) noexcept {
  Launcher launch("sum_rows", context);
  const int64_t blocks = (sums.shape[0] * sums.shape[1] + kThreads - 1) / kThreads;
  launch(sum_listed, least(blocks, launch.machine.processors * 8), kThreads, 0, rows, order, begin, sums);
  return launch.status();
}

}  // namespace hisac::cuda
