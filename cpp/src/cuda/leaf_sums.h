// SPDX-License-Identifier: Apache-2.0
// Leaf sums on the device: as a verb, and as the rows of `route` with Method::leaf. First every behaviour is marked
// (present, its norm, its leaf), then each user's rows are sorted by leaf, then leaves are summed, in float64 over runs
// of rows that are summed in float32. Histories that overlap have entries each.
#pragma once
#include "base/arena.h"
#include "cuda/device/launcher.h"
#include "cuda/histories.h"
#include "hisac/leaf_sums.h"

namespace hisac::cuda {

struct LeafTask : Behaviours {
  int64_t capacity = 0;  // entries, the rows of all histories; users whose rows do not fit have none
  int64_t sums = 0;      // rows of results
  bool missing = false;  // absent behaviours that have a v are told from the others
  int bits = 0;          // of a leaf's number
  // workspace
  int* next = nullptr;                         // the next user to take
  float* norm = nullptr;                       // [T] |x|^2 + spread; absent: kAbsent or kNothing
  uint64_t* leaf = nullptr;                    // [T]
  int64_t* first = nullptr;                    // [B + 1] a user's entries
  int64_t* leaves = nullptr;                   // [B]
  int32_t *entry = nullptr, *spare = nullptr;  // [capacity] rows by leaf
  int32_t* begin = nullptr;                    // [capacity + B] where a leaf's entries begin, then where all end
  float* weight = nullptr;                     // [capacity] of an entry
  // results
  LeafSums out;

  static constexpr float kAbsent = -1, kNothing = -2;  // without a v that is finite
};

/// Leaf sums of so many entries as the rows of `route`, in the workspace; to be summed there by t.
Histories carve_rows(const RouteCall& call, int64_t entries, Arena& arena, LeafTask* t);
/// The sums at t.out, all launches.
void sum_leaves(const LeafTask& t, Launcher& launch);
/// The last token of each user, of `rows` tokens: the mean v of its absent behaviours.
void absent_tokens(const LeafTask& t, Launcher& launch, const Tokens& out, int64_t rows);

/// Rows of all histories, as far as the host can tell: ragged ones do not overlap.
int64_t most_entries(const Histories& in, int64_t longest);

/// The most entries that fit, with all that `carve(entries, arena)` takes, in the workspace: a call does not know the
/// longest history, as its workspace function does.
template <class Carve>
int64_t entries_that_fit(const Context& context, const Histories& in, int64_t most, Carve carve) {
  if (most <= in.behaviours()) return most;
  int64_t fit = 0;
  for (int64_t step = int64_t{1} << 40; step; step /= 2) {
    Arena arena;
    if (fit + step > most) continue;
    carve(fit + step, arena);
    if (arena.used() <= static_cast<size_t>(context.workspace.shape[0])) fit += step;
  }
  return fit;
}

}  // namespace hisac::cuda
