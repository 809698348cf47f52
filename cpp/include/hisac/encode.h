// SPDX-License-Identifier: Apache-2.0
// Multi-level semantic IDs: greedy residual quantisation.
#pragma once
#include "codebook.h"
#include "context.h"

namespace hisac {

/// At level l the code c minimising |r - c|^2, then r <- r - c in float32; lower code first on a tie.
/// The distance is the float64 sum over d, in index order, of (r_d - c_d)^2, so codes are integers on which every
/// backend and the reference agree: scores of less precision only screen, and all codes within their proven error are
/// scored again.
/// x [T, D] -> codes [T, L]; a row with a NaN or an infinity is -1 at every level.
Status encode(const Context& context, const Codebook& book, Rows x, Array<int32_t, 2> codes) noexcept;
size_t encode_workspace(const Context& context, const Codebook& book) noexcept;

}  // namespace hisac
