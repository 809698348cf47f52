// SPDX-License-Identifier: Apache-2.0
// A call of `route` or of its backward.
#pragma once
#include "base/parallel.h"
#include "cpu/histories.h"

namespace hisac::cpu {

/// What `route` and its backward share: the inputs and their sizes.
struct RouteCall {
  /// with_v, with_x: which of them are averaged.
  RouteCall(const Context& context, const Codebook* book, const RouteParams& params, const Histories& in,
            const RouteAgents& to, bool with_v, bool with_x, bool allow_bf16x3) noexcept
      : context_(context),
        book_(book),
        params_(params),
        in_(in),
        to_(to),
        operands_(operands_of(params, allow_bf16x3)),
        agents_(to.prototypes.shape[1]),
        width_(to.prototypes.shape[2]),
        value_width_(with_v ? in.v.width : 0),
        columns_(value_width_ + (with_x ? width_ : 0)),
        workers_(workers_of(context)) {}

  RowLoader loader(const float* origin) const noexcept {
    return RowLoader(book_, in_, width_, operands_, value_width_, columns_, origin);
  }
  void load_panel(int64_t b, AgentPanel& panel) const noexcept {
    panel.load(params_, to_.prototypes.data + b * agents_ * width_, agents_, width_, count_of(to_, b));
  }

  const Context& context_;
  const Codebook* book_;
  const RouteParams& params_;
  const Histories& in_;
  const RouteAgents& to_;
  Operands operands_;
  const simd::Kernels& k_ = simd::kernels();
  int64_t agents_, width_, value_width_;  // value_width: V, or 0
  int64_t columns_;                       // of the values: of v, and then of x
  int workers_;
  Units units_;
};

}  // namespace hisac::cpu
