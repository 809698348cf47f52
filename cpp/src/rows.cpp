// SPDX-License-Identifier: Apache-2.0
#include "rows.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "checks.h"
#include "hisac/route.h"
#include "on_cuda.h"
#include "parallel.h"

namespace hisac {

RowSource::RowSource(const Rows& rows, const Ids& ids, Array<const float, 1> scale) noexcept
    : k_(cpu::kernels()),
      data_(static_cast<const std::byte*>(rows.data)),
      dtype_(rows.dtype),
      rows_(rows.rows),
      width_(rows.width),
      bytes_(rows.width * bytes_of(rows.dtype)),
      ids_(ids),
      scale_(scale) {}

bool RowSource::load(int64_t t, float* out, float* norm) const noexcept {
  if (!has(t)) return false;
  const int64_t row = row_of(t);
  const std::byte* const from = data_ + row * bytes_;
  if (dtype_ != DType::int8) {
    *norm = k_.load_row(from, dtype_, width_, out);
  } else {
    const float scale = !scale_ ? 1.f : scale_.data[scale_.shape[0] == 1 ? 0 : row];
    *norm = k_.load_int8(reinterpret_cast<const int8_t*>(from), scale, width_, out);
  }
  return true;
}

void RowSource::add(int64_t t, float factor, float* sum, float* room) const noexcept {
  const float* row = room;
  float norm;
  if (dtype_ == DType::float32)
    row = reinterpret_cast<const float*>(data_ + row_of(t) * bytes_);
  else
    load(t, room, &norm);
  k_.add_row(width_, row, factor, sum);
}

void RowSource::look_ahead(int64_t begin, int64_t end, cpu::Ahead& ahead) const noexcept {
  if (!ids_) return ahead.add(data_, begin * bytes_, end * bytes_);
  for (int64_t t = begin; t < end; ++t)
    if (has(t)) ahead.add(data_, row_of(t) * bytes_, (row_of(t) + 1) * bytes_);
}

bool below_limit_in_float64(const float* x, int64_t width) noexcept {
  double squares = 0;
  for (int64_t d = 0; d < width; ++d) squares += double(x[d]) * x[d];
  return squares < 0x1p100;
}

bool finite(const float* v, int64_t width) noexcept {
  bool ok = true;
  for (int64_t d = 0; d < width; ++d) ok &= std::fabs(v[d]) <= FLT_MAX;
  return ok;
}

Status sum_rows(const Context& context, Array<const float, 2> rows, Array<const int64_t, 1> order,
                Array<const int64_t, 1> begin, Array<float, 2> sums) noexcept {
  const int64_t count = rows.shape[0], width = rows.shape[1], groups = sums.shape[0];
  HISAC_TRY(check_length("sum_rows", "begin", groups + 1, begin.shape[0]));
  if (sums.shape[1] != width)
    return Status::error(Code::invalid_argument,
                         "sum_rows: rows is [%" PRId64 ", %" PRId64 "], sums is [%" PRId64 ", %" PRId64
                         "]: V differs (%" PRId64 ", %" PRId64 ")",
                         count, width, groups, sums.shape[1], width, sums.shape[1]);
  if (context.device == Device::cuda)
    return on_cuda("sum_rows", &cuda::Verbs::sum_rows, context, rows, order, begin, sums);
  parallel_for(context, groups, [&](int64_t first, int64_t last, int) {
    constexpr int64_t kColumns = 64;
    for (int64_t g = first; g < last; ++g) {
      const int64_t from = std::max<int64_t>(begin.data[g], 0), to = std::min(begin.data[g + 1], order.shape[0]);
      for (int64_t c = 0; c < width; c += kColumns) {
        const int64_t n = std::min(kColumns, width - c);
        double sum[kColumns] = {};
        for (int64_t i = from; i < to; ++i) {
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

}  // namespace hisac
