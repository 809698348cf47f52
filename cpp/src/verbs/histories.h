// SPDX-License-Identifier: Apache-2.0
// The checks of a batch of histories that verbs share. A message begins with `verb`.
#pragma once
#include "hisac/route.h"

namespace hisac {

/// The sizes of all fields that are given agree, and ids are integers.
Status check_sizes(const char* verb, const Histories& histories) noexcept;

/// Whether a workspace may be sized by these: all sizes are within the limits of base/checks.h.
bool sizes_fit(const Histories& histories, int64_t width, int64_t agents) noexcept;

/// The same batch with `longest` and `rows` stated (hisac/histories.h). Offsets that are not checked count no more than
/// T a user.
Histories stated(const Histories& histories, Device device) noexcept;

/// Checks the offsets, and `longest` and `rows`, and states these.
Status check_offsets(const char* verb, Histories& histories, Device device) noexcept;

/// Checks shapes, types and ranges of what route reads of a batch of D = width, and states `longest` and `rows`. book
/// null: codes are not read.
Status check_histories(const char* verb, const Codebook* book, Histories& histories, int64_t width,
                       Device device) noexcept;

/// Rows of the gradient of x or v: of the table, or as many as are listed, where there are ids; else one a behaviour.
inline int64_t gradient_rows(const Histories& in, const Ids& ids, int64_t table_rows, const Ids& listed) noexcept {
  return listed ? listed.size : ids ? table_rows : in.behaviours();
}
/// Rows of a table that are listed, where there is a table.
Status check_listed(const char* verb, const char* name, const Ids& ids, const Ids& listed) noexcept;

/// The same for a call of route or its backward, agents and parameters too. A temperature that is not given becomes
/// that of the codebook.
Status check_route(const char* verb, const Context& context, const Codebook* book, RouteParams& params,
                   Histories& histories, const RouteAgents& agents) noexcept;

/// Agents of this codebook.
Status check_fingerprint(const char* verb, const Codebook& book, const Agents& agents) noexcept;

/// What `encode`, `vote` and `route` check before they write; `compress` asks before the first of them.
Status check_rule(const Codebook& book, const VoteParams& params) noexcept;
Status check_encode(const Codebook& book, const Rows& x, const Array<int32_t, 2>& codes) noexcept;
Status check_vote(const Codebook& book, const VoteParams& params, Histories& histories, const Agents& out,
                  Device device) noexcept;
Status check_tokens(const Histories& histories, const RouteAgents& agents, const Tokens& out) noexcept;

}  // namespace hisac
