// SPDX-License-Identifier: Apache-2.0
#include "cpu/histories.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "cpu/simd/pack.h"

namespace hisac::cpu {

void Block::carve(Arena& arena, int64_t width, int64_t value_width, Operands operands) noexcept {
  pairs.carve(arena, simd::kBlock * simd::pad(simd::pairs_of(width)), operands);
  if (operands == Operands::split) rest = arena.take<float>(width);
  x = arena.take<float>(simd::kBlock * simd::pad(width));
  v = arena.take<float>(simd::kBlock * simd::pad(value_width));
  norm = arena.take<float>(simd::kBlock);
  bias = arena.take<float>(simd::kBlock);
  row = arena.take<int64_t>(simd::kBlock);
}

void Block::clear_padding(int64_t width, int64_t value_width) noexcept {
  std::fill(x, x + simd::kBlock * simd::pad(width), 0.f);
  std::fill(v, v + simd::kBlock * simd::pad(value_width), 0.f);
  for (uint32_t* half : {pairs.hi, pairs.lo})
    if (half) std::fill(half, half + simd::kBlock * simd::pad(simd::pairs_of(width)), 0u);
}

Operands operands_of(const RouteParams& params, bool splits) noexcept {
  const simd::Kernels& k = simd::kernels();
  if (params.precision == Precision::bfloat16) return k.matmul_pairs ? Operands::rounded : Operands::floats;
  return splits && k.matmul_split ? Operands::split : Operands::floats;
}

RowLoader::RowLoader(const RouteInputs& inputs, Operands operands) noexcept
    : in_(inputs),
      k_(simd::kernels()),
      width_(inputs.prototypes.shape[2]),
      x_(inputs.x, inputs.x_ids, inputs.x_scale),
      v_(inputs.v, inputs.v_ids),
      operands_(operands) {}

bool RowLoader::may_be_present(int64_t row) const noexcept {
  if (!v_.has(row) || (x_ && !x_.has(row))) return false;
  const float spread = spread_of(row);
  return std::fabs(bias_of(row)) <= FLT_MAX && spread >= 0 && spread <= FLT_MAX &&  // false for NaN
         (!in_.codes || in_.book->valid(in_.codes.data + row * in_.codes.shape[1]));
}

bool RowLoader::load_listed_x(int64_t row, float* x, float* norm) const noexcept {
  if (x_) {
    x_.load(row, x, norm);
  } else {
    in_.book->prototype(in_.codes.data + row * in_.codes.shape[1], x);
    *norm = k_.load_row(x, DType::float32, width_, x);
  }
  return below_limit(*norm, x, width_);
}

bool RowLoader::load_v(int64_t row, float* v) const noexcept {
  float norm;
  return v_.load(row, v, &norm);
}

bool RowLoader::has_value(int64_t row, float* v) const noexcept { return load_v(row, v) && finite(v, in_.v.width); }

void RowLoader::add_if_wanted(int64_t row, float* v, Absent* absent) const noexcept {
  if (!absent || !absent->sum || !has_value(row, v)) return;
  k_.add_row(in_.v.width, v, 1.f, absent->sum);
  ++absent->count;
}

void RowLoader::load(int64_t begin, int64_t end, Block& block, Absent* absent) const noexcept {
  const int64_t ldx = simd::pad(width_), ldv = simd::pad(in_.v.width);
  int n = 0;
  for (int64_t row = begin; row < end; ++row) {
    float* const x = block.x + n * ldx;
    if (load_x(row, x, block.norm + n)) {
      const int64_t at = n * simd::pad(simd::pairs_of(width_));
      if (const auto* const given = operands_ == Operands::rounded ? x_.as_bfloat16(row) : nullptr) {
        std::memcpy(block.pairs.hi + at, given, static_cast<size_t>(2 * width_));
      } else if (operands_ == Operands::rounded) {
        k_.round_pairs(width_, x, nullptr, block.pairs.hi + at);
        block.norm[n] = k_.load_row(block.pairs.hi + at, DType::bfloat16, width_, x);
      } else if (operands_ == Operands::split) {
        k_.round_pairs(width_, x, nullptr, block.pairs.hi + at);
        k_.remainder(width_, x, block.rest);
        k_.round_pairs(width_, block.rest, nullptr, block.pairs.lo + at);
      }
      load_v(row, block.v + n * ldv);
      block.norm[n] += spread_of(row);
      block.bias[n] = bias_of(row);
      block.row[n++] = row;
    } else {
      add_if_wanted(row, block.v + n * ldv, absent);
    }
  }
  block.n = n;
  block.ahead.clear();
  for (const RowSource* rows : {&x_, &v_})
    rows->look_ahead(end, std::min(end + simd::kBlock, in_.behaviours()), block.ahead);
}

void AgentPanel::carve(Arena& arena, int64_t agents, int64_t width, Operands operands, bool rounds) noexcept {
  index = arena.take<int32_t>(agents);
  pairs.carve(arena, simd::packed_size(simd::pairs_of(width), agents), operands);
  if (operands == Operands::floats) packed = arena.take<float>(simd::packed_size(width, agents));
  if (operands == Operands::split) rests = arena.take<float>(agents * width);
  if (rounds) room = arena.take<uint32_t>(simd::pairs_of(width));
  rows = arena.take<float>(agents * width);
  norm = arena.take<float>(simd::pad(agents));
  rate = arena.take<float>(simd::pad(agents));
}

void AgentPanel::load(const RouteParams& params, const float* prototypes, int64_t agents, int64_t width,
                      int64_t count) noexcept {
  const simd::Kernels& k = simd::kernels();
  m = 0;
  for (int64_t a = 0; a < count; ++a) {
    const float tau = temperature_of(params, a);
    norm[m] = k.load_row(prototypes + a * width, DType::float32, width, rows + m * width);
    if (!(tau > 0) || !below_limit(norm[m], rows + m * width, width)) continue;
    if (rests) k.remainder(width, rows + m * width, rests + m * width);
    if (room) {
      k.round_pairs(width, rows + m * width, nullptr, room);
      norm[m] = k.load_row(room, DType::bfloat16, width, rows + m * width);
    }
    rate[m] = std::min(simd::kLog2e / tau, FLT_MAX);  // a finite rate times no distance is no logit, never NaN
    index[m++] = static_cast<int32_t>(a);
  }
  for (int64_t a = m; a < simd::pad(agents); ++a) {
    norm[a] = INFINITY;
    rate[a] = 1;
  }
  if (pairs.hi) k.pack_pairs(width, m, rows, width, pairs.hi);
  if (pairs.lo) k.pack_pairs(width, m, rests, width, pairs.lo);
  if (packed) k.pack_columns(width, m, rows, width, packed);
}

}  // namespace hisac::cpu
