// SPDX-License-Identifier: Apache-2.0
// The check of a batch of histories and of what routes it, which `route`, its backward and `leaf_sums` share.
#pragma once
#include "hisac/route.h"

namespace hisac {

/// Whether a workspace may be sized by these inputs: all sizes are within the limits of base/checks.h.
bool sizes_fit(const RouteInputs& in, int64_t longest) noexcept;

/// Checks shapes, types and ranges; the message begins with `verb`.
Status check_route(const char* verb, const RouteParams& params, const RouteInputs& in, Device device) noexcept;

}  // namespace hisac
