// SPDX-License-Identifier: Apache-2.0
// The order in which partial sums are added.
//
// A user's rows form tiles of kTile rows. The states of tiles merge in a fixed binary tree over the tile numbers, the
// one of a binary counter: (((0 1)(2 3))(4 5))6. So float sums have the same bits for any number of workers and
// whatever else is in the batch, and their error grows with log T.
#pragma once
#include <cstdint>

namespace hisac {

constexpr int64_t kTile = 2048;

inline int64_t tiles_of(int64_t rows) noexcept { return (rows + kTile - 1) / kTile; }

/// States that fold needs on its stack for `tiles` tiles.
inline int fold_depth(int64_t tiles) noexcept {
  int depth = 2;
  for (; tiles > 1; tiles /= 2) ++depth;
  return depth;
}

/// stack[0] = the merge of tile(t, state) for t in [first, last); merge(into, from) adds a later state to an earlier.
template <class State, class Tile, class Merge>
void fold(int64_t first, int64_t last, State* stack, Tile tile, Merge merge) {
  int height = 0;
  for (int64_t t = first; t < last; ++t) {
    tile(t, stack[height++]);
    for (int64_t k = t - first + 1; k % 2 == 0; k /= 2, --height) merge(stack[height - 2], stack[height - 1]);
  }
  for (; height > 1; --height) merge(stack[height - 2], stack[height - 1]);
}

/// The same tree over n given states; the result is states[0].
template <class State, class Merge>
void fold_all(int64_t n, State* states, Merge merge) {
  for (int64_t step = 1; step < n; step *= 2)
    for (int64_t i = 0; i + step < n; i += 2 * step) merge(states[i], states[i + step]);
}

}  // namespace hisac
