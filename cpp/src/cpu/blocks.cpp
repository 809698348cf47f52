// SPDX-License-Identifier: Apache-2.0
#include "cpu/blocks.h"

#include <cmath>

#include "cpu/rows.h"
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

void AgentPanel::load(const RouteParams& params, const float* prototypes, int64_t width, int64_t count) noexcept {
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
  pad_and_pack(width);
}

void AgentPanel::select(const AgentPanel& all, const int32_t* columns, int64_t n, int64_t width) noexcept {
  m = n;
  for (int64_t j = 0; j < n; ++j) {
    const int32_t from = columns[j];
    std::copy_n(all.rows + from * width, width, rows + j * width);
    if (remainders) std::copy_n(all.remainders + from * width, width, remainders + j * width);
    norm[j] = all.norm[from];
    rate[j] = all.rate[from];
    index[j] = all.index[from];
  }
  pad_and_pack(width);
}

void AgentPanel::pad_and_pack(int64_t width) noexcept {
  const simd::Kernels& k = simd::kernels();
  std::fill(norm + m, norm + simd::pad(m), INFINITY);
  std::fill(rate + m, rate + simd::pad(m), 1.f);
  if (packed_bf16.hi) k.pack_bf16(width, m, rows, width, packed_bf16.hi);
  if (packed_bf16.lo) k.pack_bf16(width, m, remainders, width, packed_bf16.lo);
  if (packed) k.pack_columns(width, m, rows, width, packed);
}

}  // namespace hisac::cpu
