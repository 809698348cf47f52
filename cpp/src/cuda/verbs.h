// SPDX-License-Identifier: Apache-2.0
// The verbs on a GPU, behind the public ones, which have checked shapes, types and parameters: all arrays lie on the
// current device, everything is put on context.stream, nothing is allocated, nothing waits, so a call may be captured
// into a graph. The same bits every time, for any batch around a user. Offsets cannot be checked there: they are
// clamped to [0, T], and an end to its start.
#pragma once
#include "hisac/route.h"

namespace hisac::cuda {

/// D up to 4,096; x given, neither ids nor int8 nor spread; Method::exact. Precision::float32: products of float32
/// numbers as sums of three bfloat16 products, within 3 * 2^-18 |x| |p| and the sums' rounding; bfloat16: one product.
Status route(const Context& context, const RouteParams& params, const RouteInputs& inputs, Tokens out) noexcept;
size_t route_workspace(const RouteParams& params, const RouteInputs& inputs, int64_t longest) noexcept;

/// V up to 4,096 too, and neither ids, int8, spread nor leaves. Products as the forward's; those with gradients of
/// tokens and with weights likewise. Workspace grows with T, whatever the longest history is.
Status route_backward(const Context& context, const RouteParams& params, const RouteInputs& inputs,
                      const RouteForward& forward, const RouteGradients& out) noexcept;
size_t route_backward_workspace(const RouteParams& params, const RouteInputs& inputs, const RouteGradients& out,
                                int64_t longest) noexcept;

}  // namespace hisac::cuda
