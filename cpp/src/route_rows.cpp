// SPDX-License-Identifier: Apache-2.0
#include "route_rows.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "checks.h"
#include "cpu/pack.h"

namespace hisac {
namespace {

bool finite(const float* v, int64_t width) noexcept {
  bool ok = true;
  for (int64_t d = 0; d < width; ++d) ok &= std::fabs(v[d]) <= FLT_MAX;
  return ok;
}

/// |x|^2 below 2^100, decided in float64 where float32 is too near; NaN is not.
bool below_limit(float norm, const float* x, int64_t width) noexcept {
  if (norm < 0x1p99f || !(norm < 0x1p101f)) return norm < 0x1p99f;
  double squares = 0;
  for (int64_t d = 0; d < width; ++d) squares += double(x[d]) * x[d];
  return squares < 0x1p100;
}

}  // namespace

void Block::carve(Arena& arena, int64_t width, int64_t value_width, bool rounds) noexcept {
  if (rounds) pairs = arena.take<uint32_t>(cpu::kBlock * cpu::pad(pairs_of(width)));
  x = arena.take<float>(cpu::kBlock * cpu::pad(width));
  v = arena.take<float>(cpu::kBlock * cpu::pad(value_width));
  norm = arena.take<float>(cpu::kBlock);
  bias = arena.take<float>(cpu::kBlock);
  row = arena.take<int64_t>(cpu::kBlock);
}

void Block::clear_padding(int64_t width, int64_t value_width) noexcept {
  std::fill(x, x + cpu::kBlock * cpu::pad(width), 0.f);
  std::fill(v, v + cpu::kBlock * cpu::pad(value_width), 0.f);
  if (pairs) std::fill(pairs, pairs + cpu::kBlock * cpu::pad(pairs_of(width)), 0u);
}

RowLoader::RowLoader(const RouteParams& params, const RouteInputs& inputs) noexcept
    : in_(inputs),
      k_(cpu::kernels()),
      width_(inputs.prototypes.shape[2]),
      x_bytes_(inputs.x.width * bytes_of(inputs.x.dtype)),
      v_bytes_(inputs.v.width * bytes_of(inputs.v.dtype)),
      rounds_(params.precision == Precision::bfloat16 && k_.matmul_pairs && params.method == Method::exact) {}

bool RowLoader::load_x(int64_t row, float* x, float* norm) const noexcept {
  if (in_.codes) {
    const int32_t* const codes = in_.codes.data + row * in_.codes.shape[1];
    if (!in_.book->valid(codes)) return false;
    if (!in_.x.data) {
      in_.book->prototype(codes, x);
      *norm = k_.load_row(x, DType::float32, width_, x);
    }
  }
  if (in_.x.data)
    *norm = k_.load_row(static_cast<const std::byte*>(in_.x.data) + row * x_bytes_, in_.x.dtype, width_, x);
  return below_limit(*norm, x, width_) && within_limits(row);
}

bool RowLoader::within_limits(int64_t row) const noexcept {
  const float spread = spread_of(row);
  return std::fabs(bias_of(row)) <= FLT_MAX && spread >= 0 && spread <= FLT_MAX;  // false for NaN
}

bool RowLoader::may_be_present(int64_t row) const noexcept {
  return within_limits(row) && (!in_.codes || in_.book->valid(in_.codes.data + row * in_.codes.shape[1]));
}

void RowLoader::prefetch(int64_t row) const noexcept {
  const auto lines = [](const void* rows, int64_t at, int64_t bytes) {
    const std::byte* const p = static_cast<const std::byte*>(rows) + at * bytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
    __builtin_prefetch(p + bytes - 1);  // rows need not begin with a cache line
  };
  if (in_.x.data) lines(in_.x.data, row, x_bytes_);
  lines(in_.v.data, row, v_bytes_);
  if (in_.codes) __builtin_prefetch(in_.codes.data + row * in_.codes.shape[1]);
  if (in_.bias) __builtin_prefetch(in_.bias.data + row);
}

void RowLoader::load_v(int64_t row, float* v) const noexcept {
  k_.load_row(static_cast<const std::byte*>(in_.v.data) + row * v_bytes_, in_.v.dtype, in_.v.width, v);
}

bool RowLoader::has_value(int64_t row, float* v) const noexcept {
  load_v(row, v);
  return finite(v, in_.v.width);
}

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
      if (rounds_) {
        uint32_t* const pairs = block.pairs + n * cpu::pad(pairs_of(width_));
        k_.round_pairs(width_, x, pairs);
        block.norm[n] = k_.load_row(pairs, DType::bfloat16, width_, x);
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
  look_ahead(end, std::min(end + cpu::kBlock, in_.v.rows), block.ahead);
}

void RowLoader::look_ahead(int64_t begin, int64_t end, cpu::Ahead& ahead) const noexcept {
  ahead.clear();
  ahead.add(in_.x.data, begin * x_bytes_, end * x_bytes_);
  ahead.add(in_.v.data, begin * v_bytes_, end * v_bytes_);
}

void AgentPanel::carve(Arena& arena, int64_t agents, int64_t width, bool rounds) noexcept {
  index = arena.take<int32_t>(agents);
  if (rounds)
    pairs = arena.take<uint32_t>(cpu::packed_size(pairs_of(width), agents));
  else
    packed = arena.take<float>(cpu::packed_size(width, agents));
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
    if (pairs) {  // `pairs` is not packed yet: room for a row
      k.round_pairs(width, rows + m * width, pairs);
      norm[m] = k.load_row(pairs, DType::bfloat16, width, rows + m * width);
    }
    rate[m] = std::min(cpu::kLog2e / tau, FLT_MAX);  // a finite rate times no distance is no logit, never NaN
    index[m++] = static_cast<int32_t>(a);
  }
  for (int64_t a = m; a < cpu::pad(agents); ++a) {
    norm[a] = INFINITY;
    rate[a] = 1;
  }
  if (pairs)
    k.pack_pairs(width, m, rows, width, pairs);
  else
    k.pack_columns(width, m, rows, width, packed);
}

Status check_route(const char* verb, const RouteParams& params, const RouteInputs& in) noexcept {
  const int64_t* const p = in.prototypes.shape;
  if (in.x.data) HISAC_TRY(check_float(verb, "x", in.x.dtype));
  HISAC_TRY(check_float(verb, "v", in.v.dtype));
  const int64_t rows = in.v.rows;
  if (in.x.data && in.x.rows != rows)
    return Status::error(Code::invalid_argument,
                         "%s: x is [%" PRId64 ", %" PRId64 "], v is [%" PRId64 ", %" PRId64 "]: T differs (%" PRId64
                         ", %" PRId64 ")",
                         verb, in.x.rows, in.x.width, rows, in.v.width, in.x.rows, rows);
  if (in.x.data && in.x.width != p[2])
    return Status::error(Code::invalid_argument,
                         "%s: prototypes is [%" PRId64 ", %" PRId64 ", %" PRId64 "], x is [%" PRId64 ", %" PRId64
                         "]: D differs (%" PRId64 ", %" PRId64 ")",
                         verb, p[0], p[1], p[2], in.x.rows, in.x.width, p[2], in.x.width);
  if (p[2] < 1 || in.v.width < 1)
    return Status::error(Code::invalid_argument, "%s: expected D and V of at least 1, got %" PRId64 " and %" PRId64,
                         verb, p[2], in.v.width);
  HISAC_TRY(check_histories(verb, in.histories, rows));
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
  if (in.bias) HISAC_TRY(check_length(verb, "bias", rows, in.bias.shape[0]));
  if (in.spread) HISAC_TRY(check_length(verb, "spread", rows, in.spread.shape[0]));
  if (params.refine < 0)
    return Status::error(Code::invalid_argument, "%s: refine expected 0 or more, got %d", verb, params.refine);
  if (rows > 0 && !in.codes && (!in.x.data || params.method == Method::leaf))
    return Status::error(Code::invalid_argument,
                         "%s: codes expected where x is not given and with the leaf method, got none", verb);
  if (in.codes) {
    HISAC_TRY(check_book(verb, in.book));
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
