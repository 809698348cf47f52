// SPDX-License-Identifier: Apache-2.0
// The verbs on a GPU, behind the public ones, which have checked shapes, types and parameters: all arrays lie on the
// current device, everything is put on context.stream, nothing is allocated, nothing waits, so a call may be captured
// into a graph. The same bits every time, for any batch around a user. Offsets cannot be checked there: they are
// clamped to [0, T], and an end to its start.
#pragma once
#include "hisac/route.h"

namespace hisac::cuda {

/// D up to 4,096. Needs context.codebook_image where x is not given. Precision::float32: products of float32
/// numbers as sums of three bfloat16 products, within 3 * 2^-18 |x| |p| and the sums' rounding; bfloat16: one product.
Status route(const Context& context, const RouteParams& params, const RouteInputs& inputs, Tokens out) noexcept;
size_t route_workspace(const RouteParams& params, const RouteInputs& inputs, int64_t longest) noexcept;

/// Users whose histories find no room for their entries in the workspace have no sums there: only histories that are
/// not ragged offsets can come to that, with a workspace for a `longest` that is too short, which no call can see.
Status leaf_sums(const Context& context, const RouteInputs& inputs, const LeafSums& out) noexcept;
size_t leaf_sums_workspace(const RouteInputs& inputs, int64_t longest) noexcept;

}  // namespace hisac::cuda
