// SPDX-License-Identifier: Apache-2.0
// The way from histories to tokens in one call.
#pragma once
#include "leaf_sums.h"
#include "route.h"
#include "vote.h"

namespace hisac {

/// leaf: `route` takes the leaf sums of the behaviours in their place: an approximation, by the mean of each leaf's
/// behaviours and their spread about it. It is faster where many behaviours share a leaf, and needs scratch for the
/// sums.
enum class Method : int32_t { exact, leaf };

struct CompressParams {
  VoteParams vote{};  // not read where agents are given
  RouteParams route{};
  Method method = Method::exact;
  const Agents* agents = nullptr;  // of an earlier vote, with its fingerprint; null: the histories vote
};

/// log_share is the log of the share of its user's history that a token stands for, the bias of `attend` in either
/// mode. Of the tokens that received mass, exp(lse) > 0,
///   agents:   share_a = exp(lse_a) / sum_a exp(lse_a)
///   history:  share_a = votes_a / sum_a votes_a, for the masses of a user's agents overlap there
/// and it is -inf for any other token. In history mode agents that are given have the votes that they have kept;
/// without these 1 each. Agents of 0 votes or fewer have no share then. Logarithms are of float64 on the CPU, rounded
/// once.
struct Compressed {
  Tokens tokens{};              // with Method::leaf of float32, whatever the type of v
  Array<float, 2> log_share{};  // [B, M]; null: not wanted
  Agents agents{};  // those that the histories voted for, and their lists (agent_lists); null arrays are not wanted
};

/// `encode`, where the histories have no codes; `vote`, or the agents that are given; `prototypes`; `leaf_sums` with
/// Method::leaf; `route`. Each verb means what its own header says. Reads every field of the histories. With x_ids,
/// codes are needed: encode the table once. No array of `out` need be given but tokens.lse. To use the agents again,
/// set their fingerprint to book.fingerprint(); those of another codebook are refused. What a verb would refuse is
/// refused before one writes.
///
/// On the CPU leaf sums are made of some users after others, so that their scratch does not grow with the batch.
///
/// What Python's `compress` composes beside this is composed here by the caller:
///   refine    A call without tokens, with mean_x, the agents' prototypes and, for sparse routing, their lists. Where
///             lse is not -inf, mean_x takes the place of the prototype. The next call is given these agents, so that
///             lists stay those of the first prototypes.
///   missing   The token of `missing` (route.h), a Tokens of its own, [B * 1, V] and [B, 1]. With Normalize::agents its
///             lse is beside `tokens.lse` what a bias of `attend` has to be: shares less a constant of the user.
Status compress(const Context& context, const Codebook& book, const CompressParams& params, const Histories& histories,
                const Compressed& out) noexcept;
/// Takes the same fields as the call. The verbs share the scratch: its size is that of what they hand on, and of the
/// most that one of them needs.
size_t compress_workspace(const Context& context, const Codebook& book, const CompressParams& params,
                          const Histories& histories, const Compressed& out) noexcept;

}  // namespace hisac
