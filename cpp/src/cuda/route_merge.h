// SPDX-License-Identifier: Apache-2.0
// Users with several units: their states, which lie in slots, are merged.
#pragma once
#include "cuda/route_task.h"

namespace hisac::cuda {

/// A thread has two neighbours of a state: the tree of base/reduction_tree.h over a user's slots, as a binary counter
/// makes it. A state has kNumbers for each agent, then the sums: merge(state, later) of those numbers and two sums;
/// finish(state, user, agent, value tile, column of it).
template <int kNumbers, class Merge, class Finish>
SIMT_DEVICE void merge_slots(const Task& t, int64_t state_floats, Merge merge, Finish finish) {
  const int threads = t.g.threads(), items = t.items();
  const int64_t elements = int64_t{t.g.mt} * (kValues / 4) * threads;
  const int64_t pieces = (elements + simt::threads() - 1) / simt::threads();
  for (int64_t i = simt::block(); i < t.plan->shared * items * pieces; i += simt::blocks()) {
    const SharedUser s = t.shared[i / pieces / items];
    const int item = static_cast<int>(i / pieces % items);
    const int64_t e = i % pieces * simt::threads() + simt::thread();
    if (e >= elements) continue;
    const int thread = static_cast<int>(e % threads), lane = thread & 31;
    const int pair = static_cast<int>(e / threads);  // [mt][kValues / 8][2]
    const int h = pair / (kValues / 4), c = pair % (kValues / 4) / 2, r = pair % 2;
    float states[kMostStates][kNumbers + 2] = {};
    int level = 0;
    const auto fold = [&] {
      --level;
      merge(states[level - 1], states[level]);
    };
    for (int k = 0; k < s.count; ++k) {
      const float* const from = t.slots + ((int64_t{s.slot} + k) * items + item) * state_floats + thread;
      const int numbers = (h * 2 + r) * kNumbers, sums = t.g.mt * 2 * kNumbers + (h * (kValues / 8) + c) * 4 + 2 * r;
      SIMT_EACH (n, kNumbers) states[level][n] = from[(numbers + n) * threads];
      SIMT_EACH (n, 2) states[level][kNumbers + n] = from[(sums + n) * threads];
      ++level;
      for (int n = k + 1; n % 2 == 0; n /= 2) fold();
    }
    while (level > 1) fold();
    const int agent =
        item % t.g.agent_tiles * t.g.tile_agents + (thread >> 5) * 16 * t.g.mt + h * 16 + (lane >> 2) + r * 8;
    finish(states[0], s.user, agent, item / t.g.agent_tiles, c * 8 + (lane & 3) * 2);
  }
}

}  // namespace hisac::cuda
