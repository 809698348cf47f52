// SPDX-License-Identifier: Apache-2.0
// A call of `route` or of its backward.
#pragma once
#include "base/parallel.h"
#include "cpu/leaf_sums.h"

namespace hisac::cpu {

/// What `route` and its backward share: the inputs, their sizes, and the rows that are routed.
struct RouteCall {
  RouteCall(const Context& context, const Codebook* book, const RouteParams& params, const Histories& in,
            const RouteAgents& to, bool allow_bf16x3, int64_t longest) noexcept
      : context_(context),
        book_(book),
        params_(params),
        in_(in),
        to_(to),
        routed_(in),
        leaves_(book, in, to.prototypes.shape[2], longest, workers_of(context)),
        operands_(operands_of(params, allow_bf16x3)),
        agents_(to.prototypes.shape[1]),
        width_(to.prototypes.shape[2]),
        value_width_(in.v.width),
        longest_(longest),
        workers_(workers_of(context)) {}

  bool leaf() const noexcept { return params_.method == Method::leaf; }
  RowLoader loader(const Histories& rows, const float* origin = nullptr) const noexcept {
    return RowLoader(book_, rows, width_, operands_, origin);
  }

  const Context& context_;
  const Codebook* book_;
  const RouteParams& params_;
  const Histories& in_;
  const RouteAgents& to_;
  Histories routed_;  // in_, or its leaf sums
  LeafSummer leaves_;
  LeafInput leaf_input_;
  Operands operands_;
  const simd::Kernels& k_ = simd::kernels();
  int64_t agents_, width_, value_width_, longest_;
  int workers_;
  Units units_;
};

}  // namespace hisac::cpu
