// SPDX-License-Identifier: Apache-2.0
// A call of `route` or of its backward. The kernels read float32 tiles of present rows, each with a norm and a bias,
// and the present agents, packed.
#pragma once
#include <algorithm>
#include <cfloat>
#include <utility>

#include "base/arena.h"
#include "base/parallel.h"
#include "base/schedule.h"
#include "cpu/histories.h"
#include "hisac/route.h"

namespace hisac::cpu {

/// The operands of products. bf16: x and prototypes are rounded to bfloat16, and their norms are those of the rounded.
/// bf16x3: each is a sum hi + lo of two bfloat16, multiplied in three products (amx.h).
enum class Operands { float32, bf16, bf16x3 };

/// Elements of bfloat16; of bf16x3 both parts.
struct Bf16Operand {
  uint32_t *hi = nullptr, *lo = nullptr;

  void carve(Arena& arena, int64_t size, Operands operands) noexcept {
    if (operands != Operands::float32) hi = arena.take<uint32_t>(size);
    if (operands == Operands::bf16x3) lo = arena.take<uint32_t>(size);
  }
};

/// The operands of route on this ISA: float32 where the ISA has no faster ones, or where bf16x3 is not allowed.
Operands operands_of(const RouteParams& params, bool allow_bf16x3) noexcept;

/// Up to kBlock present rows of one user.
struct Block {
  int n = 0;
  float* x = nullptr;           // [kBlock, pad(D)] x less the origin; padding columns stay zero
  float* values = nullptr;      // [kBlock, pad(columns)] v, and behind it x itself, as far as they are averaged
  float* norm = nullptr;        // [kBlock] |x|^2 + spread
  float* bias = nullptr;        // [kBlock] natural logarithm
  Bf16Operand x_bf16;           // [kBlock, pad((D + 1) / 2)] x in bfloat16
  float* remainder = nullptr;   // [D] scratch: what rounding to bfloat16 leaves of a row
  int64_t* row = nullptr;       // [kBlock] the row in x and v
  simd::Prefetcher prefetcher;  // the rows after this block
  bool last = false;            // the last block of its user

  /// columns: of the values.
  void carve(Arena& arena, int64_t width, int64_t columns, Operands operands) noexcept;
  void clear_padding(int64_t width, int64_t columns) noexcept;
};

/// The present agents of one user, packed for products with x. Distances do not depend on the origin, but |x|^2 + |p|^2
/// - 2 x . p loses the digits of large terms. So, unless products round to bfloat16, prototypes and rows are taken from
/// an origin among them: in each dimension the median of the first five present prototypes (of the first where there
/// are fewer), which one far prototype does not move.
struct AgentPanel {
  int64_t m = 0;
  int32_t* index = nullptr;              // [M] the agent of a column
  float* packed = nullptr;               // [D, m]
  Bf16Operand packed_bf16;               // [(D + 1) / 2, m] in place of packed
  uint32_t* rounding_scratch = nullptr;  // [(D + 1) / 2]; null: prototypes are not rounded
  float* remainders = nullptr;           // [M, D] of bf16x3: what rounding leaves of rows
  float* origin = nullptr;               // [D]; null: zero
  float* rows = nullptr;                 // [m, D] the present prototypes, less the origin
  float* norm = nullptr;                 // [pad(M)] |p|^2; padding: +inf, so that its logits are -inf
  float* rate = nullptr;                 // [pad(M)] log2(e) / tau

  void carve(Arena& arena, int64_t agents, int64_t width, Operands operands, bool round_to_bf16) noexcept;
  void load(const RouteParams& params, const float* prototypes, int64_t agents, int64_t width, int64_t count) noexcept;
};

/// The present agents of user b by count alone, clamped to [0, M].
inline int64_t count_of(const RouteAgents& agents, int64_t b) noexcept {
  const int64_t m = agents.prototypes.shape[1];
  return agents.count ? std::clamp<int64_t>(agents.count.data[b], 0, m) : m;
}

inline float temperature_of(const RouteParams& params, int64_t agent) noexcept {
  return params.temperature.data[params.temperature.shape[0] == 1 ? 0 : agent];
}

/// The shift of a row's base-2 logits, which are 0 or less. It is finite, so that no logit becomes +inf or NaN.
inline float row_shift_of(float bias, float row_lse) noexcept { return std::min(simd::base2(bias) - row_lse, FLT_MAX); }

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
          load_panel(user, workers[w].panel);
          fold_all(shared, states, [&](State& state, State& later) { call.merge(state, later, workers[w]); });
          call.finish(user, states[0], workers[w]);
        });
  }

  /// Loads a unit's rows tile by tile and block by block: worker.stack[0] = the merge of all tiles' states.
  template <class Call, class Worker>
  void fold_rows(Call& call, const Unit& unit, Worker& worker) noexcept {
    const int64_t start = in_.offsets.start(unit.user), end = in_.offsets.end(unit.user);
    call.reset(worker.stack[0]);
    fold(
        unit.first, unit.last, worker.stack,
        [&](int64_t t, auto& state) {
          call.reset(state);
          const int64_t last = std::min(start + (t + 1) * kTile, end);
          for (int64_t i = start + t * kTile; i < last; i += simd::kBlock) {
            load_block(i, std::min(i + simd::kBlock, last), worker.panel.origin, worker.block);
            worker.block.last = i + simd::kBlock >= end;
            call.block(worker, state);
          }
        },
        [&](auto& state, auto& later) { call.merge(state, later, worker); });
  }

  /// Loads the rows [begin, end) as a block without the absent ones. origin [D] is subtracted from x; null: zero.
  void load_block(int64_t begin, int64_t end, const float* origin, Block& block) const noexcept;
  void load_panel(int64_t b, AgentPanel& panel) const noexcept {
    panel.load(params_, to_.prototypes.data + b * agents_ * width_, agents_, width_, count_of(to_, b));
  }

  const Context& context_;
  const RouteParams& params_;
  const Histories& in_;
  const RouteAgents& to_;
  const simd::Kernels& k_ = simd::kernels();
  const int workers_ = workers_of(context_);
  const int64_t agents_ = to_.prototypes.shape[1], width_ = to_.prototypes.shape[2];
  const int64_t value_width_, columns_;  // V, or 0; columns of the values: of v, and then of x
  const Operands operands_;
  const RowLoader loader_;
  Units units_;
};

}  // namespace hisac::cpu
