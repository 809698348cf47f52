// SPDX-License-Identifier: Apache-2.0
#include "hisac/route.h"

#include "backend.h"
#include "base/arena.h"
#include "verbs/route_inputs.h"

namespace hisac {
namespace {

Status check_tokens(const RouteParams& params, const RouteInputs& in, const Tokens& out) noexcept {
  const int64_t users = in.histories.users, m = in.prototypes.shape[1] + (params.missing == Missing::token);
  if (out.tokens.rows != users * m || out.tokens.width != in.v.width || out.tokens.dtype != in.v.dtype ||
      !has_shape(out.lse, {users, m}))
    return Status::error(Code::invalid_argument, "route: out expected tokens %s of v's type and lse %s",
                         ShapeText({users, m, in.v.width}).text, ShapeText({users, m}).text);
  if (!params.refine) return {};
  return check_shape("route", "refined", {users, in.prototypes.shape[1], in.prototypes.shape[2]}, out.refined);
}

}  // namespace

size_t route_workspace(const Context& context, const RouteParams& params, const RouteInputs& inputs,
                       int64_t longest) noexcept {
  if (!sizes_fit(inputs, longest)) return Arena::kLimit;
  return backend_workspace(&Backend::route_workspace, context, params, inputs, longest);
}

Status route(const Context& context, const RouteParams& params, const RouteInputs& inputs, Tokens out) noexcept {
  HISAC_TRY(check_route("route", params, inputs, context.device));
  HISAC_TRY(check_tokens(params, inputs, out));
  return call_backend("route", &Backend::route, context, params, inputs, out);
}

}  // namespace hisac
