// SPDX-License-Identifier: Apache-2.0
// A user's behaviours and agents for `route`: everything about absence, prototypes in place of x and leaves in place of
// rows ends here (types, scales and ids in rows.h); the kernels see float32 tiles of present rows with a norm and a
// bias each.
#pragma once
#include <algorithm>
#include <cfloat>

#include "arena.h"
#include "codebook_body.h"
#include "cpu/kernels.h"
#include "hisac/route.h"
#include "rows.h"
#include "tiles.h"

namespace hisac {

/// What products multiply: floats; bfloat16, and then x, its norm, the prototypes and theirs are the rounded ones; or
/// two halves of bfloat16.
enum class Operands { floats, rounded, split };

/// 32-bit elements of a row of bfloat16.
constexpr int64_t pairs_of(int64_t width) noexcept { return (width + 1) / 2; }

/// Elements of bfloat16 and, of split operands, what their rounding left.
struct Halves {
  uint32_t *hi = nullptr, *lo = nullptr;

  void carve(Arena& arena, int64_t size, Operands operands) noexcept {
    if (operands != Operands::floats) hi = arena.take<uint32_t>(size);
    if (operands == Operands::split) lo = arena.take<uint32_t>(size);
  }
};

/// Up to kBlock present rows (or leaves) of one user.
struct Block {
  int n = 0;
  float* x = nullptr;      // [kBlock, pad(D)]; padding columns stay zero
  float* v = nullptr;      // [kBlock, pad(V)]
  float* norm = nullptr;   // [kBlock] |x|^2, or a leaf's mean of it
  float* bias = nullptr;   // [kBlock] natural logarithm
  Halves pairs;            // [kBlock, pad((D + 1) / 2)] x in bfloat16
  float* rest = nullptr;   // [pad(max(D, V))] room for what rounding leaves of a row
  int64_t* row = nullptr;  // [kBlock] the row in x and v; for leaves their number in the user
  cpu::Ahead ahead;        // the rows that follow
  bool last = false;       // of a unit

  void carve(Arena& arena, int64_t width, int64_t value_width, Operands operands) noexcept;
  void clear_padding(int64_t width, int64_t value_width) noexcept;
};

/// What the rows that do not take part add up to (Missing::token).
struct Absent {
  int64_t count = 0;
  float* sum = nullptr;  // [pad(V)], null: not wanted
};

/// A user's leaves: its valid rows sorted by leaf, and where each leaf begins.
struct Leaves {
  struct Entry {
    uint64_t leaf;
    int64_t row;
    bool operator<(const Entry& o) const noexcept { return leaf != o.leaf ? leaf < o.leaf : row < o.row; }
  };
  int64_t count = 0;
  Entry* entry = nullptr;    // [longest]
  int64_t* begin = nullptr;  // [longest + 1]
  float* share = nullptr;    // [longest] e^bias of an entry over its leaf's sum, once loaded
  float *x = nullptr, *v = nullptr, *part_x = nullptr, *part_v = nullptr;  // one row and its running sums

  void carve(Arena& arena, int64_t longest, int64_t width, int64_t value_width) noexcept;
};

class RowLoader {
 public:
  /// splits: whether products take split operands, where the ISA has them.
  RowLoader(const RouteParams& params, const RouteInputs& inputs, bool splits) noexcept;

  Operands operands() const noexcept { return operands_; }
  bool rounds() const noexcept { return operands_ == Operands::rounded; }

  /// Rows [begin, end) of x and v as a block; absent rows are left out, and added to `absent` where wanted.
  void load(int64_t begin, int64_t end, Block& block, Absent* absent) const noexcept;
  /// Rows [begin, end) of a user -> its leaves.
  void find_leaves(int64_t begin, int64_t end, Leaves& leaves) const noexcept;
  /// Leaves [begin, end) as a block of their means.
  void load_leaves(int64_t begin, int64_t end, Leaves& leaves, Block& block) const noexcept;

  /// Whether a row is absent and has a finite v; block.x and v [V] are scratch.
  bool absent_with_value(int64_t row, Block& block, float* v) const noexcept;
  /// Adds the absent rows of [begin, end) where wanted.
  void add_absent(int64_t begin, int64_t end, Block& block, float* v, Absent* absent) const noexcept;

 private:
  bool load_x(int64_t row, float* x, float* norm) const noexcept;
  bool load_v(int64_t row, float* v) const noexcept;
  bool has_value(int64_t row, float* v) const noexcept;
  void add_if_wanted(int64_t row, float* v, Absent* absent) const noexcept;
  float bias_of(int64_t row) const noexcept { return in_.bias ? in_.bias.data[row] : 0.f; }

  const RouteInputs& in_;
  const cpu::Kernels& k_;
  int64_t width_;
  RowSource x_, v_;
  Operands operands_;
};

/// Loads a unit's rows (or, by Method::leaf, its user's leaves) block by block and tile by tile: stack[0] = the merge
/// of all tiles' states. reset(state) empties one, absent_of(state) is its Absent or null, body(state) adds the block,
/// merge(into, from) adds a later state. Absent rows of leaves are added to the last state's.
template <class State, class Reset, class AbsentOf, class Body, class Merge>
void fold_rows(const RowLoader& loader, const RouteParams& params, const Histories& h, const Unit& unit, Leaves& leaves,
               Block& block, State* stack, Reset reset, AbsentOf absent_of, Body body, Merge merge) {
  const int64_t start = h.start(unit.user), end = h.end(unit.user);
  const bool leaf = params.method == Method::leaf;
  reset(stack[0]);
  if (leaf) loader.find_leaves(start, end, leaves);
  const int64_t items = leaf ? leaves.count : end - start;
  const auto tile = [&](int64_t t, State& state) {
    reset(state);
    const int64_t last = std::min((t + 1) * kTile, items);
    for (int64_t i = t * kTile; i < last; i += cpu::kBlock) {
      if (leaf)
        loader.load_leaves(i, std::min(i + cpu::kBlock, last), leaves, block);
      else
        loader.load(start + i, start + std::min(i + cpu::kBlock, last), block, absent_of(state));
      block.last = i + cpu::kBlock >= items;
      body(state);
    }
  };
  fold(leaf ? 0 : unit.first, leaf ? tiles_of(items) : unit.last, stack, tile, merge);
  if (leaf) loader.add_absent(start, end, block, leaves.v, absent_of(stack[0]));
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
inline float row_shift_of(float bias, float row_lse) noexcept { return std::min(cpu::base2(bias) - row_lse, FLT_MAX); }

/// Shapes, types and ranges; `verb` opens the message.
Status check_route(const char* verb, const RouteParams& params, const RouteInputs& in) noexcept;

}  // namespace hisac
