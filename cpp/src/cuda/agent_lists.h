// SPDX-License-Identifier: Apache-2.0
// Sparse routing on CUDA (RouteParams::sparse) is a mask: rows stay where they are and meet all agents, and a logit of
// a row and an agent to which it is not routed becomes -inf. The mask has a bit for every user, code of level 1 that
// some row of the user has, and agent. Two launches make it: one for users, one for their codes. `agent_lists` is the
// same two without rows.
#pragma once
#include "base/arena.h"
#include "cuda/device/launcher.h"
#include "cuda/histories.h"

namespace hisac::cuda {

struct ListTask : Behaviours {  // of which spans, ids, codes and centers are read
  RouteAgents to;
  int nodes = 0, agents = 0, width = 0;  // C_1, M, D
  int k = 0;                             // at most M
  int32_t* out = nullptr;                // [B, C_1, k], of agent_lists
  bool masking = false;                  // of route: not lists are wanted, but masks
  int blocks = 0;                        // of the second launch
  // workspace
  uint32_t* present = nullptr;   // [B, words] bits of agents
  int32_t* number = nullptr;     // [B] how many are present; of route: 0 where the user is not routed sparsely
  uint32_t* seen = nullptr;      // [B, node_words] bits of codes that rows have
  uint32_t* masks = nullptr;     // [B, C_1, words] bits of agents; only those of codes that rows have are written
  uint64_t* distance = nullptr;  // [warps, M] the bits of float64 distances, which are in their order; absent: all set
  int32_t* found = nullptr;      // [warps, M]

  SIMT_BOTH int words() const { return (agents + 31) / 32; }
  SIMT_BOTH int node_words() const { return (nodes - 1) / 32 + 1; }
  SIMT_DEVICE static bool bit(const uint32_t* bits, int i) { return bits[i / 32] >> (i % 32) & 1; }
  void carve(const simt::Machine& machine, Arena& arena) noexcept;
};

/// Whether a call may have users who are routed sparsely.
inline bool masks_agents(const RouteCall& call) {
  return call.params.sparse > 0 && call.params.sparse < call.agents.prototypes.shape[1];
}
/// Of a call that may; of any other nothing is taken, placed and launched.
ListTask describe_masks(const RouteCall& call, const simt::Machine& machine, Arena& arena) noexcept;
void launch_lists(const ListTask& t, Launcher& launch);

}  // namespace hisac::cuda
