// SPDX-License-Identifier: Apache-2.0
#include "hisac/route.h"

#include "backend.h"
#include "base/arena.h"
#include "verbs/histories.h"

namespace hisac {
namespace {

Status check_tokens(const RouteParams& params, const Histories& in, const RouteAgents& agents,
                    const Tokens& out) noexcept {
  const auto& p = agents.prototypes.shape;
  const int64_t users = in.offsets.users, m = p[1] + (params.missing == Missing::token);
  if (out.tokens.rows != users * m || out.tokens.width != in.v.width || out.tokens.dtype != in.v.dtype ||
      !has_shape(out.lse, {users, m}))
    return Status::error(Code::invalid_argument, "route: out expected tokens %s of v's type and lse %s",
                         ShapeText({users, m, in.v.width}).text, ShapeText({users, m}).text);
  return params.refine ? check_shape("route", "refined", {users, p[1], p[2]}, out.refined) : Status();
}

}  // namespace

size_t route_workspace(const Context& context, const Codebook* book, const RouteParams& params,
                       const Histories& histories, const RouteAgents& agents, int64_t longest) noexcept {
  const auto& p = agents.prototypes.shape;
  if (!sizes_fit(histories, p[2], p[1], longest)) return Arena::kLimit;
  return backend_workspace(&Backend::route_workspace, context, book, params, histories, agents, longest);
}

Status route(const Context& context, const Codebook* book, const RouteParams& params, const Histories& histories,
             const RouteAgents& agents, Tokens out) noexcept {
  HISAC_TRY(check_route("route", book, params, histories, agents, context.device));
  HISAC_TRY(check_tokens(params, histories, agents, out));
  return call_backend("route", &Backend::route, context, book, params, histories, agents, out);
}

}  // namespace hisac
