// SPDX-License-Identifier: Apache-2.0
// Soft-routing attention: each interest-agent aggregates the user's whole history by semantic similarity.
#pragma once
#include "codebook.h"
#include "context.h"
#include "histories.h"
#include "vote.h"

namespace hisac {

enum class Normalize : int32_t { history, agents };
/// float32: the products of `route` are of float32, or on AMX and CUDA three of bfloat16 each. bfloat16: x, prototypes,
/// weights and v may be rounded to bfloat16 for the products, where the processor multiplies that faster. Sums are
/// float32 always. Tokens of different instruction sets differ within the bounds that cpp/README.md states.
enum class Precision : int32_t { float32, bfloat16 };

/// d_ai = |x_i - p_a|^2 + spread_i
///   history: u_ai = exp(bias_i - d_ai / tau)
///   agents:  u_ai = exp(bias_i) softmax over present agents a of (-d_ai / tau)
///   token_a = sum_i u_ai v_i / sum_i u_ai,   lse_a = log sum_i u_ai;   an empty sum: a zero token, lse -inf
/// An agent is absent past count[b], or where its tau is not positive, or |p|^2 is not below 2^100. A behaviour is
/// absent where its codes are out of range, |x|^2 is not below 2^100, its bias is NaN or infinite, its spread is not in
/// [0, FLT_MAX], or an id of its x or v is outside the table. A NaN or an infinity in v does not make it absent: that
/// column of the tokens to which it is routed is then NaN or infinite.
///
/// Sparse routing, k = sparse > 0: behaviour i is routed to few agents alone, by c, its code of level 1. These are the
/// agents whose own code of level 1 is c, and the k present agents nearest to the codeword of c (agent_lists). For any
/// other agent u_ai is 0, and the softmax over agents is over these. So in history mode lse is a lower bound of that
/// with sparse = 0, and in agents mode sum_a exp(lse_a) is still the mass of the behaviours. An agent to which no
/// behaviour is routed has an empty sum. It needs a book, and codes of the histories and of the agents.
///
/// A user is routed sparsely only where that saves work, where m > k and n (m - k) > g (m + 48 k): n are the rows of
/// the user, absent ones too; g the different codes of level 1 among them that are in range; m the agents below count
/// with |p|^2 below 2^100, whatever their temperature. Any other user is routed as with sparse = 0. Cost of the lists:
/// g m D a user, which is more than the routing where most behaviours have a code of their own, as in a codebook of one
/// level.
struct RouteParams {
  Normalize normalize = Normalize::agents;  // history: the paper's reading
  Array<const float, 1> temperature{};      // [1] or [M]; null: the codebook's default, an error where it has none
  Precision precision = Precision::float32;
  int64_t sparse = 0;  // k; 0: behaviours are routed to all agents
};

/// The agents of B users; those of `vote` are such, where their prototypes were wanted. Give the count with bare
/// prototypes of `vote`'s agents too: without it absent ones, whose prototypes are zero, take part.
struct RouteAgents {
  Array<const float, 3> prototypes{};  // [B, M, D]
  Array<const int32_t, 1> count{};     // [B], null: M each
  Array<const int32_t, 3> codes{};     // [B, M, L], of sparse routing, which reads those of level 1
  Array<const int32_t, 3> lists{};     // [B, C_1, K], K >= min(k, M), of sparse routing, which reads the first k of
                                       // each and passes over what is no present agent; null: they are made
};
inline Agents::operator RouteAgents() const noexcept { return {prototypes, count, codes, lists}; }

struct Tokens {
  MutableRows tokens{};      // [B * M, V], v's type; data null: not wanted
  Array<float, 2> lse{};     // [B, M]
  Array<float, 3> mean_x{};  // [B, M, D]: x averaged as v is, zero for an empty sum; null: not wanted
};

/// Fused: no T x M matrix. Sums run over tiles of 2,048 rows of a user, merged in a fixed tree: the same bits for any
/// number of workers and any batch around the user.
///
/// Reads every field of the histories but weights; codes only where there is a book. Without a book, a behaviour with
/// an invalid code is present. Codes and book are needed where x is not given. v may be missing where tokens.data is
/// null: then there are lse and mean_x.
Status route(const Context& context, const Codebook* book, const RouteParams& params, const Histories& histories,
             const RouteAgents& agents, Tokens out) noexcept;
size_t route_workspace(const Context& context, const Codebook* book, const RouteParams& params,
                       const Histories& histories, const RouteAgents& agents, const Tokens& out) noexcept;

/// For each codeword of level 1 the K = shape[2] of `out` present agents that are nearest to it: by the square distance
/// of the codeword and the prototype, both float32, summed in float64 in the order of dimensions; nearest first, of
/// equals the earlier agent; -1 in what is left where fewer are present. Here an agent is present below count[b] with
/// |p|^2 below 2^100. Lists depend on agents alone: make them once, and keep them with the agents. Reads prototypes and
/// count. Cost: C_1 M D a user.
Status agent_lists(const Context& context, const Codebook& book, const RouteAgents& agents,
                   Array<int32_t, 3> out) noexcept;
size_t agent_lists_workspace(const Context& context, const Codebook& book, const RouteAgents& agents) noexcept;

/// What `route` returned, and the gradients of it. d_tokens has the type of tokens.
struct RouteForward {
  Rows tokens{};                     // [B * M, V]
  Array<const float, 2> lse{};       // [B, M]
  Array<const float, 3> mean_x{};    // [B, M, D]; needed with d_mean_x
  Rows d_tokens{};                   // [B * M, V]; data null: 0
  Array<const float, 2> d_lse{};     // [B, M]; null: 0
  Array<const float, 3> d_mean_x{};  // [B, M, D]; null: 0
};

/// Null arrays are not computed. With x_ids or v_ids, the gradients of x and v are of their tables: a row is the sum
/// over the behaviours of all histories that have it, each in float32, in their order and in float64, rounded once.
/// x_rows and v_rows, where they are given, list the rows of such a table whose gradients are wanted, in any order; one
/// outside the table has zeros. With x of int8, the gradient of x is that of scale * int8. d_mean_x has gradients for
/// bias, spread, prototypes and temperature, and none for x.
struct RouteGradients {
  Array<float, 2> x;            // [T, D]; with x_ids [items, D], or [size of x_rows, D]
  Array<float, 2> v;            // [T, V]; with v_ids [rows, V], or [size of v_rows, V]
  Array<float, 1> bias;         // [T]
  Array<float, 1> spread;       // [T]
  Array<float, 3> prototypes;   // [B, M, D]
  Array<float, 1> temperature;  // [1] or [M], as the temperature
  Ids x_rows{}, v_rows{};       // rows of tables; null: all
};

///   w_ai = exp(z_ai - lse_a),   dz_ai = w_ai (dtoken_a . (v_i - token_a) + dmean_x_a . (x_i - mean_x_a) + dlse_a)
/// and dspread_i = -sum_a dz_ai / tau_a, recomputed tile by tile; deterministic.
Status route_backward(const Context& context, const Codebook* book, const RouteParams& params,
                      const Histories& histories, const RouteAgents& agents, const RouteForward& forward,
                      const RouteGradients& out) noexcept;
size_t route_backward_workspace(const Context& context, const Codebook* book, const RouteParams& params,
                                const Histories& histories, const RouteAgents& agents, const RouteForward& forward,
                                const RouteGradients& out) noexcept;

/// out [T]: 0 for a behaviour that is missing, -inf for any other. One of some history is missing where `route` takes
/// it for absent, though it has a row of v without a NaN or an infinity. As the x [T, 1] of another `route`, to one
/// prototype of 0, this gives one more token: the mean v and the log count of a user's missing behaviours. Reads what
/// `route` reads.
Status missing(const Context& context, const Codebook* book, const Histories& histories, Array<float, 1> out) noexcept;
size_t missing_workspace(const Context& context, const Codebook* book, const Histories& histories) noexcept;

}  // namespace hisac
