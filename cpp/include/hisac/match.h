// SPDX-License-Identifier: Apache-2.0
// Tree match: what a user's history says of each candidate, by the codes that both have. Leaf sums stand for the
// history; they may be kept between requests.
#pragma once
#include "codebook.h"
#include "context.h"
#include "histories.h"

namespace hisac {

/// For candidate n and level l, over the user's sums s below the candidate's first l codes,
///   lse = log sum_s e^bias_s,  v = sum_s e^bias_s v_s / sum_s e^bias_s;  without any, v = 0 and lse = -inf.
/// User b's candidates are [candidates.start(b), candidates.end(b)); a range that begins before the last one has ended
/// is an error. A sum is absent with an invalid code or a bias that is NaN or infinite, as that of a leaf which only
/// votes. A candidate with an invalid code, with an id outside the table, or in no user's range has no sums. A NaN or
/// an infinity in the v of a present sum reaches that column of the nodes above it. Where a node is a single row, v and
/// lse are that row's, bit for bit.
///
/// The sums of a user are sorted by code, each leaf once, as `leaf_sums` makes them. Of others the results are not
/// specified, but finite where v is.
struct MatchInputs {
  Histories sums;                   // of B users, as LeafSums::histories(). Read: v, offsets, codes, bias (null: 0)
  Array<const int32_t, 2> codes{};  // [N, L], or a table [items, L] with ids
  Ids ids{};                        // [N]; null: candidate n has row n
  Spans candidates{};               // B users, from offsets [B + 1]

  /// N
  int64_t size() const noexcept { return ids ? ids.size : codes.shape[0]; }
};

struct Match {
  MutableRows v;        // [N * L, V], the type of the sums' v
  Array<float, 2> lse;  // [N, L]
};

/// A node that several candidates of a user share is summed once. The bits do not depend on the number of workers, the
/// order of the candidates or the other users.
Status match(const Context& context, const Codebook& book, const MatchInputs& inputs, Match out) noexcept;
/// Before the sums are there, state sums.longest and sums.rows.
size_t match_workspace(const Context& context, const Codebook& book, const MatchInputs& inputs) noexcept;

/// Gradients of what `match` returned. Null: 0.
struct MatchForward {
  Rows d_v;                     // [N * L, V]
  Array<const float, 2> d_lse;  // [N, L]
};

/// float32; null: not computed. Rows of no user get zeros.
struct MatchGradients {
  Array<float, 2> v;     // [S, V]
  Array<float, 1> bias;  // [S]
};

/// With the share s_i = e^(bias_i - lse) of a sum,
///   dv_i = s_i dv,   dbias_i = s_i (dlse + dv . (v_i - v)),
/// added up over levels and candidates. The gradients of a node's candidates are added first, in the order of their
/// index and in float64, and then shared out, level by level; users may share sums. Nothing of the forward is read.
Status match_backward(const Context& context, const Codebook& book, const MatchInputs& inputs,
                      const MatchForward& forward, const MatchGradients& out) noexcept;
size_t match_backward_workspace(const Context& context, const Codebook& book, const MatchInputs& inputs) noexcept;

}  // namespace hisac
