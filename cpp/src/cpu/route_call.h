// SPDX-License-Identifier: Apache-2.0
// A call of `route` or of its backward.
#pragma once
#include <utility>

#include "base/parallel.h"
#include "cpu/histories.h"

namespace hisac::cpu {

/// What `route` and its backward share: the inputs and their sizes, and the way through the rows. Of a Call, which has
/// one,
///   begin(unit, worker)            is called before the rows of a unit
///   reset(state)                   empties a state
///   block(worker, state)           adds worker.block to a state
///   merge(state, later, worker)    adds a later state to an earlier one
///   finish(user, state, worker)    gets the state of all rows of a user
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

  /// Runs all units of n users: those in order, or null for 0 .. n - 1.
  template <class Call, class State, class Worker>
  void run_units(Call& call, const int64_t* order, int64_t n, State* slots, Worker* workers) noexcept {
    units_.plan(in_.offsets, order, n, workers_);
    units_.run(
        context_, slots,
        [&](const Unit& unit, int w) {
          Worker& worker = workers[w];
          call.begin(unit, worker);
          fold_rows(call, unit, worker);
          if (unit.slot >= 0)  // the worker goes on with the memory of the slot
            std::swap(worker.stack[0], slots[unit.slot]);
          else
            call.finish(unit.user, worker.stack[0], worker);
        },
        [&](int64_t user, State* states, int64_t shared, int w) {
          load_panel(user, workers[w].panel);
          fold_all(shared, states, [&](State& state, State& later) { call.merge(state, later, workers[w]); });
          call.finish(user, states[0], workers[w]);
        });
  }

  /// Loads a unit's rows tile by tile and block by block: worker.stack[0] = the merge of all tiles' states.
  template <class Call, class Worker>
  void fold_rows(Call& call, const Unit& unit, Worker& worker) noexcept {
    const RowLoader loader(book_, in_, width_, operands_, value_width_, columns_, worker.panel.origin);
    const int64_t start = in_.offsets.start(unit.user), end = in_.offsets.end(unit.user);
    call.reset(worker.stack[0]);
    fold(
        unit.first, unit.last, worker.stack,
        [&](int64_t t, auto& state) {
          call.reset(state);
          const int64_t last = std::min(start + (t + 1) * kTile, end);
          for (int64_t i = start + t * kTile; i < last; i += simd::kBlock) {
            loader.load(i, std::min(i + simd::kBlock, last), worker.block);
            worker.block.last = i + simd::kBlock >= end;
            call.block(worker, state);
          }
        },
        [&](auto& state, auto& later) { call.merge(state, later, worker); });
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
