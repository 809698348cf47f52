// SPDX-License-Identifier: Apache-2.0
// The verbs on a GPU, behind the public ones, which have checked shapes, types and parameters: all arrays lie on the
// current device, everything is put on context.stream, nothing is allocated, nothing waits, so a call may be captured
// into a graph. The same bits every time, for any batch around a user. Offsets cannot be checked there: they are
// clamped to [0, T], and an end to its start.
#pragma once
#include "hisac/attend.h"
#include "hisac/route.h"

namespace hisac::cuda {

/// D up to 4,096; x given, neither ids nor int8 nor spread; Method::exact. Precision::float32: products of float32
/// numbers as sums of three bfloat16 products, within 3 * 2^-18 |x| |p| and the sums' rounding; bfloat16: one product.
Status route(const Context& context, const RouteParams& params, const RouteInputs& inputs, Tokens out) noexcept;
size_t route_workspace(const RouteParams& params, const RouteInputs& inputs, int64_t longest) noexcept;

/// Products as route's at float32: inputs in two bfloat16 parts, or in one where they are bfloat16, weights in two.
/// d + V, each to 16s, up to what 16 rows of both (gradients; else of d) leave of a block's shared memory: some 3,000
/// on an H100 for float32. A range of candidates begins where all earlier users' have ended.
Status attend(const Context& context, const AttendInputs& inputs, Attended out) noexcept;
size_t attend_workspace(const AttendInputs& inputs) noexcept;
Status attend_backward(const Context& context, const AttendInputs& inputs, const AttendForward& forward,
                       const AttendGradients& out) noexcept;
size_t attend_backward_workspace(const AttendInputs& inputs) noexcept;

}  // namespace hisac::cuda
