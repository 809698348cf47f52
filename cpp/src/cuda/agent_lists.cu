// SPDX-License-Identifier: Apache-2.0
// `agent_lists`, and the masks of sparse routing.
#include "cuda/agent_lists.h"

#include <algorithm>

#include "cuda/device/block.h"
#include "cuda/verbs.h"

namespace hisac::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kDistances = int64_t{1} << 26;  // in the workspace, about the most

/// Whether a user of so many rows, of so many codes of level 1, and so many present agents is routed sparsely. Nothing
/// overflows: rows and codes are below 2^31, agents at most 2^24.
SIMT_DEVICE bool is_sparse(int64_t rows, int64_t groups, int64_t present, int64_t k) {
  return present > k && rows * (present - k) > groups * (present + 48 * k);
}

/// By a warp: the bits of 32 agents that are present, from a word's first.
SIMT_DEVICE uint32_t present_agents(const ListTask& t, int64_t user, int word) {
  const int agent = word * 32 + simt::lane();
  const bool wanted = agent < t.agents && (!t.to.count.data || agent < t.to.count.data[user]);
  const float* const p = t.to.prototypes.data + (user * t.agents + agent) * t.width;
  float squares = 0;
  for (int d = 0; wanted && d < t.width; ++d) squares = simt::fused(p[d], p[d], squares);
  return simt::ballot(wanted && below_limit(squares, t.width, [&](int64_t d) { return p[d]; }));
}

/// A block has a user: which agents are present; which codes its rows have, for masks.
SIMT_KERNEL(kThreads) describe_users(SIMT_CONSTANT ListTask t) {
  for (int64_t user = simt::block(); user < t.users; user += simt::blocks()) {
    uint32_t* const seen = t.seen + user * t.node_words();
    const int64_t start = t.masking ? t.start(user) : 0, end = t.masking ? t.end(user) : 0;
    const int node_words = t.masking ? t.node_words() : 0;
    for (int i = simt::thread(); i < node_words; i += kThreads) seen[i] = 0;
    SIMT_UNLESS_PLANTED(66, simt::sync());
    for (int64_t row = start + simt::thread(); row < end; row += kThreads)
      if (const int64_t x_row = t.x_row(row); x_row >= 0)
        if (const int node = t.codes[x_row * t.levels]; node >= 0 && node < t.nodes)
          simt::atomic_or(seen + node / 32, 1u << node % 32);
    int64_t mine = 0, total = 0;  // codes; above 32 bits: present agents
    for (int word = simt::warp(); word < t.words(); word += kWarps) {
      const uint32_t bits = present_agents(t, user, word);
      if (simt::lane() > 0) continue;
      t.present[user * t.words() + word] = bits;
      mine += int64_t{simt::count_bits(bits)} << 32;
    }
    SIMT_UNLESS_PLANTED(67, simt::sync());
    for (int i = simt::thread(); i < node_words; i += kThreads) mine += simt::count_bits(seen[i]);
    scan_threads(mine, &total, Add{});
    const int64_t present = total >> 32;
    const bool listed = !t.masking || is_sparse(end - start, total & 0xffffffff, present, t.k);
    if (simt::thread() == 0) t.number[user] = listed ? static_cast<int32_t>(present) : 0;
  }
}

/// By a warp, of a user's code of level 1. A lane has an agent of every 32.
class CodeLists {
 public:
  SIMT_DEVICE CodeLists(const ListTask& task, int64_t user, int node, int64_t warp)
      : t(task), user_(user), node_(node), distance_(t.distance + warp * t.agents), found_(t.found + warp * t.agents) {}

  SIMT_DEVICE void run() {
    const int number = t.number[user_], n = t.masking && t.to.lists.data ? 0 : least(number, t.k);
    if (n > 0) measure(n);
    if (t.masking)
      mask(number == 0);
    else
      list(n);
  }

 private:
  static SIMT_DEVICE int bits_before(uint32_t bits) { return simt::count_bits(bits & ((1u << simt::lane()) - 1)); }
  SIMT_DEVICE bool here(int agent) const {
    return agent < t.agents && ListTask::bit(t.present + user_ * t.words(), agent);
  }
  SIMT_DEVICE int64_t index() const { return user_ * t.nodes + node_; }

  /// Distances, and which of them are those of the k nearest agents; of n present ones, 0 < k <= n.
  SIMT_DEVICE void measure(int k) {
    const float* const codeword = t.center(0, node_);
    SIMT_ROLLED for (int agent = simt::lane(); agent < t.agents; agent += 32) {
      const float* const p = t.to.prototypes.data + (user_ * t.agents + agent) * t.width;
      const int width = here(agent) ? t.width : 0;
      double sum = 0;  // the definition: in index order
      for (int d = 0; d < width; ++d) {
        const double step = simt::plain_sum(static_cast<double>(codeword[d]), -static_cast<double>(p[d]));
        sum = simt::plain_sum(sum, simt::plain_product(step, step));
      }
      distance_[agent] = here(agent) ? simt::bits_of(sum) : ~uint64_t{0};
    }
    limit_ = 0;  // the k-th smallest, bit by bit: the least number up to which there are k
    SIMT_ROLLED for (int b = 62; b >= 0; --b) {
      const uint64_t bit = uint64_t{1} << b;
      if (up_to(limit_ | (bit - 1)) < k) limit_ |= bit;
    }
    ties_ = k - (limit_ ? up_to(limit_ - 1) : 0);
  }
  SIMT_DEVICE int up_to(uint64_t limit) const {
    int n = 0;
    SIMT_ROLLED for (int agent = simt::lane(); agent < t.agents; agent += 32) n += distance_[agent] <= limit;
    for (int m = 16; m; m /= 2) n += simt::shuffle_xor(n, m);
    return n;
  }
  /// Whether the lane's agent is one of them; asked for all agents, 32 after 32.
  SIMT_DEVICE bool among_nearest(int agent) {
    const uint64_t d = agent < t.agents ? distance_[agent] : ~uint64_t{0};
    const uint32_t alike = simt::ballot(d == limit_);
    const bool among = d < limit_ || (d == limit_ && bits_before(alike) < ties_);
    SIMT_UNLESS_PLANTED(68, ties_ -= simt::count_bits(alike));
    return among;
  }

  /// Bits of the agents to which behaviours of the code are routed.
  SIMT_DEVICE void mask(bool all) {
    uint32_t* const mask = t.masks + index() * t.words();
    const int32_t* const own = t.to.codes.data + user_ * t.agents * t.levels;
    SIMT_ROLLED for (int word = 0; word < t.words(); ++word) {
      const int agent = word * 32 + simt::lane();
      const bool near = all || (!t.to.lists.data && among_nearest(agent));
      const uint32_t bits = simt::ballot(near || (here(agent) && own[int64_t{agent} * t.levels] == node_));
      if (simt::lane() == 0) mask[word] = bits;
    }
    if (all || !t.to.lists.data) return;
    SIMT_UNLESS_PLANTED(69, simt::sync_warp());
    const int64_t length = t.to.lists.shape[2];
    const int32_t* const list = t.to.lists.data + index() * length;
    SIMT_ROLLED for (int q = simt::lane(); q < least(t.k, length); q += 32) {
      const int agent = list[q];
      if (agent >= 0 && here(agent)) simt::atomic_or(mask + agent / 32, 1u << agent % 32);
    }
  }

  /// The list of the codeword: n agents, each at the place of its rank.
  SIMT_DEVICE void list(int n) {
    int32_t* const list = t.out + index() * t.k;
    SIMT_ROLLED for (int q = n + simt::lane(); q < t.k; q += 32) list[q] = -1;
    int before = 0;
    SIMT_ROLLED for (int word = 0; n > 0 && word < t.words(); ++word) {
      const int agent = word * 32 + simt::lane();
      const bool near = among_nearest(agent);
      const uint32_t bits = simt::ballot(near);
      if (near) found_[before + bits_before(bits)] = agent;
      before += simt::count_bits(bits);
    }
    SIMT_UNLESS_PLANTED(70, simt::sync_warp());
    SIMT_ROLLED for (int q = simt::lane(); q < n; q += 32) {
      const uint64_t d = distance_[found_[q]];
      int rank = 0;
      SIMT_ROLLED for (int r = 0; r < n; ++r) {
        const uint64_t other = distance_[found_[r]];
        rank += other < d || (other == d && r < q);
      }
      list[rank] = found_[q];
    }
    SIMT_UNLESS_PLANTED(71, simt::sync_warp());  // others still read what the next code writes
  }

  const ListTask& t;
  const int64_t user_;
  const int node_;
  uint64_t* const distance_;
  int32_t* const found_;
  uint64_t limit_ = 0;
  int ties_ = 0;  // at the limit, that are still to be taken
};

/// A warp has a user's code.
SIMT_KERNEL(kThreads) list_agents(SIMT_CONSTANT ListTask t) {
  const int64_t warp = int64_t{simt::block()} * kWarps + simt::warp(), warps = int64_t{simt::blocks()} * kWarps;
  SIMT_ROLLED for (int64_t i = warp; i < t.users * t.nodes; i += warps) {
    const int64_t user = i / t.nodes;
    const int node = static_cast<int>(i % t.nodes);
    if (!t.masking || ListTask::bit(t.seen + user * t.node_words(), node)) CodeLists(t, user, node, warp).run();
  }
}

ListTask describe(const Codebook& book, const Histories& in, const RouteAgents& agents) {
  ListTask t;
  const auto& [users, m, width] = agents.prototypes.shape;
  static_cast<Behaviours&>(t) = behaviours_of(&book, in, width);
  t.users = users;
  t.to = agents;
  t.nodes = least(book.size(0), 0x7fffffff);  // codes are int32
  t.agents = static_cast<int>(m);
  t.width = static_cast<int>(width);
  return t;
}

}  // namespace

void ListTask::carve(const simt::Machine& machine, Arena& arena) noexcept {
  const int64_t most = std::max<int64_t>(1, kDistances / kWarps / std::max(1, agents));
  blocks = least(most, machine.processors * 4);
  present = arena.take<uint32_t>(users, words());
  number = arena.take<int32_t>(users);
  if (masking) {
    seen = arena.take<uint32_t>(users, node_words());
    masks = arena.take<uint32_t>(users * words(), nodes);
  }
  const int64_t warps = int64_t{blocks} * kWarps;
  if (!to.lists || !masking) distance = arena.take<uint64_t>(warps, agents);
  if (!masking) found = arena.take<int32_t>(warps, agents);
}

ListTask describe_masks(const RouteCall& call, const simt::Machine& machine, Arena& arena) noexcept {
  ListTask t;
  if (!masks_agents(call)) return t;
  t = describe(*call.book, call.in, call.agents);
  t.k = static_cast<int>(call.params.sparse);
  t.masking = true;
  t.carve(machine, arena);
  return t;
}

void launch_lists(const ListTask& t, Launcher& launch) {
  launch(describe_users, least(t.users, launch.machine.processors * 8), kThreads, kFront, t);
  launch(list_agents, least((t.users * t.nodes + kWarps - 1) / kWarps, t.blocks), kThreads, 0, t);
}

size_t agent_lists_workspace(const Context&, const Codebook& book, const RouteAgents& agents) noexcept {
  simt::Machine machine;
  if (const auto e = simt::machine(&machine); e != decltype(e){}) return 0;
  ListTask t = describe(book, {}, agents);
  Arena arena;
  t.carve(machine, arena);
  return arena.used();
}

Status agent_lists(const Context& context, const Codebook& book, const RouteAgents& agents,
                   Array<int32_t, 3> out) noexcept {
  Launcher launch("agent_lists", context);
  HISAC_TRY(launch.status());
  ListTask t = describe(book, {}, agents);
  HISAC_TRY(place_centers("agent_lists", context, book, t));
  t.out = out.data;
  t.k = static_cast<int>(out.shape[2]);
  Arena arena(context.workspace);
  t.carve(launch.machine, arena);
  HISAC_TRY(arena.check("agent_lists"));
  launch_lists(t, launch);
  return launch.status();
}

}  // namespace hisac::cuda
