// SPDX-License-Identifier: Apache-2.0
#include "backend.h"

namespace hisac {

Status sum_rows(const Context& context, Array<const float, 2> rows, Array<const int64_t, 1> order,
                Array<const int64_t, 1> begin, Array<float, 2> sums) noexcept {
  const int64_t width = rows.shape[1], groups = sums.shape[0];
  HISAC_TRY(check_shape("sum_rows", "begin", {groups + 1}, begin));
  if (!within({width}, 0, kMostWidth))
    return Status::error(Code::invalid_argument, "sum_rows: expected V of at most 2^20, got %" PRId64, width);
  if (sums.shape[1] != width)
    return Status::error(Code::invalid_argument,
                         "sum_rows: rows is %s, sums is %s: V differs (%" PRId64 ", %" PRId64 ")",
                         ShapeText(rows.shape).text, ShapeText(sums.shape).text, width, sums.shape[1]);
  return call_backend("sum_rows", &Backend::sum_rows, context, rows, order, begin, sums);
}

}  // namespace hisac
