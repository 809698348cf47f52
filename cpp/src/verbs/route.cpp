// SPDX-License-Identifier: Apache-2.0
#include "hisac/route.h"

#include "backend.h"
#include "base/arena.h"
#include "codebook/checks.h"
#include "verbs/histories.h"

namespace hisac {
Status check_tokens(const Histories& in, const RouteAgents& agents, const Tokens& out) noexcept {
  const auto& p = agents.prototypes.shape;
  const int64_t users = in.offsets.users, m = p[1];
  const MutableRows& tokens = out.tokens;
  if (tokens.data && tokens.dtype != in.v.dtype)
    return Status::error(Code::wrong_type, "route: tokens expected of v's type, got another");
  if (tokens.data && (tokens.rows != users * m || tokens.width != in.v.width))
    return invalid("route: tokens expected %s, got %s", ShapeText({users * m, in.v.width}).text,
                   ShapeText({tokens.rows, tokens.width}).text);
  HISAC_TRY(check_shape("route", "lse", {users, m}, out.lse));
  return out.mean_x ? check_shape("route", "mean_x", {users, m, p[2]}, out.mean_x) : Status();
}

size_t route_workspace(const Context& context, const Codebook* book, const RouteParams& params,
                       const Histories& histories, const RouteAgents& agents, const Tokens& out) noexcept {
  const auto& p = agents.prototypes.shape;
  if (!sizes_fit(histories, p[2], p[1])) return Arena::kLimit;
  const Histories in = stated(histories, context.device);
  return backend_workspace(&Backend::route_workspace, context, book, params, in, agents, out);
}

Status route(const Context& context, const Codebook* book, const RouteParams& params, const Histories& histories,
             const RouteAgents& agents, Tokens out) noexcept {
  Histories in = histories;
  RouteParams complete = params;
  HISAC_TRY(check_route("route", context, book, complete, in, agents));
  HISAC_TRY(check_tokens(in, agents, out));
  return call_backend("route", &Backend::route, context, book, complete, in, agents, out);
}

size_t agent_lists_workspace(const Context& context, const Codebook& book, const RouteAgents& agents) noexcept {
  const auto& p = agents.prototypes.shape;
  if (book.empty() || !within({p[0]}, 0, kMostRows) || !within({p[1]}, 0, kMostAgents)) return Arena::kLimit;
  return backend_workspace(&Backend::agent_lists_workspace, context, book, agents);
}

Status agent_lists(const Context& context, const Codebook& book, const RouteAgents& agents,
                   Array<int32_t, 3> out) noexcept {
  constexpr const char* kVerb = "agent_lists";
  HISAC_TRY(check_book(kVerb, &book));
  const auto& p = agents.prototypes.shape;
  HISAC_TRY(check_shape(kVerb, "prototypes", {p[0], p[1], book.width()}, agents.prototypes));
  if (!within({p[0]}, 0, kMostRows) || !within({p[1]}, 0, kMostAgents))
    return Status::error(Code::invalid_argument, "%s: expected at most 2^40 users and 2^24 agents, got %s", kVerb,
                         ShapeText(p).text);
  if (agents.count) HISAC_TRY(check_shape(kVerb, "count", {p[0]}, agents.count));
  const int64_t k = std::clamp<int64_t>(out.shape[2], 0, p[1]);
  HISAC_TRY(check_shape(kVerb, "out", {p[0], book.size(0), k}, out));
  return call_backend(kVerb, &Backend::agent_lists, context, book, agents, out);
}

size_t missing_workspace(const Context& context, const Codebook* book, const Histories& histories) noexcept {
  const int64_t width = width_of(book, histories);
  if (!sizes_fit(histories, width, 0)) return Arena::kLimit;
  return backend_workspace(&Backend::missing_workspace, context, book, histories);
}

Status missing(const Context& context, const Codebook* book, const Histories& histories, Array<float, 1> out) noexcept {
  Histories in = histories;
  HISAC_TRY(check_histories("missing", book, in, width_of(book, in), context.device));
  HISAC_TRY(check_shape("missing", "out", {in.behaviours()}, out));
  return call_backend("missing", &Backend::missing, context, book, in, out);
}

}  // namespace hisac
