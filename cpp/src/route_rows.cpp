// SPDX-License-Identifier: Apache-2.0
#include "route_rows.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "checks.h"
#include "cpu/pack.h"

namespace hisac {

void Block::carve(Arena& arena, int64_t width, int64_t value_width, Operands operands) noexcept {
  pairs.carve(arena, cpu::kBlock * cpu::pad(cpu::pairs_of(width)), operands);
  if (operands == Operands::split) rest = arena.take<float>(width);
  x = arena.take<float>(cpu::kBlock * cpu::pad(width));
  v = arena.take<float>(cpu::kBlock * cpu::pad(value_width));
  norm = arena.take<float>(cpu::kBlock);
  bias = arena.take<float>(cpu::kBlock);
  row = arena.take<int64_t>(cpu::kBlock);
}

void Block::clear_padding(int64_t width, int64_t value_width) noexcept {
  std::fill(x, x + cpu::kBlock * cpu::pad(width), 0.f);
  std::fill(v, v + cpu::kBlock * cpu::pad(value_width), 0.f);
  for (uint32_t* half : {pairs.hi, pairs.lo})
    if (half) std::fill(half, half + cpu::kBlock * cpu::pad(cpu::pairs_of(width)), 0u);
}

Operands operands_of(const RouteParams& params, bool splits) noexcept {
  const cpu::Kernels& k = cpu::kernels();
  if (params.precision == Precision::bfloat16) return k.matmul_pairs ? Operands::rounded : Operands::floats;
  return splits && k.matmul_split ? Operands::split : Operands::floats;
}

RowLoader::RowLoader(const RouteInputs& inputs, Operands operands) noexcept
    : in_(inputs),
      k_(cpu::kernels()),
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
  const int64_t ldx = cpu::pad(width_), ldv = cpu::pad(in_.v.width);
  int n = 0;
  for (int64_t row = begin; row < end; ++row) {
    float* const x = block.x + n * ldx;
    if (load_x(row, x, block.norm + n)) {
      const int64_t at = n * cpu::pad(cpu::pairs_of(width_));
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
    rows->look_ahead(end, std::min(end + cpu::kBlock, in_.behaviours()), block.ahead);
}

void AgentPanel::carve(Arena& arena, int64_t agents, int64_t width, Operands operands, bool rounds) noexcept {
  index = arena.take<int32_t>(agents);
  pairs.carve(arena, cpu::packed_size(cpu::pairs_of(width), agents), operands);
  if (operands == Operands::floats) packed = arena.take<float>(cpu::packed_size(width, agents));
  if (operands == Operands::split) rests = arena.take<float>(agents * width);
  if (rounds) room = arena.take<uint32_t>(cpu::pairs_of(width));
  rows = arena.take<float>(agents * width);
  norm = arena.take<float>(cpu::pad(agents));
  rate = arena.take<float>(cpu::pad(agents));
}

void AgentPanel::load(const RouteParams& params, const float* prototypes, int64_t agents, int64_t width,
                      int64_t count) noexcept {
  const cpu::Kernels& k = cpu::kernels();
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
    rate[m] = std::min(cpu::kLog2e / tau, FLT_MAX);  // a finite rate times no distance is no logit, never NaN
    index[m++] = static_cast<int32_t>(a);
  }
  for (int64_t a = m; a < cpu::pad(agents); ++a) {
    norm[a] = INFINITY;
    rate[a] = 1;
  }
  if (pairs.hi) k.pack_pairs(width, m, rows, width, pairs.hi);
  if (pairs.lo) k.pack_pairs(width, m, rests, width, pairs.lo);
  if (packed) k.pack_columns(width, m, rows, width, packed);
}

namespace {

/// "x is [300, 48]", or "x_ids is [300]" where rows are gathered.
struct Extent {
  char text[80];
  Extent(const char* name, const Rows& rows, const Ids& ids) noexcept {
    if (ids)
      std::snprintf(text, sizeof text, "%s_ids is [%" PRId64 "]", name, ids.size);
    else
      std::snprintf(text, sizeof text, "%s is [%" PRId64 ", %" PRId64 "]", name, rows.rows, rows.width);
  }
};

/// Types of x, v, their ids and scale, and that all name as many behaviours.
Status check_gathered(const char* verb, const RouteInputs& in) noexcept {
  const bool int8 = in.x.data && in.x.dtype == DType::int8;
  if (in.x.data && !int8) HISAC_TRY(check_float(verb, "x", in.x.dtype, ", float16 or int8"));
  HISAC_TRY(check_float(verb, "v", in.v.dtype));
  for (const Ids* ids : {&in.x_ids, &in.v_ids})
    if (*ids && ids->dtype != DType::int32 && ids->dtype != DType::int64)
      return Status::error(Code::wrong_type, "%s: %s expected int32 or int64", verb,
                           ids == &in.x_ids ? "x_ids" : "v_ids");
  if (in.x_ids && !in.x.data) return Status::error(Code::invalid_argument, "%s: x_ids expected with x, got none", verb);
  if (in.x_scale && !int8)
    return Status::error(Code::invalid_argument, "%s: x_scale expected with x of int8, got another", verb);
  if (in.x_scale && in.x_scale.shape[0] != 1 && in.x_scale.shape[0] != in.x.rows)
    return Status::error(Code::invalid_argument, "%s: x_scale expected [1] or [%" PRId64 "], got [%" PRId64 "]", verb,
                         in.x.rows, in.x_scale.shape[0]);
  const int64_t of_x = in.x_ids ? in.x_ids.size : in.x.rows, of_v = in.behaviours();
  if (in.x.data && of_x != of_v)
    return Status::error(Code::invalid_argument, "%s: %s, %s: T differs (%" PRId64 ", %" PRId64 ")", verb,
                         Extent("x", in.x, in.x_ids).text, Extent("v", in.v, in.v_ids).text, of_x, of_v);
  return {};
}

}  // namespace

Status check_route(const char* verb, const RouteParams& params, const RouteInputs& in, Device device) noexcept {
  const int64_t* const p = in.prototypes.shape;
  const int64_t rows = in.behaviours();
  HISAC_TRY(check_gathered(verb, in));
  if (in.x.data && in.x.width != p[2])
    return Status::error(Code::invalid_argument,
                         "%s: prototypes is [%" PRId64 ", %" PRId64 ", %" PRId64 "], x is [%" PRId64 ", %" PRId64
                         "]: D differs (%" PRId64 ", %" PRId64 ")",
                         verb, p[0], p[1], p[2], in.x.rows, in.x.width, p[2], in.x.width);
  if (p[2] < 1 || in.v.width < 1)
    return Status::error(Code::invalid_argument, "%s: expected D and V of at least 1, got %" PRId64 " and %" PRId64,
                         verb, p[2], in.v.width);
  HISAC_TRY(check_histories(verb, in.histories, rows, device));
  if (p[0] != in.histories.users)
    return Status::error(Code::invalid_argument,
                         "%s: prototypes is [%" PRId64 ", %" PRId64 ", %" PRId64 "], offsets name %" PRId64
                         " users: B differs (%" PRId64 ", %" PRId64 ")",
                         verb, p[0], p[1], p[2], in.histories.users, p[0], in.histories.users);
  if (p[1] > (int64_t{1} << 24))
    return Status::error(Code::invalid_argument, "%s: expected at most 2^24 agents, got %" PRId64, verb, p[1]);
  const int64_t temperatures = params.temperature.shape[0];
  if (!params.temperature || (temperatures != 1 && temperatures != p[1]))
    return Status::error(Code::invalid_argument, "%s: temperature expected [1] or [%" PRId64 "], got [%" PRId64 "]",
                         verb, p[1], params.temperature ? temperatures : 0);
  if (in.count) HISAC_TRY(check_length(verb, "count", p[0], in.count.shape[0]));
  if (in.spread) HISAC_TRY(check_length(verb, "spread", rows, in.spread.shape[0]));
  if (in.bias) HISAC_TRY(check_length(verb, "bias", rows, in.bias.shape[0]));
  if (params.refine < 0)
    return Status::error(Code::invalid_argument, "%s: refine expected 0 or more, got %d", verb, params.refine);
  const bool leaf = params.method == Method::leaf;
  if (!in.codes && (rows > 0 ? leaf || !in.x.data : leaf && !in.book))
    return Status::error(Code::invalid_argument,
                         "%s: codes expected where x is not given and with the leaf method, got none", verb);
  if (in.codes || leaf) HISAC_TRY(check_book(verb, in.book));
  if (in.codes) {
    HISAC_TRY(check_codes(verb, *in.book, in.codes.shape, rows));
    if (!in.x.data && in.book->width() != p[2])
      return Status::error(Code::invalid_argument,
                           "%s: prototypes is [%" PRId64 ", %" PRId64 ", %" PRId64 "], the codebook has D = %" PRId64
                           ": D differs",
                           verb, p[0], p[1], p[2], in.book->width());
  }
  return {};
}

}  // namespace hisac
