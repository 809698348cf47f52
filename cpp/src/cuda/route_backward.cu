// SPDX-License-Identifier: Apache-2.0
// `route_backward`: agents and gradients of tokens packed, the rows' kernel over chunks of behaviours, the
// temperature's sums added up; then the prototypes' kernel over units of histories, and users with several units
// merged.
#include <algorithm>

#include "cuda/device/block.h"
#include "cuda/leaf_back.h"
#include "cuda/route_back_step.h"
#include "cuda/verbs.h"

namespace hisac::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kLeastChunk = 256;  // behaviours
constexpr int kChunks = 2048;     // that chunks below kTile come to, at most

/// A warp has an agent: its gradient in bfloat16 parts and what its weights need; absent and padding agents are zero.
SIMT_KERNEL(kThreads) pack_tokens(SIMT_CONSTANT BackTask b) {
  const int lane = simt::lane();
  const Task &x = b.x, &v = b.v;
  const RouteForward& f = b.forward;
  const int64_t all = int64_t{simt::blocks()} * kThreads, padded = b.padded(), width = v.x.width;
  const int64_t thread = int64_t{simt::block()} * kThreads + simt::thread();
  for (int64_t c = thread; c < b.chunks.count; c += all) b.chunks.first[c] = b.chunks.last[c] = 0;
  for (int64_t c = thread; c < b.windows.count; c += all) b.windows.first[c] = b.windows.last[c] = 0;
  if (thread == 0) *b.next = 0;
  for (int64_t user = thread; b.absent && user < x.users; user += all) {
    const double e = static_cast<double>(b.forward.lse.data[user * b.token_rows() + x.agents]) * 1.4426950408889634;
    const bool in_range = e > -126 && e < 59.794705707972522;  // a count below 1e18
    const int whole = in_range ? static_cast<int>(e) : 0;
    b.absent[user] =
        in_range ? simt::exp2(static_cast<float>(whole - e)) * simt::exp2(static_cast<float>(-whole)) : 0.f;
  }
  for (int64_t i = thread / 32; i < x.users * padded; i += all / 32) {
    const int64_t user = i / padded, agent = i % padded, row = user * b.token_rows() + agent;
    const bool here = x.half[i] != -kInfinity;  // only those below M
    double dot = 0;
    for (int64_t c = lane; here && c < width; c += 32)
      dot += static_cast<double>(element(f.d_tokens.data, f.d_tokens.dtype, row * width + c)) *
             static_cast<double>(element(f.tokens.data, f.tokens.dtype, row * width + c));
    for (int m = 16; m; m /= 2) dot += simt::shuffle_xor(dot, m);
    if (lane == 0) {
      const float lse = here ? f.lse.data[row] : kInfinity;
      const bool has_mass = finite(lse);
      b.agent_lse[i] = has_mass ? base2(lse) : kInfinity;
      b.dz_constant[i] =
          has_mass ? static_cast<float>((f.d_lse.data ? static_cast<double>(f.d_lse.data[row]) : 0.0) - dot) : 0.f;
      b.slope[i] = has_mass ? smaller(2 / x.temperature[x.per_agent ? agent : 0], kLargest) : 0.f;
    }
    v.pack_row(user, agent, [&](int64_t c) {
      return here && c < width ? element(f.d_tokens.data, f.d_tokens.dtype, row * width + c) : 0.f;
    });
  }
}

/// A warp has a user: the chunks that its history reaches into.
SIMT_KERNEL(kThreads) plan_chunks(SIMT_CONSTANT ClampedSpans s, SIMT_CONSTANT Chunks chunks) {
  for (int64_t user = int64_t{simt::block()} * kWarps + simt::warp(); user < s.users;
       user += int64_t{simt::blocks()} * kWarps) {
    const int64_t start = s.start(user), end = s.end(user);
    for (int64_t c = start / chunks.size + simt::lane(); start < end && c * chunks.size < end; c += 32) {
      simt::atomic_max(chunks.first + c, static_cast<int32_t>(s.users - user));
      simt::atomic_max(chunks.last + c, static_cast<int32_t>(user + 1));
    }
  }
}

SIMT_KERNEL(kThreads, 4) give_back(SIMT_CONSTANT LeafBack b) { b.run(); }

constexpr int kMostThreads1 = 416, kMostThreads2 = 256;  // of one and of two agent tiles a warp: 208 and 256 agents

template <int MT, int Q, int S, bool kOverAgents>
SIMT_KERNEL(MT == 1 ? kMostThreads1 : kMostThreads2)
back_to_rows(SIMT_CONSTANT BackTask b) {
  RouteBack<MT, Q, S, kOverAgents, false>(b).run();
}
template <int MT, int Q, int S, bool kOverAgents>
SIMT_KERNEL(MT == 1 ? kMostThreads1 : kMostThreads2, 1)
back_to_prototypes(SIMT_CONSTANT BackTask b) {
  RouteBack<MT, Q, S, kOverAgents, true>(b).run();
}

template <bool kOverAgents>
auto rows_kernel(const Geometry& g) {
  return g.parts == 1    ? back_to_rows<2, 1, 1, kOverAgents>
         : g.stored == 1 ? back_to_rows<1, 2, 1, kOverAgents>
                         : back_to_rows<1, 2, 2, kOverAgents>;
}
template <bool kOverAgents>
auto prototypes_kernel(const Geometry& g) {
  return g.parts == 1    ? back_to_prototypes<2, 1, 1, kOverAgents>
         : g.stored == 1 ? back_to_prototypes<1, 2, 1, kOverAgents>
                         : back_to_prototypes<1, 2, 2, kOverAgents>;
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

/// A thread has two neighbours of a state: the tree of base/reduction_tree.h over a user's slots, as a binary counter
/// makes it.
SIMT_KERNEL(kThreads) merge_back_units(SIMT_CONSTANT BackTask b) {
  const Task& t = b.x;
  const int threads = t.g.threads();
  const int64_t elements = int64_t{t.g.mt} * (kValues / 4) * threads, pieces = (elements + kThreads - 1) / kThreads;
  const int64_t items = t.items();
  for (int64_t i = simt::block(); i < t.plan->shared * items * pieces; i += simt::blocks()) {
    const SharedUser s = t.shared[i / pieces / items];
    const int item = static_cast<int>(i / pieces % items), agent_tile = item % t.g.agent_tiles,
              values = item / t.g.agent_tiles;
    const int64_t e = i % pieces * kThreads + simt::thread();
    if (e >= elements) continue;
    const int thread = static_cast<int>(e % threads), lane = thread & 31;
    const int pair = static_cast<int>(e / threads);  // [mt][kValues / 8][2]
    const int h = pair / (kValues / 4), c = pair % (kValues / 4) / 2, r = pair % 2;
    float total[kMostStates] = {}, left[kMostStates] = {}, right[kMostStates] = {};
    int level = 0;
    const auto merge = [&] {
      --level;
      total[level - 1] += total[level];
      left[level - 1] += left[level];
      right[level - 1] += right[level];
    };
    for (int k = 0; k < s.count; ++k) {
      const float* const from = t.slots + ((int64_t{s.slot} + k) * items + item) * b.state_floats() + thread;
      const int first = t.g.mt * 2 + (h * (kValues / 8) + c) * 4 + 2 * r;
      total[level] = from[int64_t{h * 2 + r} * threads];
      left[level] = from[int64_t{first} * threads];
      right[level++] = from[int64_t{first + 1} * threads];
      for (int n = k + 1; n % 2 == 0; n /= 2) merge();
    }
    while (level > 1) merge();
    const int64_t agent =
        int64_t{agent_tile} * t.g.tile_agents + (thread >> 5) * 16 * t.g.mt + h * 16 + (lane >> 2) + r * 8;
    const int64_t column = int64_t{values} * kValues + c * 8 + (lane & 3) * 2;
    b.put_prototype(s.user, agent, column, left[0], total[0]);
    b.put_prototype(s.user, agent, column + 1, right[0], total[0]);
  }
}

// ---- host

/// The two kernels, where they are wanted: with the same tiles of agents, for they share what is packed.
struct Launches {
  BackTask rows, prototypes;
  bool of_rows = false, of_prototypes = false;
  LeafTask leaves;  // whose sums are the rows, of the leaf method
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
    lay_out_stream(*t, warps, t->refining, shared);
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

Status plan_geometry(Launches& l, const simt::Machine& machine) {
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
        g->chunks = (g->depth + g->chunk - 1) / g->chunk;
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
    g.value_tiles = static_cast<int>((b->x.x.width + kValues - 1) / kValues);
    g.workers = std::max(1, (g.blocks + b->x.items() - 1) / b->x.items());
    Chunks& c = b->chunks;
    c.size = kTile;
    while (c.size > kLeastChunk && b->x.rows / c.size < kChunks / 2) c.size /= 2;
    c.count = static_cast<int>((b->x.rows + c.size - 1) / c.size);
  }
  return {};
}

void carve(Launches& l, Arena& arena) {
  BackTask& b = l.rows;
  const int64_t users = b.x.users, padded = b.padded();
  // at least as many as fewer rows have, so that more of them never need less
  const int64_t least_chunks = std::min<int64_t>((b.x.rows + kLeastChunk - 1) / kLeastChunk, kChunks);
  const int64_t chunks = std::max<int64_t>(b.chunks.count, least_chunks);
  b.x.packed = arena.take<uint16_t>(users * padded * b.x.g.parts * b.x.g.depth);
  b.v.packed = arena.take<uint16_t>(users * padded * b.v.g.parts * b.v.g.depth);
  for (float** p : {&b.x.half, &b.x.rate, &b.agent_lse, &b.dz_constant, &b.slope})
    *p = arena.take<float>(users * padded);
  for (int32_t** p : {&b.chunks.first, &b.chunks.last}) *p = arena.take<int32_t>(chunks);
  for (int32_t** p : {&b.windows.first, &b.windows.last}) *p = arena.take<int32_t>(b.windows.count);
  b.next = arena.take<int32_t>(1);
  b.absent = b.x.missing ? arena.take<float>(users) : nullptr;
  b.raw = b.out.temperature ? arena.take<float>(padded * chunks) : nullptr;
  b.total = arena.take<double>(b.out.temperature ? padded : 0);
  BackTask& p = l.prototypes;
  p.x.packed = b.x.packed;
  p.v.packed = b.v.packed;
  p.x.half = b.x.half;
  p.x.rate = b.x.rate;
  p.agent_lse = b.agent_lse;
  p.dz_constant = b.dz_constant;
  p.slope = b.slope;
  if (l.of_prototypes) carve_units(p.x, p.state_floats(), arena);
}

Launches describe(const RouteCall& call, const RouteGradients& out) {
  Launches l;
  BackTask b;
  b.x = describe_route(call);
  b.v = b.x;
  b.v.x = b.x.v;
  b.v.x_aligned = b.x.v_aligned;
  b.v.x_ids = b.x.v_ids;
  b.v.v_ids = {};
  b.v.scale = b.v.bias = b.v.spread = nullptr;
  b.v.codes = nullptr;
  b.v.levels = 0;
  b.v.missing = b.v.softmax_over_agents = false;
  b.v.g.depth = depth_of(b.v.x.width);
  b.out = out;
  l.rows = l.prototypes = b;
  l.prototypes.x.missing = false;
  l.prototypes.x.refining = true;  // the values beside the rows are columns of x
  l.of_rows = out.v || out.x || out.bias || out.temperature;
  l.of_prototypes = static_cast<bool>(out.prototypes);
  return l;
}

/// All of a call: with leaves, of so many entries.
Status prepare(const RouteCall& call, const RouteGradients& out, int64_t entries, const simt::Machine& machine,
               Arena& arena, Launches* l) {
  LeafTask leaves;
  if (call.params.method == Method::exact) {
    *l = describe(call, out);
  } else {
    const Histories rows = carve_rows(call, entries, arena, &leaves);
    static float placeholder;  // where bytes are counted
    float* const d_leaf = arena.take<float>(out.v ? rows.v.rows * rows.v.width : 0);
    RouteGradients of_leaves;
    of_leaves.temperature = out.temperature;
    if (out.v) of_leaves.v = {d_leaf ? d_leaf : &placeholder, {rows.v.rows, rows.v.width}};
    *l = describe({nullptr, call.params, rows, call.agents}, of_leaves);
    l->leaves = leaves;
    l->rows.windows.size = 32;
    l->rows.windows.count = out.v ? static_cast<int>((leaves.rows + 31) / 32) : 0;
  }
  HISAC_TRY(plan_geometry(*l, machine));
  carve(*l, arena);
  return {};
}

/// Entries of leaves, as far as the host can tell; the sums' rows are counted in int.
int64_t most_leaves(const RouteParams& params, const Histories& in, int64_t longest) {
  return params.method == Method::exact ? 0 : std::min<int64_t>(most_entries(in, longest), 0x7fffffff);
}

}  // namespace

size_t route_backward_workspace(const Context&, const Codebook* book, const RouteParams& params,
                                const Histories& histories, const RouteAgents& agents, const RouteGradients& out,
                                int64_t longest) noexcept {
  simt::Machine machine;
  if (const auto e = simt::machine(&machine); e != decltype(e){}) return 0;
  Launches l;
  Arena arena;
  const int64_t entries = most_leaves(params, histories, longest);
  const RouteCall call{book, params, histories, agents};
  return prepare(call, out, entries, machine, arena, &l).ok() ? arena.used() : 0;
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
  const int64_t entries =
      entries_that_fit(context, histories, most_leaves(params, histories, histories.behaviours()),
                       [&](int64_t n, Arena& counter) { (void)prepare(call, out, n, machine, counter, &l); });
  Arena arena(context.workspace);
  HISAC_TRY(prepare(call, out, entries, machine, arena, &l));
  HISAC_TRY(arena.check("route_backward"));
  if (!l.of_rows && !l.of_prototypes) return {};
  HISAC_TRY(place_centers("route_backward", context, book, l.rows.x));
  HISAC_TRY(place_centers("route_backward", context, book, l.prototypes.x));
  HISAC_TRY(place_centers("route_backward", context, book, l.leaves));
  if (params.method == Method::leaf) sum_leaves(l.leaves, launch);
  BackTask& b = l.rows;
  b.forward = forward;
  const bool softmax_over_agents = b.x.softmax_over_agents;
  launch_pack_agents(b.x, launch);
  launch(pack_tokens, machine.processors * 8, kThreads, 0, b);
  if (l.of_rows) {
    const Geometry& g = b.x.g;
    const auto kernel = softmax_over_agents ? rows_kernel<true>(g) : rows_kernel<false>(g);
    launch(plan_chunks, machine.processors * 2, kThreads, 0, ClampedSpans(b.x), b.chunks);
    launch(kernel, g.blocks, g.threads(), g.shared_bytes, b);
  }
  if (out.temperature) {
    launch(sum_temperature, machine.processors * 2, kThreads, kFront, b);
    launch(finish_temperature, 1, kThreads, kFront, b);
  }
  if (l.of_prototypes) {
    const BackTask& p = l.prototypes;
    const Geometry& g = p.x.g;
    const auto kernel = softmax_over_agents ? prototypes_kernel<true>(g) : prototypes_kernel<false>(g);
    launch_plan_units(p.x, launch);
    launch(kernel, g.blocks, g.threads(), g.shared_bytes, p);
    launch(merge_back_units, machine.processors * 4, kThreads, 0, p);
  }
  if (b.windows.count > 0) {
    const LeafBack back{l.leaves, b, out.v.data};
    launch(plan_chunks, machine.processors * 2, kThreads, 0, ClampedSpans(l.leaves), b.windows);
    launch(give_back, machine.processors * 8, kThreads, 0, back);
  }
  return launch.status();
}

}  // namespace hisac::cuda
