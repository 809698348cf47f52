// SPDX-License-Identifier: Apache-2.0
// The public face of leaf sums: users in rooms, then moved together.
#include <cmath>
#include <cstring>

#include "checks.h"
#include "leaf_rows.h"
#include "on_cuda.h"

namespace hisac {
namespace {

/// The inputs with as many agents as are needed, none, and the width where `route` expects it.
RouteInputs without_agents(const RouteInputs& inputs) noexcept {
  RouteInputs in = inputs;
  const int64_t width = in.x.data ? in.x.width : in.book && !in.book->empty() ? in.book->width() : 0;
  in.prototypes = {nullptr, {in.histories.users, 0, width}};
  in.count = {};
  return in;
}

/// rows: those of all histories, 0 on a device, where they are not seen.
Status check(const RouteInputs& in, const LeafSums& out, Device device, int64_t* rows) noexcept {
  constexpr float kOne = 1;
  RouteParams params;
  params.method = Method::leaf;
  params.temperature = {&kOne, {1}};
  HISAC_TRY(check_route("leaf_sums", params, in, device));
  HISAC_TRY(check_book("leaf_sums", in.book));
  const int64_t users = in.histories.users, levels = in.book->levels();
  *rows = 0;
  for (int64_t b = 0; b < users && device == Device::cpu; ++b) *rows += in.histories.end(b) - in.histories.start(b);
  const bool fits = out.x.shape[0] >= *rows && out.v.shape[0] >= *rows && out.bias.shape[0] >= *rows &&
                    out.spread.shape[0] >= *rows && out.codes.shape[0] >= *rows && out.offsets.shape[0] == users + 1 &&
                    out.x.shape[1] == in.prototypes.shape[2] && out.v.shape[1] == in.v.width &&
                    out.codes.shape[1] == levels;
  if (fits) return {};
  return Status::error(Code::invalid_argument,
                       "leaf_sums: out expected offsets [%" PRId64 "] and at least %" PRId64 " rows of x [%" PRId64
                       "], v [%" PRId64 "], bias, spread and codes [%" PRId64 "]",
                       users + 1, *rows, in.prototypes.shape[2], in.v.width, levels);
}

LeafRows from(const LeafSums& out, int64_t row) noexcept {
  return {out.x.data + row * out.x.shape[1], out.v.data + row * out.v.shape[1], out.bias.data + row,
          out.spread.data + row, out.codes.data + row * out.codes.shape[1]};
}

}  // namespace

size_t leaf_sums_workspace(const RouteInputs& inputs, int64_t longest, int workers, Device device) noexcept {
  const RouteInputs in = without_agents(inputs);
  if (device == Device::cuda) return bytes_on_cuda(&cuda::Verbs::leaf_sums_workspace, in, longest);
  Arena arena;
  LeafSummer(in, longest, workers).carve(arena);
  arena.take<int64_t>(in.histories.users);
  return arena.used();
}

Status leaf_sums(const Context& context, const RouteInputs& inputs, const LeafSums& out) noexcept {
  const RouteInputs in = without_agents(inputs);
  const int64_t users = in.histories.users;
  int64_t rows = 0, done = 0, room = 0;
  HISAC_TRY(check(in, out, context.device, &rows));
  if (context.device == Device::cuda) return on_cuda("leaf_sums", &cuda::Verbs::leaf_sums, context, in, out);
  LeafSummer leaves(in, longest_of(in.histories), workers_of(context));
  Arena arena(context.workspace);
  leaves.carve(arena);
  int64_t* const list = arena.take<int64_t>(users);
  HISAC_TRY(arena.check("leaf_sums"));
  for (int64_t b = 0; b < users; ++b) list[b] = b;
  out.offsets.data[0] = 0;
  for (int64_t first = 0, n; first < users; first += n) {
    n = leaves.fit(list + first, users - first);
    leaves.sum(context, list + first, n, from(out, room));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t g = 0; g < leaves.leaves(i); ++g) {
        const LeafRows a = from(out, room + leaves.start(i) + g), b = from(out, done);
        if (!(*a.bias > -INFINITY)) continue;
        ++done;
        if (a.bias == b.bias) continue;
        const auto move = [](auto* to, const auto* source, int64_t count) {
          std::memmove(to, source, sizeof(*to) * size_t(count));
        };
        move(b.x, a.x, out.x.shape[1]);
        move(b.v, a.v, out.v.shape[1]);
        move(b.bias, a.bias, 1);
        move(b.spread, a.spread, 1);
        move(b.codes, a.codes, out.codes.shape[1]);
      }
      out.offsets.data[first + i + 1] = done;
    }
    room += leaves.start(n);
  }
  return {};
}

}  // namespace hisac
