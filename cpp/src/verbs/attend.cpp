// SPDX-License-Identifier: Apache-2.0
#include "hisac/attend.h"

#include <cmath>

#include "backend.h"
#include "base/arena.h"

namespace hisac {
namespace {

/// Whether a workspace may be sized by these inputs.
bool sizes_fit(const AttendInputs& in) noexcept {
  return within({in.heads, in.q.width, in.values.width}, 1, kMostWidth) && within({in.agents}, 0, kMostAgents) &&
         within({in.q.rows, in.candidates.users}, 0, kMostRows);
}

Status check(const char* verb, const AttendInputs& in, Device device) noexcept {
  HISAC_TRY(check_float(verb, "q", in.q.dtype));
  if (in.keys.dtype != in.q.dtype || in.values.dtype != in.q.dtype)
    return Status::error(Code::wrong_type, "%s: keys and values expected q's type", verb);
  if (!within({in.heads, in.q.width, in.values.width}, 1, kMostWidth))
    return Status::error(Code::invalid_argument,
                         "%s: expected H, d and V of 1 to 2^20, got %" PRId64 ", %" PRId64 " and %" PRId64, verb,
                         in.heads, in.q.width, in.values.width);
  if (!sizes_fit(in))
    return Status::error(Code::invalid_argument,
                         "%s: expected at most 2^40 rows of q and users and 2^24 tokens, got %" PRId64 ", %" PRId64
                         " and %" PRId64,
                         verb, in.q.rows, in.candidates.users, in.agents);
  if (in.q.rows % in.heads != 0)
    return Status::error(Code::invalid_argument, "%s: q expected rows for all of H = %" PRId64 " heads, got %" PRId64,
                         verb, in.heads, in.q.rows);
  int64_t rows;
  if (__builtin_mul_overflow(in.candidates.users * in.heads, in.agents, &rows) || in.keys.rows != rows ||
      in.values.rows != rows || in.keys.width != in.q.width)
    return Status::error(Code::invalid_argument,
                         "%s: expected keys [%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64
                         "] and values with the same first three, by candidate_offsets and q",
                         verb, in.candidates.users, in.agents, in.heads, in.q.width);
  if (in.bias && (in.bias.shape[0] != in.candidates.users || in.bias.shape[1] != in.agents))
    return Status::error(Code::invalid_argument,
                         "%s: bias expected [%" PRId64 ", %" PRId64 "], got [%" PRId64 ", %" PRId64 "]", verb,
                         in.candidates.users, in.agents, in.bias.shape[0], in.bias.shape[1]);
  if (!(std::fabs(in.scale) < INFINITY))
    return Status::error(Code::invalid_argument, "%s: scale expected finite, got %g", verb, double(in.scale));
  HISAC_TRY(check_histories(verb, in.candidates, in.q.rows / in.heads, device, "candidate_offsets"));
  for (int64_t b = 1; b < in.candidates.users && device == Device::cpu; ++b)
    if (in.candidates.start(b) < in.candidates.end(b - 1))
      return Status::error(Code::invalid_argument,
                           "%s: candidate_offsets expected in order, got a step back at user %" PRId64, verb, b);
  return {};
}

}  // namespace

size_t attend_workspace(const Context& context, const AttendInputs& inputs) noexcept {
  if (!sizes_fit(inputs)) return Arena::kLimit;
  return backend_workspace(&Backend::attend_workspace, context, inputs);
}

Status attend(const Context& context, const AttendInputs& inputs, Attended out) noexcept {
  HISAC_TRY(check("attend", inputs, context.device));
  const int64_t n = inputs.q.rows / inputs.heads;
  if (out.out.rows != inputs.q.rows || out.out.width != inputs.values.width || out.out.dtype != inputs.q.dtype ||
      out.lse.shape[0] != n || out.lse.shape[1] != inputs.heads)
    return Status::error(Code::invalid_argument,
                         "attend: out expected [%" PRId64 ", %" PRId64 ", %" PRId64 "] of q's type and lse [%" PRId64
                         ", %" PRId64 "]",
                         n, inputs.heads, inputs.values.width, n, inputs.heads);
  return call_backend("attend", &Backend::attend, context, inputs, out);
}

size_t attend_backward_workspace(const Context& context, const AttendInputs& inputs) noexcept {
  if (!sizes_fit(inputs)) return Arena::kLimit;
  return backend_workspace(&Backend::attend_backward_workspace, context, inputs);
}

Status attend_backward(const Context& context, const AttendInputs& inputs, const AttendForward& forward,
                       const AttendGradients& out) noexcept {
  HISAC_TRY(check("attend_backward", inputs, context.device));
  const int64_t n = inputs.q.rows / inputs.heads;
  const auto like = [&](const Rows& rows) {
    return rows.rows == inputs.q.rows && rows.width == inputs.values.width && check_float("", "", rows.dtype).ok();
  };
  if (!like(forward.d_out) || !like(forward.out) || forward.lse.shape[0] != n || forward.lse.shape[1] != inputs.heads ||
      (forward.d_lse && (forward.d_lse.shape[0] != n || forward.d_lse.shape[1] != inputs.heads)))
    return Status::error(Code::invalid_argument,
                         "attend_backward: expected out and d_out [%" PRId64 ", %" PRId64 ", %" PRId64
                         "], lse and d_lse [%" PRId64 ", %" PRId64 "]",
                         n, inputs.heads, inputs.values.width, n, inputs.heads);
  const auto is = [&](const Array<float, 4>& a, int64_t width) {
    return a.shape[0] == inputs.candidates.users && a.shape[1] == inputs.agents && a.shape[2] == inputs.heads &&
           a.shape[3] == width;
  };
  const bool fits = out.q.shape[0] == n && out.q.shape[1] == inputs.heads && out.q.shape[2] == inputs.q.width &&
                    is(out.keys, inputs.q.width) && is(out.values, inputs.values.width) &&
                    (!out.bias || (inputs.bias && out.bias.shape[0] == inputs.candidates.users &&
                                   out.bias.shape[1] == inputs.agents));
  if (!fits)
    return Status::error(Code::invalid_argument, "attend_backward: gradients expected the shapes of their arguments");
  return call_backend("attend_backward", &Backend::attend_backward, context, inputs, forward, out);
}

}  // namespace hisac
