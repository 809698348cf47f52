// SPDX-License-Identifier: Apache-2.0
// A user's behaviours and agents for `route`: everything about absence, prototypes in place of x and spreads ends
// here (types, scales and ids in rows.h); the kernels see float32 tiles of present rows with a norm and a
// bias each.
#pragma once
#include <algorithm>
#include <cfloat>

#include "base/arena.h"
#include "base/schedule.h"
#include "codebook/body.h"
#include "cpu/rows.h"
#include "cpu/simd/kernels.h"
#include "hisac/route.h"

namespace hisac::cpu {

/// What products multiply: floats; bfloat16, and then x, its norm, the prototypes and theirs are the rounded ones; or
/// two halves of bfloat16.
enum class Operands { floats, rounded, split };

/// Elements of bfloat16 and, of split operands, what their rounding left.
struct Halves {
  uint32_t *hi = nullptr, *lo = nullptr;

  void carve(Arena& arena, int64_t size, Operands operands) noexcept {
    if (operands != Operands::floats) hi = arena.take<uint32_t>(size);
    if (operands == Operands::split) lo = arena.take<uint32_t>(size);
  }
};

/// The operands of route, where the ISA has better ones than floats; splits: halves may be among them.
Operands operands_of(const RouteParams& params, bool splits) noexcept;

/// Up to kBlock present rows of one user.
struct Block {
  int n = 0;
  float* x = nullptr;      // [kBlock, pad(D)]; padding columns stay zero
  float* v = nullptr;      // [kBlock, pad(V)]
  float* norm = nullptr;   // [kBlock] |x|^2 + spread
  float* bias = nullptr;   // [kBlock] natural logarithm
  Halves pairs;            // [kBlock, pad((D + 1) / 2)] x in bfloat16
  float* rest = nullptr;   // [D] room for what rounding leaves of a row
  int64_t* row = nullptr;  // [kBlock] the row in x and v
  simd::Ahead ahead;       // the rows that follow
  bool last = false;       // of a unit

  void carve(Arena& arena, int64_t width, int64_t value_width, Operands operands) noexcept;
  void clear_padding(int64_t width, int64_t value_width) noexcept;
};

/// What the rows that do not take part add up to (Missing::token).
struct Absent {
  int64_t count = 0;
  float* sum = nullptr;  // [pad(V)], null: not wanted
};

class RowLoader {
 public:
  RowLoader(const RouteInputs& inputs, Operands operands) noexcept;

  /// Rows [begin, end) of x and v as a block; absent rows are left out, and added to `absent` where wanted.
  void load(int64_t begin, int64_t end, Block& block, Absent* absent) const noexcept;
  /// x [D] = a row and its sum of squares; false for an absent one.
  bool load_x(int64_t row, float* x, float* norm) const noexcept {
    return may_be_present(row) && load_listed_x(row, x, norm);
  }
  /// Whether a row is present as far as its ids, codes, bias and spread tell.
  bool may_be_present(int64_t row) const noexcept;
  /// The same as load_x of one that may be.
  bool load_listed_x(int64_t row, float* x, float* norm) const noexcept;
  bool load_v(int64_t row, float* v) const noexcept;
  /// sum [V] += factor times v of a present row; room [V].
  void add_v(int64_t row, float factor, float* sum, float* room) const noexcept { v_.add(row, factor, sum, room); }
  /// Asks for a row that may be present ahead of its use. Inlined always, as RowSource's.
  __attribute__((always_inline)) void prefetch(int64_t row) const noexcept {
    x_.prefetch(row);
    v_.prefetch(row);
    if (!x_) __builtin_prefetch(in_.codes.data + row * in_.codes.shape[1]);
    if (in_.bias) __builtin_prefetch(in_.bias.data + row);
  }
  /// Whether a row's v [V], loaded, is there and finite.
  bool has_value(int64_t row, float* v) const noexcept;
  float bias_of(int64_t row) const noexcept { return in_.bias ? in_.bias.data[row] : 0.f; }
  float spread_of(int64_t row) const noexcept { return in_.spread ? in_.spread.data[row] : 0.f; }

 private:
  void add_if_wanted(int64_t row, float* v, Absent* absent) const noexcept;

  const RouteInputs& in_;
  const simd::Kernels& k_;
  int64_t width_;
  RowSource x_, v_;
  Operands operands_;
};

/// Loads a unit's rows block by block and tile by tile: stack[0] = the merge of all tiles' states. reset(state) empties
/// one, absent_of(state) is its Absent or null, body(state) adds the block, merge(into, from) adds a later state.
template <class State, class Reset, class AbsentOf, class Body, class Merge>
void fold_rows(const RowLoader& loader, const Histories& h, const Unit& unit, Block& block, State* stack, Reset reset,
               AbsentOf absent_of, Body body, Merge merge) {
  const int64_t start = h.start(unit.user), end = h.end(unit.user);
  reset(stack[0]);
  const auto tile = [&](int64_t t, State& state) {
    reset(state);
    const int64_t last = std::min(start + (t + 1) * kTile, end);
    for (int64_t i = start + t * kTile; i < last; i += simd::kBlock) {
      loader.load(i, std::min(i + simd::kBlock, last), block, absent_of(state));
      block.last = i + simd::kBlock >= end;
      body(state);
    }
  };
  fold(unit.first, unit.last, stack, tile, merge);
}

/// The present agents of one user, packed for products with x.
struct AgentPanel {
  int64_t m = 0;
  int32_t* index = nullptr;  // [M] their places
  float* packed = nullptr;   // [D, m]
  Halves pairs;              // [(D + 1) / 2, m] in place of packed
  uint32_t* room = nullptr;  // [(D + 1) / 2]: prototypes are rounded
  float* rests = nullptr;    // [M, D] of split operands: what rounding leaves of rows
  float* rows = nullptr;     // [M, D]: the present prototypes, one after another
  float* norm = nullptr;     // [pad(M)] |p|^2; padding: +inf, so that its logits are -inf
  float* rate = nullptr;     // [pad(M)] log2(e) / tau

  void carve(Arena& arena, int64_t agents, int64_t width, Operands operands, bool rounds) noexcept;
  void load(const RouteParams& params, const float* prototypes, int64_t agents, int64_t width, int64_t count) noexcept;
};

/// present agents of user b by count alone, clamped to [0, M].
inline int64_t count_of(const RouteInputs& in, int64_t b) noexcept {
  const int64_t m = in.prototypes.shape[1];
  const int64_t c = in.count ? in.count.data[b] : m;
  return c < 0 ? 0 : c > m ? m : c;
}

inline float temperature_of(const RouteParams& params, int64_t agent) noexcept {
  return params.temperature.data[params.temperature.shape[0] == 1 ? 0 : agent];
}

/// A row's shift of its base-2 logits, which are 0 or less: finite, so that no logit becomes +inf or NaN.
inline float row_shift_of(float bias, float row_lse) noexcept { return std::min(simd::base2(bias) - row_lse, FLT_MAX); }

}  // namespace hisac::cpu
