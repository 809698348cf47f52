// SPDX-License-Identifier: Apache-2.0
// The verbs on a GPU: the headers' functions again, for arrays that lie on the current device. Everything is put on
// `stream`; nothing is allocated, nothing waits, so a call may be captured into a graph. The same bits every time, for
// any batch around a user. Offsets cannot be checked there: they are clamped to [0, T], and an end to its start.
#pragma once
#include "route.h"

namespace hisac::cuda {

/// Where a verb runs: scratch on the device, aligned to 64, and a cudaStream_t.
struct Context {
  Array<std::byte, 1> workspace;
  void* stream = nullptr;
};

/// float32: products of float32 numbers as sums of three bfloat16 products, float32 sums; within 3 * 2^-18 |x| |p| and
/// the sums' rounding. bfloat16: one product.
enum class Precision : int32_t { float32, bfloat16 };

/// As hisac::route. x is given; Method::exact; D up to 4,096.
Status route(const Context& context, const RouteParams& params, const RouteInputs& inputs, Tokens out,
             Precision precision = Precision::float32) noexcept;
/// longest: the longest history of the batch (T will do).
size_t route_workspace(const RouteParams& params, const RouteInputs& inputs, int64_t longest,
                       Precision precision = Precision::float32) noexcept;

}  // namespace hisac::cuda
