// SPDX-License-Identifier: Apache-2.0
#include "cpu/route_call.h"

#include <algorithm>
#include <cstring>

namespace hisac::cpu {

void RouteCall::load_row_into(Block& block, int64_t row, const float* origin) const noexcept {
  const int n = block.n;
  float *const x = block.x + n * simd::pad(width_), *const values = block.values + n * simd::pad(columns_);
  if (!loader_.load_x(row, x, block.norm + n)) return;
  if (value_width_) loader_.v_source.load(row, values);
  if (columns_ > value_width_) std::copy_n(x, width_, values + value_width_);
  if (origin) block.norm[n] = k_.subtract_row(width_, origin, x);
  const int64_t offset = n * simd::pad(simd::pairs_of(width_));
  if (const auto* const given = operands_ == Operands::bf16 ? loader_.x_source.as_bfloat16(row) : nullptr) {
    std::memcpy(block.x_bf16.hi + offset, given, static_cast<size_t>(2 * width_));
  } else if (operands_ == Operands::bf16) {
    k_.round_bf16(width_, x, nullptr, block.x_bf16.hi + offset);
    block.norm[n] = k_.load_row(block.x_bf16.hi + offset, DType::bfloat16, width_, x);
  } else if (operands_ == Operands::bf16x3) {
    k_.round_bf16(width_, x, nullptr, block.x_bf16.hi + offset);
    k_.bf16_remainder(width_, x, block.remainder);
    k_.round_bf16(width_, block.remainder, nullptr, block.x_bf16.lo + offset);
  }
  block.norm[n] += loader_.spread_of(row);
  block.bias[n] = loader_.bias_of(row);
  block.row[n] = row;
  ++block.n;
}

void RouteCall::load_block(int64_t begin, int64_t end, const float* origin, Block& block) const noexcept {
  block.n = 0;
  for (int64_t row = begin; row < end; ++row) load_row_into(block, row, origin);
  block.prefetcher.clear();
  for (const RowSource* source : {&loader_.x_source, &loader_.v_source})
    source->queue_rows(end, std::min(end + simd::kBlock, in_.behaviours()), block.prefetcher);
}

void RouteCall::load_listed(const int64_t* rows, int64_t n, int64_t next, const float* origin,
                            Block& block) const noexcept {
  block.n = 0;
  for (int64_t i = 0; i < n; ++i) load_row_into(block, rows[i], origin);
  block.prefetcher.clear();
  for (const RowSource* source : {&loader_.x_source, &loader_.v_source})
    for (int64_t i = n; i < n + next; ++i) source->queue_rows(rows[i], rows[i] + 1, block.prefetcher);
}

}  // namespace hisac::cpu
