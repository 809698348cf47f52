// SPDX-License-Identifier: Apache-2.0
// The checks of a batch of histories that verbs share. A message begins with `verb`.
#pragma once
#include "hisac/route.h"

namespace hisac {

/// The sizes of all fields that are given agree, and ids are integers.
Status check_sizes(const char* verb, const Histories& histories) noexcept;

/// Whether a workspace may be sized by these: all sizes are within the limits of base/checks.h.
bool sizes_fit(const Histories& histories, int64_t width, int64_t agents, int64_t longest) noexcept;

/// Checks shapes, types and ranges of what route reads of a batch of D = width. book null: codes are not read.
Status check_histories(const char* verb, const Codebook* book, const Histories& histories, int64_t width,
                       Device device) noexcept;

/// The same for a call of route or its backward, agents and parameters too.
Status check_route(const char* verb, const Codebook* book, const RouteParams& params, const Histories& histories,
                   const RouteAgents& agents, Device device) noexcept;

}  // namespace hisac
