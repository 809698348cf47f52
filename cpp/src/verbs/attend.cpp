// SPDX-License-Identifier: Apache-2.0
#include "hisac/attend.h"

#include <cmath>
#include <tuple>

#include "backend.h"
#include "base/arena.h"

namespace hisac {
namespace {

/// Whether a workspace may be sized by these inputs.
bool sizes_fit(const AttendInputs& in) noexcept {
  return within({in.heads, in.q.width, in.values.width}, 1, kMostWidth) && within({in.agents}, 0, kMostAgents) &&
         within({in.q.rows, in.candidates.users}, 0, kMostRows);
}

/// Checks the inputs, and states their scale.
Status check(const char* verb, AttendInputs& in, Device device) noexcept {
  HISAC_TRY(check_float(verb, "q", in.q.dtype));
  if (in.keys.dtype != in.q.dtype || in.values.dtype != in.q.dtype)
    return Status::error(Code::wrong_type, "%s: keys and values expected q's type", verb);
  if (!within({in.heads, in.q.width, in.values.width}, 1, kMostWidth))
    return invalid("%s: expected H, d and V of 1 to 2^20, got %" PRId64 ", %" PRId64 " and %" PRId64, verb, in.heads,
                   in.q.width, in.values.width);
  if (!sizes_fit(in))
    return invalid("%s: expected at most 2^40 rows of q and users and 2^24 tokens, got %" PRId64 ", %" PRId64
                   " and %" PRId64,
                   verb, in.q.rows, in.candidates.users, in.agents);
  if (in.q.rows % in.heads != 0)
    return invalid("%s: q expected rows for all of H = %" PRId64 " heads, got %" PRId64, verb, in.heads, in.q.rows);
  int64_t rows;
  if (__builtin_mul_overflow(in.candidates.users * in.heads, in.agents, &rows)) rows = -1;
  for (const auto& [name, given, width] :
       {std::tuple("keys", &in.keys, in.q.width), std::tuple("values", &in.values, in.values.width)})
    if (given->rows != rows || given->width != width)
      return invalid("%s: %s expected %s as rows, got %s", verb, name,
                     ShapeText({in.candidates.users, in.agents, in.heads, width}).text,
                     ShapeText({given->rows, given->width}).text);
  if (in.bias) HISAC_TRY(check_shape(verb, "bias", {in.candidates.users, in.agents}, in.bias));
  if (std::isnan(in.scale)) in.scale = 1 / std::sqrt(static_cast<float>(in.q.width));
  if (!(std::fabs(in.scale) < INFINITY)) return invalid("%s: scale expected finite, got %g", verb, double(in.scale));
  return check_candidates(verb, in.candidates, in.q.rows / in.heads, device);
}

}  // namespace

size_t attend_workspace(const Context& context, const AttendInputs& inputs) noexcept {
  if (!sizes_fit(inputs)) return Arena::kLimit;
  return backend_workspace(&Backend::attend_workspace, context, inputs);
}

Status attend(const Context& context, const AttendInputs& given, Attended out) noexcept {
  AttendInputs inputs = given;
  HISAC_TRY(check("attend", inputs, context.device));
  const int64_t n = inputs.q.rows / inputs.heads;
  if (out.out.rows != inputs.q.rows || out.out.width != inputs.values.width || out.out.dtype != inputs.q.dtype ||
      !has_shape(out.lse, {n, inputs.heads}))
    return invalid("attend: out expected %s of q's type and lse %s",
                   ShapeText({n, inputs.heads, inputs.values.width}).text, ShapeText({n, inputs.heads}).text);
  return call_backend("attend", &Backend::attend, context, inputs, out);
}

size_t attend_backward_workspace(const Context& context, const AttendInputs& inputs) noexcept {
  if (!sizes_fit(inputs)) return Arena::kLimit;
  return backend_workspace(&Backend::attend_backward_workspace, context, inputs);
}

Status attend_backward(const Context& context, const AttendInputs& given, const AttendForward& forward,
                       const AttendGradients& out) noexcept {
  AttendInputs inputs = given;
  HISAC_TRY(check("attend_backward", inputs, context.device));
  const int64_t n = inputs.q.rows / inputs.heads;
  const auto like = [&](const Rows& rows) {
    return rows.rows == inputs.q.rows && rows.width == inputs.values.width && check_float("", "", rows.dtype).ok();
  };
  if (!like(forward.d_out) || !like(forward.out) || !has_shape(forward.lse, {n, inputs.heads}) ||
      (forward.d_lse && !has_shape(forward.d_lse, {n, inputs.heads})))
    return invalid("attend_backward: expected out and d_out %s, lse and d_lse %s",
                   ShapeText({n, inputs.heads, inputs.values.width}).text, ShapeText({n, inputs.heads}).text);
  const int64_t users = inputs.candidates.users, m = inputs.agents, h = inputs.heads;
  if (!has_shape(out.q, {n, h, inputs.q.width}) || !has_shape(out.keys, {users, m, h, inputs.q.width}) ||
      !has_shape(out.values, {users, m, h, inputs.values.width}) ||
      (out.bias && !(inputs.bias && has_shape(out.bias, {users, m}))))
    return invalid("attend_backward: gradients expected the shapes of their arguments");
  return call_backend("attend_backward", &Backend::attend_backward, context, inputs, forward, out);
}

}  // namespace hisac
