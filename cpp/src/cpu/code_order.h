// SPDX-License-Identifier: Apache-2.0
// The behaviours of each user in the order of their code of level 1, of equal codes in their own order.
#pragma once
#include "base/arena.h"
#include "cpu/blocks.h"
#include "cpu/histories.h"

namespace hisac::cpu {

class CodeOrder {
 public:
  void carve(Arena& arena, const Histories& in, int64_t nodes, int workers) noexcept;

  /// Counts the codes of all users, and sorts the behaviours of those that may be routed sparsely.
  void sort(const Context& context, const RowLoader& loader, const Histories& in, const RouteAgents& agents,
            int64_t sparse) noexcept;

  /// Of a user that may be routed sparsely: all of its rows.
  const int64_t* of(int64_t user) const noexcept { return order_ + begin_[user]; }
  /// The codes of level 1 that a user's behaviours have.
  int64_t groups(int64_t user) const noexcept { return groups_[user]; }

 private:
  struct Worker {
    uint64_t *key, *spare_key;  // [longest]
    int64_t *row, *spare_row;   // [longest]
    uint64_t* seen;             // a bit for each code
  };

  int64_t* begin_ = nullptr;   // [B] of a user, in order_
  int64_t* groups_ = nullptr;  // [B]
  int64_t* order_ = nullptr;   // [rows]
  Worker* worker_ = nullptr;
};

}  // namespace hisac::cpu
