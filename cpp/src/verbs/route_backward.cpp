// SPDX-License-Identifier: Apache-2.0
#include "backend.h"
#include "base/arena.h"
#include "verbs/histories.h"

namespace hisac {
namespace {

constexpr const char* kVerb = "route_backward";

/// What the forward returned and its gradients.
Status check_forward(const Histories& in, const RouteAgents& agents, const RouteForward& f) noexcept {
  const int64_t users = in.offsets.users, m = agents.prototypes.shape[1], width = agents.prototypes.shape[2];
  const auto fits = [&](const Rows& rows) { return rows.rows == users * m && rows.width == in.v.width; };
  const bool has_tokens = f.d_tokens.data && in.v.width;
  if ((has_tokens && (!fits(f.d_tokens) || !fits(f.tokens))) || !has_shape(f.lse, {users, m}) ||
      (f.d_lse && !has_shape(f.d_lse, {users, m})))
    return invalid("%s: expected tokens and d_tokens %s, lse and d_lse %s", kVerb,
                   ShapeText({users, m, in.v.width}).text, ShapeText({users, m}).text);
  if (f.d_mean_x) HISAC_TRY(check_shape(kVerb, "d_mean_x", {users, m, width}, f.d_mean_x));
  if (f.d_mean_x) HISAC_TRY(check_shape(kVerb, "mean_x", {users, m, width}, f.mean_x));
  if (!has_tokens) return {};
  HISAC_TRY(check_float(kVerb, "d_tokens", f.d_tokens.dtype));
  return check_float(kVerb, "tokens", f.tokens.dtype);
}

Status check_gradients(const RouteParams& params, const Histories& in, const RouteAgents& agents, const RouteForward& f,
                       const RouteGradients& out) noexcept {
  const int64_t users = in.offsets.users, m = agents.prototypes.shape[1], width = agents.prototypes.shape[2],
                t = in.behaviours(), x_rows = gradient_rows(in, in.x_ids, in.items(), out.x_rows),
                v_rows = gradient_rows(in, in.v_ids, in.v.rows, out.v_rows);
  if (out.x && !in.x.data) return invalid("%s: a gradient of x expected x, got none", kVerb);
  if (out.v && !in.v.width) return invalid("%s: a gradient of v expected v, got none", kVerb);
  HISAC_TRY(check_listed(kVerb, "x", in.x_ids, out.x_rows));
  HISAC_TRY(check_listed(kVerb, "v", in.v_ids, out.v_rows));
  if ((out.v && !has_shape(out.v, {v_rows, in.v.width})) || (out.x && !has_shape(out.x, {x_rows, width})) ||
      (out.bias && !has_shape(out.bias, {t})) || (out.spread && !has_shape(out.spread, {t})) ||
      (out.temperature && !has_shape(out.temperature, {params.temperature.shape[0]})) ||
      (out.prototypes && !has_shape(out.prototypes, {users, m, width})))
    return invalid("%s: gradients expected the shapes of their arguments, or the rows listed", kVerb);
  if (out.x && f.d_mean_x) return Status::error(Code::not_implemented, "%s: mean_x has no gradient for x", kVerb);
  return {};
}

}  // namespace

size_t route_backward_workspace(const Context& context, const Codebook* book, const RouteParams& params,
                                const Histories& histories, const RouteAgents& agents, const RouteForward& forward,
                                const RouteGradients& out) noexcept {
  const auto& p = agents.prototypes.shape;
  if (!sizes_fit(histories, p[2], p[1])) return Arena::kLimit;
  const Histories in = stated(histories, context.device);
  return backend_workspace(&Backend::route_backward_workspace, context, book, params, in, agents, forward, out);
}

Status route_backward(const Context& context, const Codebook* book, const RouteParams& params,
                      const Histories& histories, const RouteAgents& agents, const RouteForward& forward,
                      const RouteGradients& out) noexcept {
  Histories in = histories;
  RouteParams complete = params;
  HISAC_TRY(check_route(kVerb, context, book, complete, in, agents));
  HISAC_TRY(check_forward(in, agents, forward));
  HISAC_TRY(check_gradients(complete, in, agents, forward, out));
  return call_backend(kVerb, &Backend::route_backward, context, book, complete, in, agents, forward, out);
}

}  // namespace hisac
