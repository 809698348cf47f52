// SPDX-License-Identifier: Apache-2.0
#include "cpu/route_call.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "cpu/simd/pack.h"

namespace hisac::cpu {
namespace {

float median(float a, float b, float c) noexcept { return std::max(std::min(a, b), std::min(std::max(a, b), c)); }

float median(float a, float b, float c, float d, float e) noexcept {
  return median(std::max(std::min(a, b), std::min(c, d)), std::min(std::max(a, b), std::max(c, d)), e);
}

}  // namespace

void Block::carve(Arena& arena, int64_t width, int64_t columns, Operands operands) noexcept {
  x_bf16.carve(arena, simd::kBlock * simd::pad(simd::pairs_of(width)), operands);
  if (operands == Operands::bf16x3) remainder = arena.take<float>(width);
  x = arena.take<float>(simd::kBlock * simd::pad(width));
  values = arena.take<float>(simd::kBlock * simd::pad(columns));
  arena.take_into(simd::kBlock, norm, bias, row);
}

void Block::clear_padding(int64_t width, int64_t columns) noexcept {
  std::fill(x, x + simd::kBlock * simd::pad(width), 0.f);
  std::fill(values, values + simd::kBlock * simd::pad(columns), 0.f);
  for (uint32_t* part : {x_bf16.hi, x_bf16.lo})
    if (part) std::fill(part, part + simd::kBlock * simd::pad(simd::pairs_of(width)), 0u);
}

Operands operands_of(const RouteParams& params, bool allow_bf16x3) noexcept {
  const simd::Kernels& k = simd::kernels();
  if (params.precision == Precision::bfloat16) return k.matmul_bf16 ? Operands::bf16 : Operands::float32;
  return allow_bf16x3 && k.matmul_bf16x3 ? Operands::bf16x3 : Operands::float32;
}

void RouteCall::load_block(int64_t begin, int64_t end, const float* origin, Block& block) const noexcept {
  const int64_t ldx = simd::pad(width_), ldv = simd::pad(columns_);
  int n = 0;
  for (int64_t row = begin; row < end; ++row) {
    float *const x = block.x + n * ldx, *const values = block.values + n * ldv;
    if (!loader_.load_x(row, x, block.norm + n)) continue;
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
    block.row[n++] = row;
  }
  block.n = n;
  block.prefetcher.clear();
  for (const RowSource* source : {&loader_.x_source, &loader_.v_source})
    source->queue_rows(end, std::min(end + simd::kBlock, in_.behaviours()), block.prefetcher);
}

void AgentPanel::carve(Arena& arena, int64_t agents, int64_t width, Operands operands, bool round_to_bf16) noexcept {
  index = arena.take<int32_t>(agents);
  packed_bf16.carve(arena, simd::packed_size(simd::pairs_of(width), agents), operands);
  if (operands == Operands::float32) packed = arena.take<float>(simd::packed_size(width, agents));
  if (operands == Operands::bf16x3) remainders = arena.take<float>(agents * width);
  if (round_to_bf16) rounding_scratch = arena.take<uint32_t>(simd::pairs_of(width));
  if (!round_to_bf16) origin = arena.take<float>(width);
  rows = arena.take<float>(agents * width);
  arena.take_into(simd::pad(agents), norm, rate);
}

void AgentPanel::load(const RouteParams& params, const float* prototypes, int64_t agents, int64_t width,
                      int64_t count) noexcept {
  const simd::Kernels& k = simd::kernels();
  m = 0;
  for (int64_t a = 0; a < count; ++a) {
    const float tau = temperature_of(params, a);
    norm[m] = k.load_row(prototypes + a * width, DType::float32, width, rows + m * width);
    if (!(tau > 0) || !below_limit(norm[m], rows + m * width, width)) continue;
    if (rounding_scratch) {
      k.round_bf16(width, rows + m * width, nullptr, rounding_scratch);
      norm[m] = k.load_row(rounding_scratch, DType::bfloat16, width, rows + m * width);
    }
    rate[m] = std::min(simd::kLog2e / tau, FLT_MAX);  // finite, since infinity times a distance of 0 is NaN
    index[m++] = static_cast<int32_t>(a);
  }
  if (origin) {
    const float* p[5];
    for (int64_t j = 0; j < 5; ++j) p[j] = rows + (j < m && m >= 5 ? j : 0) * width;
    for (int64_t d = 0; d < width && m > 0; ++d) origin[d] = median(p[0][d], p[1][d], p[2][d], p[3][d], p[4][d]);
    for (int64_t j = 0; j < m; ++j) norm[j] = k.subtract_row(width, origin, rows + j * width);
  }
  for (int64_t j = 0; j < m && remainders; ++j) k.bf16_remainder(width, rows + j * width, remainders + j * width);
  for (int64_t a = m; a < simd::pad(agents); ++a) {
    norm[a] = INFINITY;
    rate[a] = 1;
  }
  if (packed_bf16.hi) k.pack_bf16(width, m, rows, width, packed_bf16.hi);
  if (packed_bf16.lo) k.pack_bf16(width, m, remainders, width, packed_bf16.lo);
  if (packed) k.pack_columns(width, m, rows, width, packed);
}

}  // namespace hisac::cpu
