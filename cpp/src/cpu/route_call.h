// SPDX-License-Identifier: Apache-2.0
// A call of `route` or of its backward.
#pragma once
#include <algorithm>
#include <utility>

#include "base/parallel.h"
#include "base/schedule.h"
#include "cpu/groups.h"
#include "cpu/histories.h"

namespace hisac::cpu {

/// What `route` and its backward share: the inputs and their sizes, and the way through the rows. Of a Call, which has
/// one,
///   begin(unit, worker)            is called before the rows of a unit; it calls load_user
///   reset(state, worker)           empties a state
///   block(worker, state)           adds worker.block to a state
///   tile(rows, n, worker, state)   adds a tile of a user that is routed sparsely: n rows in the order of CodeOrder
///   merge(state, later, worker)    adds a later state to an earlier one
///   finish(user, state, worker)    gets the state of all rows of a user
/// A worker has `panel`, all present agents of its user, `block`, `stack`, `groups`, and `sparse`, whether the user is
/// routed sparsely.
struct RouteCall {
  /// with_v, with_x: which of them are averaged.
  RouteCall(const Context& context, const Codebook* book, const RouteParams& params, const Histories& in,
            const RouteAgents& to, bool with_v, bool with_x, bool allow_bf16x3) noexcept
      : context_(context),
        book_(book),
        params_(params),
        in_(in),
        to_(to),
        value_width_(with_v ? in.v.width : 0),
        columns_(value_width_ + (with_x ? width_ : 0)),
        operands_(operands_of(params, allow_bf16x3)),
        loader_(book, in, width_) {}

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
          load_user(user, workers[w]);
          fold_all(shared, states, [&](State& state, State& later) { call.merge(state, later, workers[w]); });
          call.finish(user, states[0], workers[w]);
        });
  }

  /// Loads a unit's rows tile by tile and block by block: worker.stack[0] = the merge of all tiles' states.
  template <class Call, class Worker>
  void fold_rows(Call& call, const Unit& unit, Worker& worker) noexcept {
    const int64_t start = in_.offsets.start(unit.user), end = in_.offsets.end(unit.user);
    call.reset(worker.stack[0], worker);
    fold(
        unit.first, unit.last, worker.stack,
        [&](int64_t t, auto& state) {
          call.reset(state, worker);
          const int64_t first = start + t * kTile, last = std::min(first + kTile, end);
          if (worker.sparse) return call.tile(order_.of(unit.user) + t * kTile, last - first, worker, state);
          for (int64_t i = first; i < last; i += simd::kBlock) {
            load_block(i, std::min(i + simd::kBlock, last), worker.panel.origin, worker.block);
            worker.block.last = i + simd::kBlock >= end;
            call.block(worker, state);
          }
        },
        [&](auto& state, auto& later) { call.merge(state, later, worker); });
  }

  /// body() for each block of n listed rows, which `next` rows follow, once it is loaded.
  template <class Worker, class Body>
  void each_block(const int64_t* rows, int64_t n, int64_t next, Worker& worker, Body body) const noexcept {
    worker.block.last = false;
    for (int64_t i = 0; i < n; i += simd::kBlock) {
      const int64_t taken = std::min<int64_t>(simd::kBlock, n - i), after = n - i - taken + next;
      const int64_t ahead = std::min(after, std::max<int64_t>(taken, 16));  // a group after this one may be small too
      load_listed(rows + i, taken, ahead, worker.panel.origin, worker.block);
      body();
    }
  }

  void carve_order(Arena& arena) noexcept {
    if (params_.sparse) order_.carve(arena, in_, book_->size(0), workers_);
  }
  void sort_rows() noexcept {
    if (params_.sparse) order_.sort(context_, loader_, in_, to_, params_.sparse);
  }

  /// Loads the rows [begin, end) as a block without the absent ones. origin [D] is subtracted from x; null: zero.
  void load_block(int64_t begin, int64_t end, const float* origin, Block& block) const noexcept;
  /// The same of n listed rows; `next` rows follow in the list, which are loaded next.
  void load_listed(const int64_t* rows, int64_t n, int64_t next, const float* origin, Block& block) const noexcept;
  /// Loads a row behind those of a block, if it is present.
  void load_row_into(Block& block, int64_t row, const float* origin) const noexcept;

  /// Loads the agents of user b.
  template <class Worker>
  void load_user(int64_t b, Worker& worker) const noexcept {
    worker.panel.load(params_, to_.prototypes.data + b * agents_ * width_, width_, count_of(to_, b));
    worker.sparse = worker.groups.load(book_, to_, order_, in_.offsets, b, worker.panel, params_.sparse);
  }

  const Context& context_;
  const Codebook* const book_;
  const RouteParams& params_;
  const Histories& in_;
  const RouteAgents& to_;
  const simd::Kernels& k_ = simd::kernels();
  const int workers_ = workers_of(context_);
  const int64_t agents_ = to_.prototypes.shape[1], width_ = to_.prototypes.shape[2];
  const int64_t value_width_, columns_;  // V, or 0; columns of the values: of v, and then of x
  const Operands operands_;
  const RowLoader loader_;
  CodeOrder order_;  // of sparse routing
  Units units_;
};

}  // namespace hisac::cpu
