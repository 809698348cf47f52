// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows.h"

#include <cfloat>
#include <cmath>

namespace hisac::cpu {

RowSource::RowSource(const Rows& rows, const Ids& ids, Array<const float, 1> scale) noexcept
    : k_(simd::kernels()),
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
  const std::byte* const source = data_ + row * bytes_;
  if (dtype_ != DType::int8) {
    *norm = k_.load_row(source, dtype_, width_, out);
  } else {
    const float scale = !scale_ ? 1.f : scale_.data[scale_.shape[0] == 1 ? 0 : row];
    *norm = k_.load_int8(reinterpret_cast<const int8_t*>(source), scale, width_, out);
  }
  return true;
}

void RowSource::add(int64_t t, float factor, float* sum, float* scratch) const noexcept {
  const float* row = scratch;
  float norm;
  if (dtype_ == DType::float32)
    row = reinterpret_cast<const float*>(data_ + row_of(t) * bytes_);
  else
    load(t, scratch, &norm);
  k_.add_row(width_, row, factor, sum);
}

void RowSource::queue_rows(int64_t begin, int64_t end, simd::Prefetcher& prefetcher) const noexcept {
  if (!ids_) return prefetcher.add(data_, begin * bytes_, end * bytes_);
  for (int64_t t = begin; t < end; ++t)
    if (has(t)) prefetcher.add(data_, row_of(t) * bytes_, (row_of(t) + 1) * bytes_);
}

bool below_limit_in_float64(const float* x, int64_t width) noexcept {
  double squares = 0;
  for (int64_t d = 0; d < width; ++d) squares += double(x[d]) * x[d];
  return squares < 0x1p100;
}

bool finite(const float* x, int64_t width) noexcept {
  bool ok = true;
  for (int64_t d = 0; d < width; ++d) ok &= std::fabs(x[d]) <= FLT_MAX;
  return ok;
}

}  // namespace hisac::cpu
