// SPDX-License-Identifier: Apache-2.0
// Target attention: candidates attend to their user's tokens. The caller computes keys and values of the tokens, once a
// request, by the matrices of the trained model, and may keep them, with the log_share of the tokens, between requests.
#pragma once
#include <limits>

#include "array.h"
#include "context.h"
#include "status.h"

namespace hisac {

constexpr float kRootScale = std::numeric_limits<float>::quiet_NaN();  // stands for 1 / sqrt(d)

/// z_m = scale q . k_m + bias_m,  out = softmax(z) values,  lse = log sum_m exp z_m
///
/// Candidates. User b's are [candidates.start(b), candidates.end(b)). A range that begins before the last one has ended
/// is an error.
///
/// Tokens. User b's are the tokens b M .. (b + 1) M - 1; token t has the H rows of keys and values from t H on. Where
/// users differ in number, as by recent behaviours, they are [tokens.start(b), tokens.end(b)), in order too, with gaps
/// or without. On a device a user's tokens after the first M are left out, and ranges that overlap give wrong
/// gradients. A token whose bias or key holds a NaN or an infinity is absent. If q holds one, all tokens are absent for
/// that candidate. A candidate without tokens, or in no user's range, has a zero row and an lse of -inf. A NaN or an
/// infinity in the values of a present token makes that column of `out` NaN or infinite for all candidates of its user
/// and head that have tokens. There is no count of agents: to leave out absent ones, pass the log_share of `compress`
/// or the lse of `route` as the bias, where theirs is -inf.
///
/// Joined tokens. To attend to a user's older behaviours by agents, and to the n most recent raw, in one softmax: let
/// `compress` read the older ones (`ranges` of starts and cuts makes such Spans); copy the keys and values of the
/// agents and then of the recent behaviours into one array, and give it as tokens. With N behaviours of which o are
/// older, the biases are log_share + log(o / N), and -log N.
struct AttendInputs {
  Rows q;                         // [N * H, d]
  Rows keys;                      // [B * M * H, d], q's type; with `tokens` [R * H, d]
  Rows values;                    // [B * M * H, V], q's type; with `tokens` [R * H, V]
  int64_t agents = 0, heads = 0;  // M, H; with `tokens`, M is the most that a user has; 0: not stated
  Spans candidates;               // B users, from offsets [B + 1]
  Array<const float, 2> bias;     // [B, M], with `tokens` [1, R]; null: 0, and absent agents take part
  float scale = kRootScale;       // of q . k
  Spans tokens = {};              // B users; starts null: M each
};

struct Attended {
  MutableRows out;      // [N * H, V], q's type
  Array<float, 2> lse;  // [N, H]
};

Status attend(const Context& context, const AttendInputs& inputs, Attended out) noexcept;
size_t attend_workspace(const Context& context, const AttendInputs& inputs) noexcept;

struct AttendForward {
  Rows d_out;                   // [N * H, V], q's type
  Array<const float, 2> d_lse;  // [N, H], null: 0
  Rows out;                     // [N * H, V]
  Array<const float, 2> lse;    // [N, H]
};

/// float32; bias null: not computed.
struct AttendGradients {
  Array<float, 3> q;       // [N, H, d]
  Array<float, 4> keys;    // [B, M, H, d]; with `tokens` [1, R, H, d], zero for rows of no user
  Array<float, 4> values;  // [B, M, H, V], [1, R, H, V]
  Array<float, 2> bias;    // [B, M], [1, R]
};

/// w = exp(z - lse), dz = w (dout . values - dout . out + dlse), recomputed; deterministic.
Status attend_backward(const Context& context, const AttendInputs& inputs, const AttendForward& forward,
                       const AttendGradients& out) noexcept;
size_t attend_backward_workspace(const Context& context, const AttendInputs& inputs) noexcept;

}  // namespace hisac
