// SPDX-License-Identifier: Apache-2.0
#include "hisac/leaf_sums.h"

#include "backend.h"
#include "base/arena.h"
#include "codebook/checks.h"
#include "verbs/route_inputs.h"

namespace hisac {
namespace {

/// The inputs with no agents, but with prototypes whose shape holds D, where `route` expects it.
RouteInputs without_agents(const RouteInputs& inputs) noexcept {
  RouteInputs in = inputs;
  const int64_t width = in.x.data ? in.x.width : in.book && !in.book->empty() ? in.book->width() : 0;
  in.prototypes = {nullptr, {in.histories.users, 0, width}};
  in.count = {};
  return in;
}

Status check(const RouteInputs& in, const LeafSums& out, Device device) noexcept {
  constexpr float kOne = 1;
  RouteParams params;
  params.method = Method::leaf;
  params.temperature = {&kOne, {1}};
  HISAC_TRY(check_route("leaf_sums", params, in, device));
  HISAC_TRY(check_book("leaf_sums", in.book));
  const int64_t users = in.histories.users, levels = in.book->levels();
  int64_t rows = 0;  // of all histories; on a device their lengths cannot be read
  for (int64_t b = 0; b < users && device == Device::cpu; ++b) rows += in.histories.end(b) - in.histories.start(b);
  const bool fits = out.x.shape[0] >= rows && out.v.shape[0] >= rows && out.bias.shape[0] >= rows &&
                    out.spread.shape[0] >= rows && out.codes.shape[0] >= rows && out.offsets.shape[0] == users + 1 &&
                    out.x.shape[1] == in.prototypes.shape[2] && out.v.shape[1] == in.v.width &&
                    out.codes.shape[1] == levels;
  if (fits) return {};
  return Status::error(Code::invalid_argument,
                       "leaf_sums: out expected offsets [%" PRId64 "] and at least %" PRId64 " rows of x [%" PRId64
                       "], v [%" PRId64 "], bias, spread and codes [%" PRId64 "]",
                       users + 1, rows, in.prototypes.shape[2], in.v.width, levels);
}

}  // namespace

size_t leaf_sums_workspace(const Context& context, const RouteInputs& inputs, int64_t longest) noexcept {
  const RouteInputs in = without_agents(inputs);
  if (!sizes_fit(in, longest)) return Arena::kLimit;
  return backend_workspace(&Backend::leaf_sums_workspace, context, in, longest);
}

Status leaf_sums(const Context& context, const RouteInputs& inputs, const LeafSums& out) noexcept {
  const RouteInputs in = without_agents(inputs);
  HISAC_TRY(check(in, out, context.device));
  return call_backend("leaf_sums", &Backend::leaf_sums, context, in, out);
}

}  // namespace hisac
