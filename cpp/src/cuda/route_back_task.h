// SPDX-License-Identifier: Apache-2.0
// What the kernels of `route_backward` are told.
//
// Two streams of rows meet the same agents: x the prototypes and, where mean x has a gradient, that; and v, in the
// place of x, the gradients of tokens. Rows' gradients (v, x, bias, spread) are made by chunks of all behaviours: a
// block takes a chunk and, in their order, the users whose histories reach into it. The temperature's are sums of a
// chunk first. A user's prototypes get theirs by the units of route_task.h, whose states add up in the tree of
// base/reduction_tree.h.
#pragma once
#include "cuda/chunks.h"
#include "cuda/device/launcher.h"
#include "cuda/route_task.h"
#include "cuda/table_gradient.h"

namespace hisac::cuda {

/// As many as registers allow.
SIMT_BOTH constexpr int rows_of_step(int parts, bool prototypes) {
  return parts == 1 && !prototypes ? 64 : parts == 2 && prototypes ? 16 : 32;
}

struct BackTask {
  Task x, v;  // v: its x is v, of no columns where there is no d_tokens; its prototypes are d_tokens
  RouteForward forward;
  RouteGradients out;  // of a table x or v: the scratch
  TableGradient of_x, of_v;
  struct Offsets {  // in shared memory, beside those of the streams
    int weights, slopes, sums, row_bias, users;
  } offset = {};
  // workspace
  float *agent_lse = nullptr, *dz_constant = nullptr,
        *slope = nullptr;  // [B, padded M] lse in base 2, the part of dz that is the same for all rows, 2 / tau
  Chunks chunks;
  int32_t* next = nullptr;  // the next chunk to take
  float* raw = nullptr;     // [padded M, chunks] dlogit times logit
  double* total = nullptr;  // [padded M] d_temperature of each agent

  SIMT_BOTH int64_t padded() const { return int64_t{x.g.agent_tiles} * x.g.tile_agents; }
  /// Floats of a thread's state, of a unit.
  SIMT_BOTH int state() const { return x.g.mt * (2 + kValues / 2); }
  SIMT_BOTH int64_t state_floats() const { return int64_t{state()} * x.g.threads(); }

  /// The gradient of a prototype at a column: the sum over rows of q x, and of q.
  SIMT_DEVICE void put_prototype(int64_t user, int64_t agent, int64_t column, float sum, float weight) const {
    if (agent >= x.agents || column >= x.x.width) return;
    const int64_t i = (user * x.agents + agent) * x.x.width + column;
    out.prototypes.data[i] = x.half[user * padded() + agent] == -kInfinity ? 0.f : sum - x.prototypes[i] * weight;
  }
};

/// What route.cu does for route_backward too.
Task describe_route(const RouteCall& call);
/// What a stream of rows, its agents and the values that go with the rows take of shared memory.
void lay_out_stream(Task& t, int warps, SharedLayout& shared);
/// The blocks that the device holds at a time, at most eight a processor.
inline int resident_blocks(const Geometry& g, int most_threads, const simt::Machine& machine) {
  const size_t fit =
      std::min(static_cast<size_t>(most_threads / g.threads()), machine.shared / (g.shared_bytes + 1024));
  return machine.processors * static_cast<int>(std::clamp<size_t>(fit, 1, 8));
}
void carve_units(Task& t, int64_t state_floats, Arena& arena);
void launch_pack_agents(const Task& t, Launcher& launch);
void launch_plan_units(const Task& t, Launcher& launch);

}  // namespace hisac::cuda
