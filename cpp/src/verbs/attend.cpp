// SPDX-License-Identifier: Apache-2.0
#include "hisac/attend.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "backend.h"
#include "base/arena.h"

namespace hisac {
namespace {

/// Whether a workspace may be sized by these inputs.
bool sizes_fit(const AttendInputs& in) noexcept {
  return within({in.heads, in.q.width, in.values.width}, 1, kMostWidth) && within({in.agents}, 0, kMostAgents) &&
         within({in.q.rows, in.keys.rows, in.candidates.users}, 0, kMostRows);
}

/// [B, M], or [1, R].
struct TokenShape {
  explicit TokenShape(const AttendInputs& in) noexcept
      : users(in.tokens.starts ? 1 : in.candidates.users),
        tokens(in.tokens.starts ? in.keys.rows / in.heads : in.agents) {}

  int64_t users, tokens;
};

/// Of users' tokens. Without users any array without elements will do, since offsets of none may be null.
template <class T, int N>
Status check_of_tokens(const char* verb, const char* name, const AttendInputs& in, const int64_t (&expected)[N],
                       const Array<T, N>& got) noexcept {
  if (in.candidates.users == 0 && std::find(got.shape, got.shape + N, 0) != got.shape + N) return {};
  return check_shape(verb, name, expected, got);
}

/// With M and the scale: without M, on the CPU the most tokens of a user, on a device all.
AttendInputs stated(const AttendInputs& given, Device device) noexcept {
  AttendInputs in = given;
  if (std::isnan(in.scale)) in.scale = 1 / std::sqrt(static_cast<float>(in.q.width));
  if (!in.tokens.starts || in.agents != 0 || in.heads < 1) return in;
  if (!check_spans("", "", in.tokens, in.keys.rows / in.heads, device).ok()) return in;  // an error of `check`
  if (device != Device::cpu) in.agents = in.keys.rows / in.heads;
  for (int64_t b = 0; device == Device::cpu && b < in.tokens.users; ++b)
    in.agents = std::max(in.agents, in.tokens.end(b) - in.tokens.start(b));
  return in;
}

/// Each user has at most M tokens, in order.
Status check_tokens(const char* verb, const AttendInputs& in, Device device) noexcept {
  if (!in.tokens.starts) return {};
  if (in.tokens.users != in.candidates.users)
    return invalid("%s: token_offsets expected for %" PRId64 " users, got %" PRId64, verb, in.candidates.users,
                   in.tokens.users);
  HISAC_TRY(check_in_order(verb, "token_offsets", in.tokens, in.keys.rows / in.heads, device));
  for (int64_t b = 0; b < in.tokens.users && device == Device::cpu; ++b)
    if (in.tokens.end(b) - in.tokens.start(b) > in.agents)
      return invalid("%s: token_offsets expected at most M = %" PRId64 " tokens a user, got %" PRId64, verb, in.agents,
                     in.tokens.end(b) - in.tokens.start(b));
  return {};
}

Status check(const char* verb, const AttendInputs& in, Device device) noexcept {
  HISAC_TRY(check_float(verb, "q", in.q.dtype));
  if (in.keys.dtype != in.q.dtype || in.values.dtype != in.q.dtype)
    return Status::error(Code::wrong_type, "%s: keys and values expected q's type, %s, got %s and %s", verb,
                         name_of(in.q.dtype), name_of(in.keys.dtype), name_of(in.values.dtype));
  if (!within({in.heads, in.q.width, in.values.width}, 1, kMostWidth))
    return invalid("%s: expected H, d and V of 1 to 2^20, got %" PRId64 ", %" PRId64 " and %" PRId64, verb, in.heads,
                   in.q.width, in.values.width);
  if (!sizes_fit(in))
    return invalid("%s: expected at most 2^40 rows of q and keys and users, and 2^24 tokens, got %" PRId64 ", %" PRId64
                   ", %" PRId64 " and %" PRId64,
                   verb, in.q.rows, in.keys.rows, in.candidates.users, in.agents);
  if (in.q.rows % in.heads != 0)
    return invalid("%s: q expected rows for all of H = %" PRId64 " heads, got %" PRId64, verb, in.heads, in.q.rows);
  const TokenShape of(in);
  int64_t rows;
  if (__builtin_mul_overflow(of.users * in.heads, of.tokens, &rows)) rows = -1;
  for (const auto& [name, given, width] :
       {std::tuple("keys", &in.keys, in.q.width), std::tuple("values", &in.values, in.values.width)})
    if (given->rows != rows || given->width != width)
      return invalid("%s: %s expected %s as rows, got %s", verb, name,
                     ShapeText({of.users, of.tokens, in.heads, width}).text,
                     ShapeText({given->rows, given->width}).text);
  HISAC_TRY(check_tokens(verb, in, device));
  if (in.bias) HISAC_TRY(check_of_tokens(verb, "bias", in, {of.users, of.tokens}, in.bias));
  if (!(std::fabs(in.scale) < INFINITY)) return invalid("%s: scale expected finite, got %g", verb, double(in.scale));
  return check_in_order(verb, "candidate_offsets", in.candidates, in.q.rows / in.heads, device);
}

}  // namespace

size_t attend_workspace(const Context& context, const AttendInputs& given) noexcept {
  const AttendInputs inputs = stated(given, context.device);
  if (!sizes_fit(inputs)) return Arena::kLimit;
  return backend_workspace(&Backend::attend_workspace, context, inputs);
}

Status attend(const Context& context, const AttendInputs& given, Attended out) noexcept {
  const AttendInputs inputs = stated(given, context.device);
  HISAC_TRY(check("attend", inputs, context.device));
  const int64_t n = inputs.q.rows / inputs.heads;
  if (out.out.rows != inputs.q.rows || out.out.width != inputs.values.width || out.out.dtype != inputs.q.dtype ||
      !has_shape(out.lse, {n, inputs.heads}))
    return invalid("attend: out expected %s of q's type and lse %s",
                   ShapeText({n, inputs.heads, inputs.values.width}).text, ShapeText({n, inputs.heads}).text);
  return call_backend("attend", &Backend::attend, context, inputs, out);
}

size_t attend_backward_workspace(const Context& context, const AttendInputs& given) noexcept {
  const AttendInputs inputs = stated(given, context.device);
  if (!sizes_fit(inputs)) return Arena::kLimit;
  return backend_workspace(&Backend::attend_backward_workspace, context, inputs);
}

Status attend_backward(const Context& context, const AttendInputs& given, const AttendForward& forward,
                       const AttendGradients& out) noexcept {
  const AttendInputs inputs = stated(given, context.device);
  HISAC_TRY(check("attend_backward", inputs, context.device));
  const int64_t n = inputs.q.rows / inputs.heads;
  const auto like = [&](const Rows& rows) {
    return rows.rows == inputs.q.rows && rows.width == inputs.values.width && check_float("", "", rows.dtype).ok();
  };
  if (!like(forward.d_out) || !like(forward.out) || !has_shape(forward.lse, {n, inputs.heads}) ||
      (forward.d_lse && !has_shape(forward.d_lse, {n, inputs.heads})))
    return invalid("attend_backward: expected out and d_out %s, lse and d_lse %s",
                   ShapeText({n, inputs.heads, inputs.values.width}).text, ShapeText({n, inputs.heads}).text);
  const auto [users, m] = TokenShape(inputs);
  const int64_t h = inputs.heads;
  HISAC_TRY(check_shape("attend_backward", "dq", {n, h, inputs.q.width}, out.q));
  HISAC_TRY(check_of_tokens("attend_backward", "dkeys", inputs, {users, m, h, inputs.q.width}, out.keys));
  HISAC_TRY(check_of_tokens("attend_backward", "dvalues", inputs, {users, m, h, inputs.values.width}, out.values));
  if (out.bias && !inputs.bias) return invalid("attend_backward: dbias expected beside a bias, got it without");
  if (out.bias) HISAC_TRY(check_of_tokens("attend_backward", "dbias", inputs, {users, m}, out.bias));
  return call_backend("attend_backward", &Backend::attend_backward, context, inputs, forward, out);
}

}  // namespace hisac
