// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows.h"

#include <cfloat>
#include <cmath>

namespace hisac::cpu {

float RowSource::load(int64_t t, float* out) const noexcept {
  if (rows_.dtype != DType::int8) return k_.load_row(row(t), rows_.dtype, rows_.width, out);
  const float scale = !scale_ ? 1.f : scale_.data[scale_.shape[0] == 1 ? 0 : number(t)];
  return k_.load_int8(reinterpret_cast<const int8_t*>(row(t)), scale, rows_.width, out);
}

void RowSource::add(int64_t t, float factor, float* sum, float* scratch) const noexcept {
  const float* source = scratch;
  if (rows_.dtype == DType::float32)
    source = reinterpret_cast<const float*>(row(t));
  else
    load(t, scratch);
  k_.add_row(rows_.width, source, factor, sum);
}

void RowSource::queue_rows(int64_t begin, int64_t end, simd::Prefetcher& prefetcher) const noexcept {
  if (!ids_) return prefetcher.add(rows_.data, begin * bytes_, end * bytes_);
  for (int64_t t = begin; t < end; ++t)
    if (has(t)) prefetcher.add(rows_.data, number(t) * bytes_, (number(t) + 1) * bytes_);
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
