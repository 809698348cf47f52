// SPDX-License-Identifier: Apache-2.0
// A user's behaviours summed by leaf of the codebook: rows that stand for them in `route`.
#pragma once
#include "codebook.h"
#include "context.h"
#include "histories.h"

namespace hisac {

/// The behaviours of a user, one row a leaf of the codebook, sorted by leaf: of the present ones, with w_i = e^bias_i,
///   W = sum w_i,  x = sum w_i x_i / W,  v = sum w_i v_i / W,  bias = log W,
///   spread = sum w_i (spread_i + |x_i - x|^2) / W.
/// and the votes of all that vote (hisac/vote.h). A leaf that has votes and no present behaviour has a bias of -inf,
/// and zeros for x, v and spread.
///
/// In `route` and in `vote` the sums stand for the behaviours, and they may be kept between requests. In `missing` they
/// do not: sums do not keep the v of absent behaviours. Sums add up: those of kept sums and new behaviours, as the rows
/// of one user, are the sums of all. Votes do where the weights of both are int64 or none, and the user has fewer than
/// 2^40 votes.
struct LeafSums {
  Array<float, 2> x;        // [S, D], S at least the rows of all histories
  Array<float, 2> v;        // [S, V]
  MutableSpans offsets;     // which of the S rows are a user's sums
  Array<int32_t, 2> codes;  // [S, L]
  Array<float, 1> bias;     // [S]
  Array<float, 1> spread;   // [S]
  Array<int64_t, 1> votes;  // [S]

  /// The sums as the histories of a later call of `route`.
  Histories histories() const noexcept {
    Histories h;
    h.x = {x.data, DType::float32, x.shape[0], x.shape[1]};
    h.v = {v.data, DType::float32, v.shape[0], v.shape[1]};
    h.offsets = {offsets.starts, offsets.ends, DType::int64, offsets.users};
    h.codes = {codes.data, {codes.shape[0], codes.shape[1]}};
    h.bias = {bias.data, {bias.shape[0]}};
    h.spread = {spread.data, {spread.shape[0]}};
    h.weights = {votes.data, DType::int64, votes.shape[0]};
    return h;
  }
};

/// Takes the same fields of the histories as `route`, and needs codes. Every row of x and v is read once. Where
/// out.offsets are ragged (ends = starts + 1, of an array [B + 1]), the sums of all users lie together. Otherwise each
/// user's sums begin behind the rows of the users before it, and what lies between is undefined.
Status leaf_sums(const Context& context, const Codebook& book, const Histories& histories,
                 const LeafSums& out) noexcept;
size_t leaf_sums_workspace(const Context& context, const Codebook& book, const Histories& histories) noexcept;

/// What `leaf_sums` made of the same histories, LeafSums::histories(), and the gradients of it. Null: 0.
struct LeafSumsForward {
  Histories sums;
  Array<const float, 2> d_x{};       // [S, D]
  Array<const float, 2> d_v{};       // [S, V]
  Array<const float, 1> d_bias{};    // [S]
  Array<const float, 1> d_spread{};  // [S]
};

/// Null arrays are not computed. With v_ids, the gradient of v is that of the table, as of `route_backward`.
struct LeafSumsGradients {
  Array<float, 2> v;     // [T, V]; with v_ids [rows, V], or [size of v_rows, V]
  Array<float, 1> bias;  // [T]
  Ids v_rows{};          // rows of the table; null: all
};

/// With the share s_i = exp(bias_i - bias) of a behaviour in the sum of its leaf,
///   dv_i = s_i dv,   dbias_i = s_i (dv . (v_i - v) + dx . (x_i - x) + dbias + dspread (spread_i + |x_i - x|^2 -
///   spread)).
/// Histories may overlap. x is held constant.
Status leaf_sums_backward(const Context& context, const Codebook& book, const Histories& histories,
                          const LeafSumsForward& forward, const LeafSumsGradients& out) noexcept;
size_t leaf_sums_backward_workspace(const Context& context, const Codebook& book, const Histories& histories,
                                    const LeafSumsGradients& out) noexcept;

}  // namespace hisac
