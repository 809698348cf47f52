// SPDX-License-Identifier: Apache-2.0
// The gradient of x or of v where it is a table. Each behaviour of the chunks that histories reach gives its row to a
// slot of scratch (Chunks::slot); those of one row of the table are then summed, in the order of the behaviours and in
// float64.
#pragma once
#include "cuda/chunks.h"

namespace hisac::cuda {

struct TableGradient {
  Ids ids, listed;        // listed: the rows of the table that are wanted; null: all
  int64_t table = 0;      // its rows
  Array<float, 2> out{};  // [rows wanted, width]; null: there is no table, or nothing is wanted
  bool given = false;     // whether anything is given to it; else it is 0
  // workspace, of `slots`
  float* rows = nullptr;   // [slots, width]
  int64_t* key = nullptr;  // the row of the table that a slot's behaviour has; past the last row where there is none
  uint32_t *order = nullptr, *spare = nullptr;  // slots, by key

  TableGradient() = default;
  TableGradient(const Ids& given_ids, int64_t table_rows, const Ids& wanted, const Array<float, 2>& to, bool is_given)
      : ids(given_ids), listed(wanted), table(table_rows), out(given_ids ? to : Array<float, 2>{}), given(is_given) {}

  SIMT_BOTH bool gathers() const { return out.data != nullptr; }

  /// *to: where behaviours give their rows, in place of `out`.
  void carve(int64_t slots, Arena& arena, Array<float, 2>* to) {
    if (!gathers()) return;
    if (!given) slots = 0;
    rows = arena.take<float>(slots, out.shape[1]);
    key = arena.take<int64_t>(slots);
    arena.take_into(slots, order, spare);
    to->data = given ? rows : nullptr;
  }
};

/// After every behaviour has given its rows.
void launch_table_gradients(const TableGradient& x, const TableGradient& v, const Chunks& chunks, Launcher& launch);

}  // namespace hisac::cuda
