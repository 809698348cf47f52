// SPDX-License-Identifier: Apache-2.0
// The verbs on a GPU, behind the public ones, which have checked shapes, types and parameters: all arrays lie on the
// current device, everything is put on context.stream, nothing is allocated, nothing waits, so a call may be captured
// into a graph. The same bits every time, for any batch around a user. Offsets cannot be checked there: they are
// clamped to [0, T], and an end to its start.
#pragma once
#include "hisac/encode.h"
#include "hisac/route.h"

namespace hisac::cuda {

/// D up to 4,096; x given, neither ids nor int8 nor spread; Method::exact. Precision::float32: products of float32
/// numbers as sums of three bfloat16 products, within 3 * 2^-18 |x| |p| and the sums' rounding; bfloat16: one product.
Status route(const Context& context, const RouteParams& params, const RouteInputs& inputs, Tokens out) noexcept;
size_t route_workspace(const RouteParams& params, const RouteInputs& inputs, int64_t longest) noexcept;

/// Both read context.codebook_image and need no workspace. Residuals of a D beyond what shared memory holds (some 700
/// on an H100) are made anew from x each time they are read, which is slower.
Status encode(const Context& context, const Codebook& book, Rows x, Array<int32_t, 2> codes) noexcept;
Status code_prototypes(const Context& context, const Codebook& book, Array<const int32_t, 2> codes,
                       Array<float, 2> out) noexcept;

}  // namespace hisac::cuda
