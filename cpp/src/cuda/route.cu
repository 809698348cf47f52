// SPDX-License-Identifier: Apache-2.0
// `route` in four launches a pass: agents packed, work planned, tiles, users with several units merged.
#include <algorithm>

#include "base/arena.h"
#include "cuda/device/block.h"
#include "cuda/leaf_sums.h"
#include "cuda/route_back_task.h"
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
    const int64_t count = !t.count                   ? t.agents
                          : t.count[user] < 0        ? 0
                          : t.count[user] < t.agents ? t.count[user]
                                                     : t.agents;
    const int64_t row = user * t.agents + agent, width = t.x.width;
    const float* const p = (t.first_pass || !t.refined ? t.prototypes : t.refined) + row * width;
    float squares = 0, tau = 0;
    if (agent < count) {
      for (int64_t d = lane; d < width; d += 32) {
        const float y = t.g.parts == 1 ? rounded(p[d]) : p[d];
        squares = simt::fused(y, y, squares);
      }
      tau = t.temperature[t.per_agent ? agent : 0];
    }
    for (int m = 16; m; m /= 2) squares += simt::shuffle_xor(squares, m);
    const bool here = agent < count && tau > 0 && below_limit(squares, width, [&](int64_t d) { return p[d]; });
    if (lane == 0) {
      t.half[i] = here ? -0.5f * squares : -kInfinity;
      t.rate[i] = here ? larger(smaller(2 * kLog2e / tau, kLargest), 0x1p-126f) : 1.f;
    }
    if (t.first_pass && t.refined && agent < t.agents)
      for (int64_t d = lane; d < width; d += 32) t.refined[row * width + d] = t.prototypes[row * width + d];
    const int tile = static_cast<int>(agent / t.g.tile_agents), place = static_cast<int>(agent % t.g.tile_agents);
    uint16_t* const out =
        t.packed + ((user * t.g.agent_tiles + tile) * t.g.parts * t.g.tile_agents + place) * t.g.depth;
    for (int d = 2 * lane; d < t.g.depth; d += 64) {
      uint32_t low, high = bf16_parts(here && d < width ? p[d] : 0.f, here && d + 1 < width ? p[d + 1] : 0.f, &low);
      *reinterpret_cast<uint32_t*>(out + d) = high;
      if (t.g.parts > 1) *reinterpret_cast<uint32_t*>(out + int64_t{t.g.tile_agents} * t.g.depth + d) = low;
    }
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

/// A thread has two neighbours of a state: the tree of base/reduction_tree.h over a user's slots, as a binary counter
/// makes it.
SIMT_KERNEL(kThreads) merge_units(SIMT_CONSTANT Task t) {
  const int threads = t.g.threads(), absent = t.g.state() - 2;  // the register of the absent rows' sum
  const int64_t sums = int64_t{t.g.mt} * (kValues / 4) * threads;
  const int64_t elements = sums + kValues, pieces = (elements + kThreads - 1) / kThreads, items = t.items();
  for (int64_t i = simt::block(); i < t.plan->shared * items * pieces; i += simt::blocks()) {
    const SharedUser s = t.shared[i / pieces / items];
    const int item = static_cast<int>(i / pieces % items), agent_tile = item % t.g.agent_tiles,
              values = item / t.g.agent_tiles;
    const int64_t e = i % pieces * kThreads + simt::thread();
    const bool missing = e >= sums;
    const int thread = static_cast<int>(missing ? e - sums : e % threads), lane = thread & 31;
    if (e >= elements || (missing && (thread >= threads || agent_tile != 0))) continue;
    const int pair = missing ? 0 : static_cast<int>(e / threads);  // [mt][kValues / 8][2]
    const int h = pair / (kValues / 4), c = pair % (kValues / 4) / 2, r = pair % 2;
    float max_logit[kMostStates] = {}, mass[kMostStates] = {}, left[kMostStates] = {}, right[kMostStates] = {};
    const auto merge = [&](int a, int b) {
      const Merge m(max_logit[a], max_logit[b]);
      max_logit[a] = m.max_logit;
      mass[a] = m.sum(mass[a], mass[b]);
      left[a] = missing ? left[b] + left[a] : m.sum(left[a], left[b]);
      right[a] = missing ? right[b] + right[a] : m.sum(right[a], right[b]);
    };
    int level = 0;
    for (int k = 0; k < s.count; ++k) {
      const float* const from = t.slots + ((int64_t{s.slot} + k) * items + item) * t.g.state_floats() + thread;
      const int state = (h * 2 + r) * 2, first = missing ? absent : t.g.mt * 4 + (h * (kValues / 8) + c) * 4 + 2 * r;
      max_logit[level] = from[int64_t{state} * threads];
      mass[level] = from[int64_t{state + 1} * threads];
      left[level] = from[int64_t{first} * threads];
      right[level++] = from[int64_t{first + 1} * threads];
      for (int n = k + 1; n % 2 == 0; n /= 2, --level) merge(level - 2, level - 1);
    }
    for (; level > 1; --level) merge(level - 2, level - 1);
    if (missing) {
      finish_missing(t, s.user, int64_t{values} * kValues + thread, right[0], left[0]);
      continue;
    }
    const int64_t column = int64_t{values} * kValues + c * 8 + (lane & 3) * 2;
    const Row out(t, s.user,
                  int64_t{agent_tile} * t.g.tile_agents + (thread >> 5) * 16 * t.g.mt + h * 16 + (lane >> 2) + r * 8,
                  max_logit[0], mass[0]);
    if (column == 0) out.finish();
    out.put(column, left[0], right[0]);
  }
}

// ---- host

/// Offsets in shared memory and its size for `warps` warps.
void lay_out(Task& t, int warps) {
  Geometry& g = t.g;
  g.warps = warps;
  g.tile_agents = warps * 16 * g.mt;
  g.agent_tiles = static_cast<int>(std::max<int64_t>(1, (t.agents + g.tile_agents - 1) / g.tile_agents));
  SharedLayout shared;
  const int64_t pitch = g.pitch(), x = t.x.data ? bytes_of(t.x.dtype) : 0,
                v = std::max(bytes_of(t.v.dtype), t.refined ? x : 0), n = g.rows;
  g.offset.prototypes = shared.take((g.chunks > 1 ? 2 : 1) * g.parts * g.tile_agents * pitch * 2);
  g.offset.x = shared.take(2 * g.stored * n * pitch * 2);
  g.offset.v = shared.take(2 * g.stored * n * kValuePitch * 2);
  g.offset.raw_x = shared.take(2 * n * g.chunk * x);
  g.offset.raw_v = shared.take(2 * n * kValues * v);
  g.offset.ids = shared.take(t.gathers() ? 4 * n * 16 : 0);
  g.offset.scale = shared.take(t.scale ? 2 * n * 4 : 0);
  g.offset.bias = shared.take(t.bias ? 2 * n * 4 : 0);
  g.offset.spread = shared.take(t.spread ? 2 * n * 4 : 0);
  g.offset.codes = shared.take(2 * n * 4 * t.levels);
  g.offset.half = shared.take(2 * n * 4);
  g.offset.shift = shared.take(2 * n * 4);
  g.offset.gone = shared.take(2 * n * 4);
  g.offset.norm = shared.take(n * 4);
  g.offset.cross = shared.take(t.softmax_over_agents ? 2 * g.warps * n * 4 : 0);
  g.offset.row_lse = shared.take(!t.softmax_over_agents ? 0 : g.agent_tiles > 1 ? 2 * kTile * 4 : n * 4);
  g.offset.agents = shared.take(2 * g.tile_agents * 4);
  g.offset.absent = shared.take(t.missing ? 2 * g.threads() * 4 : 0);
  g.offset.work = shared.take(kWorkBytes);
  g.shared_bytes = static_cast<size_t>(shared.bytes());
}

Status plan_geometry(Task& t, Precision precision, const simt::Machine& machine) {
  Geometry& g = t.g;
  const bool exact = t.x.dtype == DType::bfloat16 && t.v.dtype == DType::bfloat16;
  g.parts = precision == Precision::bfloat16 ? 1 : 2;
  g.stored = g.parts == 1 || exact ? 1 : 2;
  g.mt = 3 - g.parts;
  g.rows = 64 / g.stored;
  g.depth = static_cast<int>((t.x.width + 15) / 16 * 16);
  const int limit = (g.mt == 1 ? kMostThreads1 : kMostThreads2) / 32;
  int most = 0;
  for (int chunk = 128; most < 4 && chunk >= 32; chunk /= 2) {
    g.chunk = std::min(g.depth, chunk);
    g.chunks = (g.depth + g.chunk - 1) / g.chunk;
    for (most = limit; most > 2; --most) {
      lay_out(t, most);
      if (g.shared_bytes <= machine.shared) break;
    }
  }
  lay_out(t, most);
  const int per_warp = 16 * g.mt;  // as few tiles as that, all of one size
  lay_out(t, static_cast<int>(
                 std::max<int64_t>(2, ((t.agents + g.agent_tiles - 1) / g.agent_tiles + per_warp - 1) / per_warp)));
  if (g.shared_bytes > machine.shared)
    return Status::error(Code::not_implemented,
                         "route: expected a device with %zu bytes of shared memory a block, got %zu", g.shared_bytes,
                         machine.shared);
  const int threads = g.threads();
  const int fit =
      static_cast<int>(std::min<size_t>(static_cast<size_t>((g.mt == 1 ? kMostThreads1 : kMostThreads2) / threads),
                                        machine.shared / (g.shared_bytes + 1024)));
  g.blocks = machine.processors * std::max(1, std::min(fit, 8));
  g.value_tiles = static_cast<int>((std::max(t.v.width, t.refined ? t.x.width : 0) + kValues - 1) / kValues);
  const int shared_by = g.agent_tiles * static_cast<int>((t.v.width + kValues - 1) / kValues);
  g.workers = std::max(1, (g.blocks + shared_by - 1) / shared_by);
  int64_t tiles = (t.rows + kTile - 1) / kTile;  // a call does not know the longest history
  for (g.levels = 1; tiles > 1; tiles /= 2) ++g.levels;
  return {};
}

void carve(Task& t, Arena& arena) {
  const Geometry& g = t.g;
  const int64_t workers = g.workers, padded = int64_t{g.agent_tiles} * g.tile_agents;
  t.plan = arena.take<Plan>(1);
  t.unit = arena.take<Unit>(t.users + 8 * workers);
  t.shared = arena.take<SharedUser>(4 * workers);
  t.packed = arena.take<uint16_t>(t.users * padded * g.parts * g.depth);
  t.half = arena.take<float>(t.users * padded);
  t.rate = arena.take<float>(t.users * padded);
  t.stack = arena.take<float>(int64_t{g.blocks} * g.levels * g.state_floats());
  t.slots = arena.take<float>(8 * workers * g.agent_tiles * g.value_tiles * g.state_floats());
}

Task describe(const RouteParams& params, const RouteInputs& in) {
  Task t;
  static_cast<Behaviours&>(t) = behaviours_of(in, in.prototypes.shape[2]);
  t.x_aligned = aligned(t.x);
  t.v_aligned = aligned(t.v);
  t.agents = in.prototypes.shape[1];
  t.prototypes = in.prototypes.data;
  t.count = in.count.data;
  t.temperature = params.temperature.data;
  t.per_agent = params.temperature.shape[0] != 1;
  t.softmax_over_agents = params.normalize == Normalize::agents;
  t.missing = params.missing == Missing::token;
  static float placeholder;
  if (params.refine) t.refined = &placeholder;  // where it lies is known later
  return t;
}

/// The leaf sums of so many entries and, over them, `route`.
struct LeafRoute {
  LeafTask leaves;
  Task task;
};

Status carve_leaves(const RouteParams& params, const RouteInputs& in, int64_t entries, const simt::Machine& machine,
                    Arena& arena, LeafRoute* out) {
  out->task = describe(params, carve_rows(params, in, entries, arena, &out->leaves));
  HISAC_TRY(plan_geometry(out->task, params.precision, machine));
  carve(out->task, arena);
  return {};
}

void launch_all(Task& t, const RouteParams& params, Launcher& launch, const Tokens& out) {
  t.tokens = out.tokens.data;
  t.token_type = out.tokens.dtype;
  t.lse = out.lse.data;
  if (params.refine) t.refined = out.refined.data;
  if (t.users == 0) return;
  const auto tiles = t.softmax_over_agents ? tiles_kernel<true>(t.g) : tiles_kernel<false>(t.g);
  for (int round = 0; round <= params.refine; ++round) {
    t.refining = round < params.refine;
    t.first_pass = round == 0;
    t.g.value_tiles = static_cast<int>((t.value_width() + kValues - 1) / kValues);
    launch_pack_agents(t, launch);
    launch_plan_units(t, launch);
    launch(tiles, t.g.blocks, t.g.threads(), t.g.shared_bytes, t);
    launch(merge_units, launch.machine.processors * 4, kThreads, 0, t);
  }
}

}  // namespace

Task describe_route(const RouteParams& params, const RouteInputs& in) { return describe(params, in); }
void launch_pack_agents(const Task& t, Launcher& launch) {
  const int64_t agents = t.users * t.g.agent_tiles * t.g.tile_agents;
  launch(pack_agents, least((agents + 7) / 8, launch.machine.processors * 16), kThreads, 0, t);
}
void launch_plan_units(const Task& t, Launcher& launch) { launch(plan_units, 1, kThreads, kFront, t); }

size_t route_workspace(const Context&, const RouteParams& params, const RouteInputs& inputs, int64_t longest) noexcept {
  simt::Machine machine;
  if (const auto e = simt::machine(&machine); e != decltype(e){}) return 0;
  Arena arena;
  if (params.method == Method::leaf) {
    LeafRoute leaf;
    const Status status = carve_leaves(params, inputs, most_entries(inputs, longest), machine, arena, &leaf);
    return status.ok() ? arena.used() : 0;
  }
  Task t = describe(params, inputs);
  if (!plan_geometry(t, params.precision, machine).ok()) return 0;
  carve(t, arena);
  return arena.used();
}

Status route(const Context& context, const RouteParams& params, const RouteInputs& inputs, Tokens out) noexcept {
  HISAC_TRY(check_counts("route", inputs));
  HISAC_TRY(check_columns("route", "D", inputs.prototypes.shape[2]));
  Launcher launch("route", context);
  HISAC_TRY(launch.status());
  Arena arena(context.workspace);
  if (params.method == Method::leaf) {
    LeafRoute leaf;
    const int64_t entries =
        entries_that_fit(context, inputs, most_entries(inputs, inputs.behaviours()), [&](int64_t n, Arena& counter) {
          LeafRoute other;
          (void)carve_leaves(params, inputs, n, launch.machine, counter, &other);
        });
    HISAC_TRY(carve_leaves(params, inputs, entries, launch.machine, arena, &leaf));
    HISAC_TRY(arena.check("route"));
    HISAC_TRY(place_centers("route", context, inputs, leaf.leaves));
    sum_leaves(leaf.leaves, launch);
    launch_all(leaf.task, params, launch, out);
    if (params.missing == Missing::token) absent_tokens(leaf.leaves, launch, out, leaf.task.agents + 1);
    return launch.status();
  }
  Task t = describe(params, inputs);
  HISAC_TRY(place_centers("route", context, inputs, t));
  HISAC_TRY(plan_geometry(t, params.precision, launch.machine));
  carve(t, arena);
  HISAC_TRY(arena.check("route"));
  launch_all(t, params, launch, out);
  return launch.status();
}

}  // namespace hisac::cuda
