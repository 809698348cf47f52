// SPDX-License-Identifier: Apache-2.0
// `route_backward`: agents and what the forward's results have of gradients packed, the rows' kernel over chunks of
// behaviours, the temperature's sums added up; then the prototypes' kernel over units of histories, and users with
// several units merged.
#include <algorithm>

#include "cuda/agent_lists.h"
#include "cuda/device/block.h"
#include "cuda/route_back_step.h"
#include "cuda/route_merge.h"
#include "cuda/verbs.h"

namespace hisac::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLeastChunk = 256;  // behaviours
constexpr int kChunks = 2048;     // that chunks below kTile come to, at most

/// A warp has an agent: its gradients in bfloat16 parts and what its weights need; absent and padding agents are zero.
SIMT_KERNEL(kThreads) pack_gradients(SIMT_CONSTANT BackTask b) {
  const int lane = simt::lane();
  const Task &x = b.x, &v = b.v;
  const RouteForward& f = b.forward;
  const Rows d_mean_x{f.d_mean_x.data, DType::float32, 0, x.x.width};
  const int64_t all = int64_t{simt::blocks()} * kThreads, padded = b.padded();
  const int64_t thread = int64_t{simt::block()} * kThreads + simt::thread();
  b.chunks.clear();
  if (thread == 0) *b.next = 0;
  // without d_tokens, dv has no phase
  for (int64_t i = thread; b.out.v.data && v.x.width == 0 && i < x.rows * x.v.width; i += all) b.out.v.data[i] = 0;
  for (int64_t i = thread / 32; i < x.users * padded; i += all / 32) {
    const int64_t user = i / padded, agent = i % padded, row = user * x.agents + agent;
    const bool here = x.half[i] != -kInfinity;  // only those below M
    double dot = 0;
    const auto add_products = [&](const Rows& d, const Rows& mean) {
      for (int64_t c = lane; here && d.data && c < d.width; c += 32)
        dot += static_cast<double>(element(d.data, d.dtype, row * d.width + c)) *
               static_cast<double>(element(mean.data, mean.dtype, row * d.width + c));
    };
    add_products(f.d_tokens, f.tokens);
    add_products(d_mean_x, {f.mean_x.data, DType::float32, 0, 0});
    for (int m = 16; m; m /= 2) dot += simt::shuffle_xor(dot, m);
    if (lane == 0) {
      const float lse = here ? f.lse.data[row] : kInfinity;
      const bool has_mass = finite(lse);
      b.agent_lse[i] = has_mass ? base2(lse) : kInfinity;
      b.dz_constant[i] =
          has_mass ? static_cast<float>((f.d_lse.data ? static_cast<double>(f.d_lse.data[row]) : 0.0) - dot) : 0.f;
      b.slope[i] = has_mass ? smaller(2 / x.temperature[x.per_agent ? agent : 0], kLargest) : 0.f;
    }
    const auto pack = [&](const Task& t, int side, const Rows& d) {
      t.pack_row(user, agent, side, [&](int64_t c) {
        return here && c < t.x.width ? element(d.data, d.dtype, row * t.x.width + c) : 0.f;
      });
    };
    pack(v, 0, f.d_tokens);
    if (x.g.sides > 1) pack(x, 1, d_mean_x);
  }
}

constexpr int kMostThreads1 = 416, kMostThreads2 = 256;  // of one and of two agent tiles a warp: 208 and 256 agents

template <int MT, int Q, int S, bool kOverAgents, bool kAgents>
SIMT_KERNEL(MT == 1 ? kMostThreads1 : kMostThreads2, 1)
back_tiles(SIMT_CONSTANT BackTask b) {
  RouteBack<MT, Q, S, kOverAgents, kAgents>(b).run();
}

template <bool kOverAgents, bool kAgents>
void launch_tiles(const BackTask& b, Launcher& launch) {
  const Geometry& g = b.x.g;
  const auto kernel = g.parts == 1    ? back_tiles<2, 1, 1, kOverAgents, kAgents>
                      : g.stored == 1 ? back_tiles<1, 2, 1, kOverAgents, kAgents>
                                      : back_tiles<1, 2, 2, kOverAgents, kAgents>;
  launch(kernel, g.blocks, g.threads(), g.shared_bytes, b);
}
template <bool kAgents>
void launch_tiles(const BackTask& b, Launcher& launch) {
  b.x.softmax_over_agents ? launch_tiles<true, kAgents>(b, launch) : launch_tiles<false, kAgents>(b, launch);
}

/// A block has an agent: its sums of chunks.
SIMT_KERNEL(kThreads) sum_temperature(SIMT_CONSTANT BackTask b) {
  for (int64_t a = simt::block(); a < b.x.agents; a += simt::blocks()) {
    double sum = 0;
    for (int c = simt::thread(); c < b.chunks.count; c += kThreads)
      sum += static_cast<double>(b.raw[a * b.chunks.count + c]);
    double total = 0;
    scan_threads(sum, &total, Add{});
    const float tau = b.x.temperature[b.x.per_agent ? a : 0];
    if (simt::thread() == 0) b.total[a] = tau > 0 ? -kLn2 * total / static_cast<double>(tau) : 0;
  }
}
SIMT_KERNEL(kThreads) finish_temperature(SIMT_CONSTANT BackTask b) {
  double sum = 0;
  for (int64_t a = simt::thread(); a < b.x.agents; a += kThreads)
    if (b.x.per_agent)
      b.out.temperature.data[a] = static_cast<float>(b.total[a]);
    else
      sum += b.total[a];
  double total = 0;
  scan_threads(sum, &total, Add{});
  if (!b.x.per_agent && simt::thread() == 0) *b.out.temperature.data = static_cast<float>(total);
}

SIMT_KERNEL(kThreads) merge_back_units(SIMT_CONSTANT BackTask b) {
  const auto merge = [](float (&state)[3], const float (&later)[3]) {
    for (int n = 0; n < 3; ++n) state[n] += later[n];
  };
  merge_slots<1>(b.x, b.state_floats(), merge,
                 [&](const float (&state)[3], int64_t user, int64_t agent, int value_tile, int column) {
                   const int64_t first = int64_t{value_tile} * kValues + column;
                   for (int n = 0; n < 2; ++n) b.put_prototype(user, agent, first + n, state[1 + n], state[0]);
                 });
}

// ---- host

/// The two kernels, where they are wanted: with the same tiles of agents, for they share what is packed.
struct Launches {
  BackTask rows, prototypes;
  ListTask lists;
  bool of_rows = false, of_prototypes = false;
};

/// Offsets in shared memory and its size for `warps` warps.
void lay_out(BackTask& b, bool prototypes, int warps) {
  SharedLayout shared;
  Geometry& g = b.x.g;
  const int64_t n = rows_of_step(g.parts, prototypes);
  const bool several = b.x.softmax_over_agents && b.x.agents > warps * 16 * g.mt;
  for (Task* t : {&b.x, &b.v}) {
    Geometry& s = t->g;
    s.rows = static_cast<int>(n);
    s.buffers = s.chunks > 1 || (t == &b.x && (several || prototypes)) ? 2 : 1;
    lay_out_stream(*t, warps, shared);
  }
  g.offset.agents = shared.take(5 * g.tile_agents * 4);
  g.offset.work = shared.take(kWorkBytes);
  b.v.g.offset.work = g.offset.work;
  b.offset.row_bias = shared.take(!b.x.softmax_over_agents ? 0 : several ? kTile * 4 : n * 4);
  b.offset.sums = shared.take(2 * warps * n * 4);
  b.offset.users = shared.take(warps * 4 + 8);
  const int64_t operand = g.parts * g.tile_agents * (n + 8) * 2;
  b.offset.weights = shared.take(!prototypes && b.out.v ? operand : 0);
  b.offset.slopes = shared.take(!prototypes && b.out.x ? operand : 0);
  g.shared_bytes = static_cast<size_t>(shared.bytes());
}

size_t lay_out(Launches& l, int warps) {
  lay_out(l.rows, false, warps);
  lay_out(l.prototypes, true, warps);
  return std::max(l.of_rows ? l.rows.x.g.shared_bytes : 0, l.of_prototypes ? l.prototypes.x.g.shared_bytes : 0);
}

/// all_rows: of all histories.
Status plan_geometry(Launches& l, int64_t all_rows, const simt::Machine& machine) {
  const Task& x = l.rows.x;
  const int most_threads = x.g.mt == 1 ? kMostThreads1 : kMostThreads2, limit = most_threads / 32;
  const int all = x.g.warps_of(x.agents);
  int most = 0;
  // In agents mode every further tile of agents costs sweeps of its own, so narrower chunks are worth a single tile.
  bool found = false;
  for (const int enough : {x.softmax_over_agents && all <= limit ? std::max(all, 3) : 4, 4})
    for (int chunk = 128; !found && chunk >= 16; chunk /= 2) {
      for (Geometry* g : {&l.rows.x.g, &l.rows.v.g, &l.prototypes.x.g, &l.prototypes.v.g}) {
        g->chunk = std::min(g->depth, chunk);
        g->chunks = std::max(1, (g->depth + chunk - 1) / chunk);  // one of no columns keeps x's buffers in turns
      }
      for (most = limit; most > 2; --most)
        if (lay_out(l, most) <= machine.shared) break;
      found = most >= enough;
    }
  lay_out(l, most);  // as few tiles as that, all of one size
  const size_t shared = lay_out(l, std::max(2, x.g.warps_of((x.agents + x.g.agent_tiles - 1) / x.g.agent_tiles)));
  if (shared > machine.shared)
    return Status::error(Code::not_implemented,
                         "route_backward: expected a device with %zu bytes of shared memory a block, got %zu", shared,
                         machine.shared);
  for (BackTask* b : {&l.rows, &l.prototypes}) {
    Geometry& g = b->x.g;
    g.blocks = resident_blocks(g, most_threads, machine);
    if (b == &l.prototypes) g.workers = std::max(1, (g.blocks + b->x.items() - 1) / b->x.items());
    Chunks& c = b->chunks;
    c.size = kTile;
    while (c.size > kLeastChunk && b->x.rows / c.size < kChunks / 2) c.size /= 2;
    c.count = static_cast<int>((b->x.rows + c.size - 1) / c.size);
    c.reserve_slots(b->of_x.gathers() || b->of_v.gathers(), all_rows, b->x.users);
  }
  return {};
}

void carve(BackTask& b, Arena& arena) {
  const int64_t users = b.x.users, padded = b.padded();
  // at least as many as fewer rows have, so that more of them never need less
  const int64_t least_chunks = std::min<int64_t>((b.x.rows + kLeastChunk - 1) / kLeastChunk, kChunks);
  const int64_t chunks = std::max<int64_t>(b.chunks.count, least_chunks);
  b.x.packed = arena.take<uint16_t>(users * padded * b.x.g.sides * b.x.g.parts * b.x.g.depth);
  b.v.packed = arena.take<uint16_t>(users * padded * b.v.g.parts * b.v.g.depth);
  arena.take_into(users * padded, b.x.half, b.x.rate, b.agent_lse, b.dz_constant, b.slope);
  b.chunks.carve(chunks, arena);
  const int64_t slots = int64_t{b.chunks.most} * b.chunks.size;
  b.of_x.carve(slots, arena, &b.out.x);
  b.of_v.carve(slots, arena, &b.out.v);
  b.next = arena.take<int32_t>(1);
  b.raw = b.out.temperature ? arena.take<float>(padded * chunks) : nullptr;
  b.total = arena.take<double>(b.out.temperature ? padded : 0);
}

Launches describe(const RouteCall& call, const RouteForward& forward, const RouteGradients& out) {
  Launches l;
  BackTask b;
  b.x = describe_route(call);
  b.v = b.x;
  b.v.x = b.x.v;
  if (!forward.d_tokens.data) b.v.x.width = 0;
  b.v.x_aligned = b.x.v_aligned;
  b.v.x_ids = b.x.v_ids;
  b.v.v_ids = {};
  b.v.scale = b.v.bias = b.v.spread = nullptr;
  b.v.codes = nullptr;
  b.v.levels = b.v.mask_words = 0;
  b.v.softmax_over_agents = false;
  b.v.g.depth = depth_of(b.v.x.width);
  b.x.g.sides = forward.d_mean_x ? 2 : 1;
  b.forward = forward;
  b.out = out;
  b.of_x = {call.in.x_ids, call.in.items(), out.x_rows, out.x, true};
  b.of_v = {call.in.v_ids, call.in.v.rows, out.v_rows, out.v, forward.d_tokens.data != nullptr};
  l.rows = l.prototypes = b;
  l.prototypes.x.g.value_tiles = value_tiles_of(b.x.x.width);  // the values beside the rows are columns of x
  l.of_rows = out.v || out.x || out.bias || out.spread || out.temperature;
  l.of_prototypes = static_cast<bool>(out.prototypes);
  return l;
}

/// All of a call.
Status prepare(const RouteCall& call, const RouteForward& forward, const RouteGradients& out,
               const simt::Machine& machine, Arena& arena, Launches* l) {
  *l = describe(call, forward, out);
  HISAC_TRY(plan_geometry(*l, call.in.rows, machine));
  carve(l->rows, arena);
  l->lists = describe_masks(call, machine, arena);
  l->rows.x.masks = l->lists.masks;
  BackTask p = l->rows;  // in the same places, with its own geometry
  p.x.g = l->prototypes.x.g;
  p.v.g = l->prototypes.v.g;
  p.offset = l->prototypes.offset;
  if (l->of_prototypes) carve_units(p.x, p.state_floats(), arena);
  l->prototypes = p;
  return {};
}

}  // namespace

size_t route_backward_workspace(const Context&, const Codebook* book, const RouteParams& params,
                                const Histories& histories, const RouteAgents& agents, const RouteForward& forward,
                                const RouteGradients& out) noexcept {
  simt::Machine machine;
  if (const auto e = simt::machine(&machine); e != decltype(e){}) return 0;
  Launches l;
  Arena arena;
  return prepare({book, params, histories, agents}, forward, out, machine, arena, &l).ok() ? arena.used() : 0;
}

Status route_backward(const Context& context, const Codebook* book, const RouteParams& params,
                      const Histories& histories, const RouteAgents& agents, const RouteForward& forward,
                      const RouteGradients& out) noexcept {
  const RouteCall call{book, params, histories, agents};
  HISAC_TRY(check_counts("route_backward", histories));
  HISAC_TRY(check_columns("route_backward", "D", call.width()));
  HISAC_TRY(check_columns("route_backward", "V", histories.v.width));
  Launcher launch("route_backward", context);
  HISAC_TRY(launch.status());
  const simt::Machine& machine = launch.machine;
  Launches l;
  Arena arena(context.workspace);
  HISAC_TRY(prepare(call, forward, out, machine, arena, &l));
  HISAC_TRY(arena.check("route_backward"));
  if (!l.of_rows && !l.of_prototypes) return {};
  HISAC_TRY(place_centers("route_backward", context, book, l.rows.x));
  HISAC_TRY(place_centers("route_backward", context, book, l.prototypes.x));
  if (l.lists.masking && !agents.lists) HISAC_TRY(place_centers("route_backward", context, *book, l.lists));
  const BackTask &b = l.rows, &p = l.prototypes;
  launch_pack_agents(b.x, launch);
  launch_lists(l.lists, launch);
  launch(pack_gradients, machine.processors * 8, kThreads, 0, b);
  if (l.of_rows) {
    launch_plan_chunks(b.x, b.chunks, launch);
    launch_tiles<false>(b, launch);
    launch_table_gradients(b.of_x, b.of_v, b.chunks, launch);
  }
  if (out.temperature) {
    launch(sum_temperature, machine.processors * 2, kThreads, kFront, b);
    launch(finish_temperature, 1, kThreads, kFront, b);
  }
  if (l.of_prototypes) {
    launch_plan_units(p.x, launch);
    launch_tiles<true>(p, launch);
    launch(merge_back_units, machine.processors * 4, kThreads, 0, p);
  }
  return launch.status();
}

}  // namespace hisac::cuda
