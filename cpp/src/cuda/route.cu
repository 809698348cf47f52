// SPDX-License-Identifier: Apache-2.0
// `route` in four launches a pass: agents packed, work planned, tiles, users with several units merged.
#include <algorithm>

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
    const bool wanted = agent < t.agents && (!t.count || agent < t.count[user]);
    const int64_t row = user * t.agents + agent, width = t.x.width;
    float* const refined = t.out.refined.data;
    const float* const p = (t.first_pass ? t.prototypes : refined) + row * width;
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
    if (t.first_pass && refined && agent < t.agents)
      for (int64_t d = lane; d < width; d += 32) refined[row * width + d] = p[d];
    t.pack_row(user, agent, [&](int64_t d) { return here && d < width ? p[d] : 0.f; });
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
  SharedLayout shared;
  lay_out_stream(t, warps, true, shared);
  g.offset.agents = shared.take(2 * g.tile_agents * 4);
  g.offset.absent = shared.take(t.missing ? 2 * g.threads() * 4 : 0);
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
  g.value_tiles = static_cast<int>((std::max(t.v.width, t.refine ? t.x.width : 0) + kValues - 1) / kValues);
  const int shared_by = g.agent_tiles * static_cast<int>((t.v.width + kValues - 1) / kValues);
  g.workers = std::max(1, (g.blocks + shared_by - 1) / shared_by);
  return {};
}

void carve(Task& t, Arena& arena) {
  const int64_t agents = t.users * t.g.agent_tiles * t.g.tile_agents;
  t.packed = arena.take<uint16_t>(agents * t.g.parts * t.g.depth);
  t.half = arena.take<float>(agents);
  t.rate = arena.take<float>(agents);
  carve_units(t, t.g.state_floats(), arena);
}

struct Prepared {
  LeafTask leaves;  // whose sums are the rows, of the leaf method
  Task task;
};

/// All of a call: with leaves, of so many entries.
Status prepare(const RouteCall& call, int64_t entries, const simt::Machine& machine, Arena& arena, Prepared* prepared) {
  if (call.params.method == Method::exact) {
    prepared->task = describe_route(call);
  } else {
    const Histories sums = carve_rows(call, entries, arena, &prepared->leaves);
    prepared->task = describe_route({nullptr, call.params, sums, call.agents});
  }
  HISAC_TRY(plan_geometry(prepared->task, machine));
  carve(prepared->task, arena);
  return {};
}

void launch_all(Task& t, Launcher& launch, const Tokens& out) {
  t.out = out;
  if (t.users == 0) return;
  const auto tiles = t.softmax_over_agents ? tiles_kernel<true>(t.g) : tiles_kernel<false>(t.g);
  for (int round = 0; round <= t.refine; ++round) {
    t.refining = round < t.refine;
    t.first_pass = round == 0;
    t.g.value_tiles = static_cast<int>((t.value_width() + kValues - 1) / kValues);
    launch_pack_agents(t, launch);
    launch_plan_units(t, launch);
    launch(tiles, t.g.blocks, t.g.threads(), t.g.shared_bytes, t);
    launch(merge_units, launch.machine.processors * 4, kThreads, 0, t);
  }
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
  t.missing = params.missing == Missing::token;
  t.refine = params.refine;
  Geometry& g = t.g;
  const bool exact = t.x.dtype == DType::bfloat16 && t.v.dtype == DType::bfloat16;
  g.parts = params.precision == Precision::bfloat16 ? 1 : 2;
  g.stored = g.parts == 1 || exact ? 1 : 2;
  g.mt = 3 - g.parts;
  g.depth = depth_of(t.x.width);
  int64_t tiles = (t.rows + kTile - 1) / kTile;  // a call does not know the longest history
  for (g.levels = 1; tiles > 1; tiles /= 2) ++g.levels;
  return t;
}

void lay_out_stream(Task& t, int warps, bool values, SharedLayout& shared) {
  Geometry& g = t.g;
  g.warps = warps;
  g.tile_agents = warps * 16 * g.mt;
  g.agent_tiles = static_cast<int>(std::max<int64_t>(1, (t.agents + g.tile_agents - 1) / g.tile_agents));
  const int64_t n = g.rows, pitch = g.pitch(), x = t.x.data ? bytes_of(t.x.dtype) : 0,
                v = t.refining ? x : std::max(bytes_of(t.v.dtype), t.refine ? x : 0);
  g.offset.prototypes = shared.take((g.chunks > 1 ? 2 : 1) * g.parts * g.tile_agents * pitch * 2);
  g.offset.x = shared.take(g.buffers * g.stored * n * pitch * 2);
  g.offset.raw_x = shared.take(g.buffers * n * g.chunk * x);
  g.offset.v = shared.take(values ? 2 * g.stored * n * kValuePitch * 2 : 0);
  g.offset.raw_v = shared.take(values ? 2 * n * kValues * v : 0);
  g.offset.ids = shared.take(t.gathers() ? 4 * n * 16 : 0);
  g.offset.scale = shared.take(t.scale ? 2 * n * 4 : 0);
  g.offset.bias = shared.take(t.bias ? 2 * n * 4 : 0);
  g.offset.spread = shared.take(t.spread ? 2 * n * 4 : 0);
  g.offset.codes = shared.take(2 * n * 4 * t.levels);
  g.offset.half = shared.take(2 * n * 4);
  g.offset.shift = shared.take(2 * n * 4);
  g.offset.gone = shared.take(2 * n * 4);
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
                       const RouteAgents& agents, int64_t longest) noexcept {
  simt::Machine machine;
  if (const auto e = simt::machine(&machine); e != decltype(e){}) return 0;
  Prepared prepared;
  Arena arena;
  const int64_t entries = params.method == Method::leaf ? most_entries(histories, longest) : 0;
  const RouteCall call{book, params, histories, agents};
  return prepare(call, entries, machine, arena, &prepared).ok() ? arena.used() : 0;
}

Status route(const Context& context, const Codebook* book, const RouteParams& params, const Histories& histories,
             const RouteAgents& agents, Tokens out) noexcept {
  const RouteCall call{book, params, histories, agents};
  HISAC_TRY(check_counts("route", histories));
  HISAC_TRY(check_columns("route", "D", call.width()));
  Launcher launch("route", context);
  HISAC_TRY(launch.status());
  const bool leaf = params.method == Method::leaf;
  Prepared p;
  const int64_t entries =
      entries_that_fit(context, histories, leaf ? most_entries(histories, histories.behaviours()) : 0,
                       [&](int64_t n, Arena& counter) { (void)prepare(call, n, launch.machine, counter, &p); });
  Arena arena(context.workspace);
  HISAC_TRY(prepare(call, entries, launch.machine, arena, &p));
  HISAC_TRY(place_centers("route", context, book, p.task));
  HISAC_TRY(place_centers("route", context, book, p.leaves));
  HISAC_TRY(arena.check("route"));
  if (leaf) sum_leaves(p.leaves, launch);
  launch_all(p.task, launch, out);
  if (leaf && p.leaves.missing) absent_tokens(p.leaves, launch, out, p.task.agents + 1);
  return launch.status();
}

}  // namespace hisac::cuda
