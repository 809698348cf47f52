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
/// column of the tokens of its user's present agents is then NaN or infinite.
struct RouteParams {
  Normalize normalize = Normalize::agents;  // history: the paper's reading
  Array<const float, 1> temperature{};      // [1] or [M]; null: the codebook's default, an error where it has none
  Precision precision = Precision::float32;
};

/// The agents of B users; those of `vote` are such, where their prototypes were wanted. Give the count with bare
/// prototypes of `vote`'s agents too: without it absent ones, whose prototypes are zero, take part.
struct RouteAgents {
  Array<const float, 3> prototypes{};  // [B, M, D]
  Array<const int32_t, 1> count{};     // [B], null: M each
};
inline Agents::operator RouteAgents() const noexcept {
  return {{prototypes.data, {prototypes.shape[0], prototypes.shape[1], prototypes.shape[2]}},
          {count.data, {count.shape[0]}}};
}

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
