// SPDX-License-Identifier: Apache-2.0
#include "backend.h"
#include "base/arena.h"
#include "verbs/histories.h"

namespace hisac {
namespace {

Status check_gradients(const RouteParams& params, const Histories& in, const RouteAgents& agents, const RouteForward& f,
                       const RouteGradients& out) noexcept {
  const int64_t users = in.offsets.users, m = agents.prototypes.shape[1], width = agents.prototypes.shape[2];
  const int64_t rows = m + (params.missing == Missing::token), t = in.behaviours(), v = in.v.width;
  if (params.refine != 0)
    return Status::error(Code::invalid_argument,
                         "route_backward: refine expected 0 with the refined prototypes, got %d", params.refine);
  if (f.d_tokens.rows != users * rows || f.d_tokens.width != v || f.tokens.rows != users * rows ||
      f.tokens.width != v || !has_shape(f.lse, {users, rows}) || (f.d_lse && !has_shape(f.d_lse, {users, rows})))
    return Status::error(Code::invalid_argument, "route_backward: expected tokens and d_tokens %s, lse and d_lse %s",
                         ShapeText({users, rows, v}).text, ShapeText({users, rows}).text);
  HISAC_TRY(check_float("route_backward", "d_tokens", f.d_tokens.dtype));
  HISAC_TRY(check_float("route_backward", "tokens", f.tokens.dtype));
  if ((out.v && !has_shape(out.v, {t, v})) || (out.x && !has_shape(out.x, {t, width})) ||
      (out.bias && !has_shape(out.bias, {t})) ||
      (out.temperature && !has_shape(out.temperature, {params.temperature.shape[0]})) ||
      (out.prototypes && !has_shape(out.prototypes, {users, m, width})))
    return Status::error(Code::invalid_argument, "route_backward: gradients expected the shapes of their arguments");
  if (out.x && !in.x.data)
    return Status::error(Code::invalid_argument, "route_backward: a gradient of x expected x, got none");
  if (params.method == Method::leaf && (out.bias || out.x || out.prototypes))
    return Status::error(Code::not_implemented,
                         "route_backward: method='leaf' has gradients for v and temperature only");
  return {};
}

}  // namespace

size_t route_backward_workspace(const Context& context, const Codebook* book, const RouteParams& params,
                                const Histories& histories, const RouteAgents& agents, const RouteGradients& out,
                                int64_t longest) noexcept {
  const auto& p = agents.prototypes.shape;
  if (!sizes_fit(histories, p[2], p[1], longest)) return Arena::kLimit;
  return backend_workspace(&Backend::route_backward_workspace, context, book, params, histories, agents, out, longest);
}

Status route_backward(const Context& context, const Codebook* book, const RouteParams& params,
                      const Histories& histories, const RouteAgents& agents, const RouteForward& forward,
                      const RouteGradients& out) noexcept {
  HISAC_TRY(check_route("route_backward", book, params, histories, agents, context.device));
  HISAC_TRY(check_gradients(params, histories, agents, forward, out));
  return call_backend("route_backward", &Backend::route_backward, context, book, params, histories, agents, forward,
                      out);
}

}  // namespace hisac
