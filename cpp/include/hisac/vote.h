// SPDX-License-Identifier: Apache-2.0
// Hierarchical voting: a user's behaviours vote in the code tree, the kept leaves are the user's interest-agents.
#pragma once
#include "codebook.h"
#include "context.h"
#include "histories.h"

namespace hisac {

constexpr int64_t kMaxSeats = 4096;  // most agents a user

/// Exactly one rule. `budget` M: seats in proportion; at every node the j-th leaf of child c has the key n_c / j, where
/// n_c are the votes of c; larger key, larger n_c, lower code first (D'Hondt). `fanout` (the paper's): under every kept
/// node the k_l children with most votes. `beam`: of all children of the kept nodes the k_l with most votes, level by
/// level; where no node with votes is left out above the leaves, those are the k_L most voted leaves. By both, ties go
/// to the lower code, for nodes of different parents that of the whole prefix, and no node without votes is kept.
/// Scratch grows with the largest k_l of a beam: by 80 bytes a worker, on CUDA 48 a block.
struct VoteParams {
  int64_t budget = 0;               // 0: by another rule
  int64_t fanout[kMaxLevels] = {};  // k_l >= 1 for each level; their product at most kMaxSeats. Zeros: by another rule
  int64_t beam[kMaxLevels] = {};    // 1 <= k_l <= kMaxSeats for each level. Zeros: by another rule
};

struct RouteAgents;

/// Interest-agents, sorted by votes (down), then code (up); absent ones are -1 with 0 votes. An agent means nothing
/// under another codebook: keep the fingerprint of its own with it, and `vote` and `prototypes` refuse the wrong one.
struct Agents {
  Array<int32_t, 3> codes;       // [B, M, L]
  Array<int64_t, 2> votes;       // [B, M]
  Array<int32_t, 1> count;       // [B]
  uint64_t fingerprint = 0;      // the codebook's; 0: not kept, which `prototypes` of agents refuses
  Array<float, 3> prototypes{};  // [B, M, D], what `route` compares x with; zero for an absent agent; null: not wanted
  Array<int32_t, 3> lists{};     // [B, C_1, K], of `agent_lists` (hisac/route.h) and `compress`; not read by `vote`

  operator RouteAgents() const noexcept;  // as `route` takes them; hisac/route.h
};

/// M of these params: the budget, the product of the fan-outs, or k_L of the beam.
int64_t seats(const VoteParams& params, int levels) noexcept;

/// Reads codes, x_ids, offsets and weights of the histories. Rows with a code out of range, rows whose id is outside
/// the table of codes, and a user's rows past 2^24 - 1 do not vote. Of the n rows of a user that may, row i has
///   1 vote    without weights;
///   min(w_i, 2^40 - 1) >> s votes, s the least with sum_i min(w_i, 2^40 - 1) < 2^(40 + s)    with int64 weights;
///   rint(2^k q_i) votes, q_i = w_i / max w rounded to float32, k = min(24, 40 - bits of n)    with float32 weights.
/// A weight that is not above 0, or NaN, is no vote, and n does not count it; infinity is the largest float32. So all
/// float weights of a user may be scaled by one factor. Votes are integers, so the order of up to 2^24 - 1 rows does
/// not matter, nor does the number of threads. On the CPU each user is counted by one thread.
///
/// Where agents.prototypes are wanted, they are those of `prototypes`.
///
/// Set agents.fingerprint to book.fingerprint() before the call: `vote` does not write it. `vote` refuses the
/// fingerprint of another codebook, and takes a 0 for not set.
Status vote(const Context& context, const Codebook& book, const VoteParams& params, const Histories& histories,
            Agents agents) noexcept;
size_t vote_workspace(const Context& context, const Codebook& book, const VoteParams& params,
                      const Histories& histories) noexcept;

/// The prototypes [B, M, D] of agents of this codebook; zero for an absent one.
Status prototypes(const Context& context, const Codebook& book, const Agents& agents, Array<float, 3> out) noexcept;

}  // namespace hisac
