// SPDX-License-Identifier: Apache-2.0
// `route` in four launches: agents packed, work planned, tiles, users with several units merged. Sparse routing has two
// more, which make its mask.
#include <algorithm>

#include "cuda/agent_lists.h"
#include "cuda/device/block.h"
#include "cuda/route_back_task.h"
#include "cuda/route_merge.h"
#include "cuda/route_tile.h"
#include "cuda/verbs.h"

namespace hisac::cuda {
namespace {

constexpr int kThreads = 256;

/// A warp has an agent: bfloat16 parts, half its norm, its rate; absent and padding agents are zero, -inf and 1.
SIMT_KERNEL(kThreads) pack_agents(SIMT_CONSTANT Task t) {
  const int lane = simt::lane();
  const int64_t padded = int64_t{t.g.agent_tiles} * t.g.tile_agents, warps = int64_t{simt::blocks()} * (kThreads / 32);
  for (int64_t i = int64_t{simt::block()} * (kThreads / 32) + simt::warp(); i < t.users * padded; i += warps) {
    const int64_t user = i / padded, agent = i % padded;
    const bool wanted = agent < t.agents && (!t.count || agent < t.count[user]);
    const int64_t row = user * t.agents + agent, width = t.x.width;
    const float* const p = t.prototypes + row * width;
    float squares = 0, tau = 0;
    if (wanted) {
      for (int64_t d = lane; d < width; d += 32) {
        const float y = t.g.parts == 1 ? rounded(p[d]) : p[d];
        squares = simt::fused(y, y, squares);
      }
      tau = t.temperature[t.per_agent ? agent : 0];
    }
    for (int m = 16; m; m /= 2) squares += simt::shuffle_xor(squares, m);
    const bool here = wanted && tau > 0 && below_limit(squares, width, [&](int64_t d) { return p[d]; });
    if (lane == 0) {
      t.half[i] = here ? -0.5f * squares : -kInfinity;
      t.rate[i] = here ? larger(smaller(2 * kLog2e / tau, kLargest), 0x1p-126f) : 1.f;
    }
    t.pack_row(user, agent, 0, [&](int64_t d) { return here && d < width ? p[d] : 0.f; });
  }
}

/// One block: the chunk that gives every worker some four units, then each user's units.
SIMT_KERNEL(kThreads) plan_units(SIMT_CONSTANT Task t) {
  const int thread = simt::thread();
  int64_t tiles_here = 0, total = 0;
  for (int64_t b = thread; b < t.users; b += kThreads) tiles_here += t.tiles(b);
  scan_threads(tiles_here, &total, Add{});
  int64_t chunk = 1;
  while (chunk < (total + 4 * t.g.workers - 1) / (4 * t.g.workers)) chunk *= 2;
  int64_t planned = 0;  // units of earlier users; above 32 bits: those users that share, who have several
  for (int64_t first = 0; first < t.users; first += kThreads) {
    const int64_t b = first + thread, tiles = b < t.users ? t.tiles(b) : 0;
    const int64_t units = b >= t.users ? 0 : tiles > chunk ? (tiles + chunk - 1) / chunk : 1, several = units > 1;
    const int64_t place = scan_threads(units + (several << 32), &planned, Add{});
    const int64_t unit = place & 0xffffffff, sharers = place >> 32;
    const int64_t slot = unit - (b - sharers);  // a user of one unit has none
    for (int64_t c = 0; c < units; ++c)
      t.unit[unit + c] = {static_cast<int32_t>(b), static_cast<int32_t>(c * chunk),
                          static_cast<int32_t>((c + 1) * chunk < tiles ? (c + 1) * chunk : tiles),
                          several ? static_cast<int32_t>(slot + c) : -1};
    if (several) t.shared[sharers] = {static_cast<int32_t>(b), static_cast<int32_t>(slot), static_cast<int32_t>(units)};
  }
  if (thread == 0) *t.plan = {static_cast<int32_t>(planned & 0xffffffff), static_cast<int32_t>(planned >> 32), 0};
}

constexpr int kMostThreads1 = 512, kMostThreads2 = 256;  // of one and of two agent tiles a warp

template <int MT, int Q, int S, bool kOverAgents>
SIMT_KERNEL(MT == 1 ? kMostThreads1 : kMostThreads2)
route_tiles(SIMT_CONSTANT Task t) {
  RouteTile<MT, Q, S, kOverAgents>(t).run();
}

template <bool kOverAgents>
auto tiles_kernel(const Geometry& g) {
  return g.parts == 1    ? route_tiles<2, 1, 1, kOverAgents>
         : g.stored == 1 ? route_tiles<1, 2, 1, kOverAgents>
                         : route_tiles<1, 2, 2, kOverAgents>;
}

SIMT_KERNEL(kThreads) merge_units(SIMT_CONSTANT Task t) {
  const auto merge = [](float (&state)[4], const float (&later)[4]) {  // max_logit, mass and two sums
    const Merge m(state[0], later[0]);
    state[0] = m.max_logit;
    for (int n = 1; n < 4; ++n) state[n] = m.sum(state[n], later[n]);
  };
  merge_slots<2>(t, t.g.state_floats(), merge,
                 [&](const float (&state)[4], int64_t user, int64_t agent, int value_tile, int column) {
                   const ValueColumns values = t.value_columns(value_tile);
                   const Row out(t, values.of_x, user, agent, state[0], state[1]);
                   if (value_tile == 0 && column == 0) out.finish();
                   out.put(values.first + column, state[2], state[3]);
                 });
}

// ---- host

/// Offsets in shared memory and its size for `warps` warps.
void lay_out(Task& t, int warps) {
  Geometry& g = t.g;
  SharedLayout shared;
  lay_out_stream(t, warps, shared);
  g.offset.agents = shared.take(2 * g.tile_agents * 4);
  g.offset.work = shared.take(kWorkBytes);
  g.shared_bytes = static_cast<size_t>(shared.bytes());
}

Status plan_geometry(Task& t, const simt::Machine& machine) {
  Geometry& g = t.g;
  g.rows = 64 / g.stored;
  const int most_threads = g.mt == 1 ? kMostThreads1 : kMostThreads2, limit = most_threads / 32;
  int most = 0;
  for (int chunk = 128; most < 4 && chunk >= 32; chunk /= 2) {
    g.chunk = std::min(g.depth, chunk);
    g.chunks = (g.depth + g.chunk - 1) / g.chunk;
    for (most = limit; most > 2; --most) {
      lay_out(t, most);
      if (g.shared_bytes <= machine.shared) break;
    }
  }
  lay_out(t, most);  // as few tiles as that, all of one size
  lay_out(t, std::max(2, g.warps_of((t.agents + g.agent_tiles - 1) / g.agent_tiles)));
  if (g.shared_bytes > machine.shared)
    return Status::error(Code::not_implemented,
                         "route: expected a device with %zu bytes of shared memory a block, got %zu", g.shared_bytes,
                         machine.shared);
  g.blocks = resident_blocks(g, most_threads, machine);
  g.workers = std::max(1, (g.blocks + t.items() - 1) / t.items());
  return {};
}

void carve(Task& t, Arena& arena) {
  const int64_t agents = t.users * t.g.agent_tiles * t.g.tile_agents;
  t.packed = arena.take<uint16_t>(agents * t.g.parts * t.g.depth);
  t.half = arena.take<float>(agents);
  t.rate = arena.take<float>(agents);
  carve_units(t, t.g.state_floats(), arena);
}

/// All of a call.
Status prepare(const RouteCall& call, const Tokens& out, const simt::Machine& machine, Arena& arena, Task* t,
               ListTask* lists) {
  *t = describe_route(call);
  t->out = out;
  t->g.v_tiles = out.tokens.data ? value_tiles_of(t->v.width) : 0;
  t->g.value_tiles = t->g.v_tiles + (out.mean_x.data ? value_tiles_of(t->x.width) : 0);
  t->g.value_tiles = std::max(1, t->g.value_tiles);  // lse has to come from one
  HISAC_TRY(plan_geometry(*t, machine));
  carve(*t, arena);
  *lists = describe_masks(call, machine, arena);
  t->masks = lists->masks;
  return {};
}

}  // namespace

Task describe_route(const RouteCall& call) {
  const RouteParams& params = call.params;
  Task t;
  static_cast<Behaviours&>(t) = behaviours_of(call.book, call.in, call.width());
  t.x_aligned = aligned(t.x);
  t.v_aligned = aligned(t.v);
  t.agents = call.agents.prototypes.shape[1];
  t.prototypes = call.agents.prototypes.data;
  t.count = call.agents.count.data;
  t.temperature = params.temperature.data;
  t.per_agent = params.temperature.shape[0] != 1;
  t.softmax_over_agents = params.normalize == Normalize::agents;
  if (masks_agents(call)) t.mask_words = static_cast<int>((t.agents + 31) / 32);
  Geometry& g = t.g;
  const bool exact = t.x.dtype == DType::bfloat16 && (t.v.dtype == DType::bfloat16 || !t.v.data);
  g.parts = params.precision == Precision::bfloat16 ? 1 : 2;
  g.stored = g.parts == 1 || exact ? 1 : 2;
  g.mt = 3 - g.parts;
  g.depth = depth_of(t.x.width);
  int64_t tiles = (t.rows + kTile - 1) / kTile;  // a call does not know the longest history
  for (g.levels = 1; tiles > 1; tiles /= 2) ++g.levels;
  return t;
}

void lay_out_stream(Task& t, int warps, SharedLayout& shared) {
  Geometry& g = t.g;
  g.warps = warps;
  g.tile_agents = warps * 16 * g.mt;
  g.agent_tiles = static_cast<int>(std::max<int64_t>(1, (t.agents + g.tile_agents - 1) / g.tile_agents));
  const bool values = g.value_tiles > 0;
  const int64_t n = g.rows, pitch = g.pitch(), x = t.x.data ? bytes_of(t.x.dtype) : 0,
                v = std::max(g.v_tiles > 0 ? bytes_of(t.v.dtype) : 0, g.value_tiles > g.v_tiles ? x : 0);
  g.offset.prototypes = shared.take((g.chunks > 1 ? 2 : 1) * g.sides * g.parts * g.tile_agents * pitch * 2);
  g.offset.x = shared.take(g.buffers * g.stored * n * pitch * 2);
  g.offset.raw_x = shared.take(g.buffers * n * g.chunk * x);
  g.offset.v = shared.take(values ? 2 * g.stored * n * kValuePitch * 2 : 0);
  g.offset.raw_v = shared.take(2 * n * kValues * v);
  g.offset.ids = shared.take(t.gathers() ? 4 * n * 16 : 0);
  g.offset.scale = shared.take(t.scale ? 2 * n * 4 : 0);
  g.offset.bias = shared.take(t.bias ? 2 * n * 4 : 0);
  g.offset.spread = shared.take(t.spread ? 2 * n * 4 : 0);
  g.offset.codes = shared.take(2 * n * 4 * t.levels);
  g.offset.half = shared.take(2 * n * 4);
  g.offset.shift = shared.take(2 * n * 4);
  g.offset.node = shared.take(t.mask_words ? 2 * n * 4 : 0);
  g.offset.norm = shared.take(n * 4);
  g.offset.cross = shared.take(t.softmax_over_agents ? 2 * warps * n * 4 : 0);
  g.offset.row_lse = shared.take(!t.softmax_over_agents ? 0 : g.agent_tiles > 1 ? 2 * kTile * 4 : n * 4);
}

void carve_units(Task& t, int64_t state_floats, Arena& arena) {
  const int64_t workers = t.g.workers;
  t.plan = arena.take<Plan>(1);
  t.unit = arena.take<Unit>(t.users + 8 * workers);
  t.shared = arena.take<SharedUser>(4 * workers);
  t.stack = arena.take<float>(int64_t{t.g.blocks} * t.g.levels * state_floats);
  t.slots = arena.take<float>(8 * workers * t.items() * state_floats);
}

void launch_pack_agents(const Task& t, Launcher& launch) {
  const int64_t agents = t.users * t.g.agent_tiles * t.g.tile_agents;
  launch(pack_agents, least((agents + 7) / 8, launch.machine.processors * 16), kThreads, 0, t);
}
void launch_plan_units(const Task& t, Launcher& launch) { launch(plan_units, 1, kThreads, kFront, t); }

size_t route_workspace(const Context&, const Codebook* book, const RouteParams& params, const Histories& histories,
                       const RouteAgents& agents, const Tokens& out) noexcept {
  simt::Machine machine;
  if (const auto e = simt::machine(&machine); e != decltype(e){}) return 0;
  Task task;
  ListTask lists;
  Arena arena;
  return prepare({book, params, histories, agents}, out, machine, arena, &task, &lists).ok() ? arena.used() : 0;
}

Status route(const Context& context, const Codebook* book, const RouteParams& params, const Histories& histories,
             const RouteAgents& agents, Tokens out) noexcept {
  const RouteCall call{book, params, histories, agents};
  HISAC_TRY(check_counts("route", histories));
  HISAC_TRY(check_columns("route", "D", call.width()));
  Launcher launch("route", context);
  HISAC_TRY(launch.status());
  Task t;
  ListTask lists;
  Arena arena(context.workspace);
  HISAC_TRY(prepare(call, out, launch.machine, arena, &t, &lists));
  HISAC_TRY(place_centers("route", context, book, t));
  if (lists.masking && !agents.lists) HISAC_TRY(place_centers("route", context, *book, lists));
  HISAC_TRY(arena.check("route"));
  if (t.users == 0) return {};
  launch_pack_agents(t, launch);
  launch_lists(lists, launch);
  launch_plan_units(t, launch);
  launch(t.softmax_over_agents ? tiles_kernel<true>(t.g) : tiles_kernel<false>(t.g), t.g.blocks, t.g.threads(),
         t.g.shared_bytes, t);
  launch(merge_units, launch.machine.processors * 4, kThreads, 0, t);
  return launch.status();
}

}  // namespace hisac::cuda
