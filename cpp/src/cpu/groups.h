// SPDX-License-Identifier: Apache-2.0
// Sparse routing of one user, as route and its backward walk through it. A user's rows are taken in the order of their
// code of level 1 (CodeOrder), in tiles of that order. A tile's rows of one code are a group, which has one list of
// agents. A group that is worth it meets the agents of its list alone, in a panel of their own. The rows of all other
// groups of the tile meet all agents together, each with a mask. Which way a group goes depends on its own sizes alone.
#pragma once
#include "base/reduction_tree.h"
#include "cpu/agent_lists.h"
#include "cpu/code_order.h"
#include "cpu/simd/pack.h"

namespace hisac::cpu {

class Groups {
 public:
  void carve(Arena& arena, int64_t agents, int64_t width) noexcept;

  /// Loads the lists of the agents of a user, whose panel is loaded; false where the user is not routed sparsely.
  bool load(const Codebook* book, const RouteAgents& agents, const CodeOrder& order, const Spans& spans, int64_t user,
            const AgentPanel& panel, int64_t k) noexcept;

  /// All rows of a tile that may be present. own(rows, n, next, columns, m) for each group with a panel of its own: `m`
  /// columns of the user's panel, and n rows, which `next` rows follow. masked(rows, n) for at most kBlock others, for
  /// which hide() is to be called.
  template <class Own, class Masked>
  void visit(const RowLoader& loader, const int64_t* rows, int64_t n, Own own, Masked masked) noexcept {
    const int64_t groups = find(loader, rows, n);
    rows_ = masks_ = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = begin_[g], size = begin_[g + 1] - first, m = list(g, groups);
      if (has_own_panel(size, m)) {
        if (m > 0) own(rows + first, size, n - first - size, static_cast<const int32_t*>(columns_), m);
        continue;
      }
      for (int64_t i = 0; i < size; ++i) {
        if (i == 0 || rows_ == 0) std::copy_n(mask_, panel_, masks_of_rows_ + masks_++ * simd::pad(panel_));
        row_[rows_] = rows[first + i];
        mask_of_[rows_++] = masks_ - 1;
        if (rows_ < simd::kBlock) continue;
        masked(static_cast<const int64_t*>(row_), rows_);
        rows_ = masks_ = 0;
      }
    }
    if (rows_ > 0) masked(static_cast<const int64_t*>(row_), rows_);
  }

  /// z [n, m] of the rows in a block of masked ones, and of the panel's columns from `first` on: -inf for the agents
  /// that a row is not routed to.
  void hide(const Block& block, int64_t first, int64_t m, float* z, int64_t ldz) const noexcept;

 private:
  /// node_, begin_ = the groups of a tile -> how many.
  int64_t find(const RowLoader& loader, const int64_t* rows, int64_t n) noexcept;
  /// mask_, columns_ = the list of group g, after that of g - 1 -> how many columns.
  int64_t list(int64_t g, int64_t groups) noexcept;
  bool has_own_panel(int64_t rows, int64_t listed) const noexcept;

  AgentLists lists_;
  int64_t k_ = 0, panel_ = 0;       // the agents of the panel
  int rows_ = 0, masks_ = 0;        // that wait for masked()
  int32_t* column_of_ = nullptr;    // [M] of each agent of the lists; -1: its temperature is not positive
  float* mask_ = nullptr;           // [pad(M)] 0 for the columns of the list, +inf for others
  int32_t* columns_ = nullptr;      // [M]
  int32_t* node_ = nullptr;         // [kTile] codes
  int64_t* begin_ = nullptr;        // [kTile + 1] first rows
  int64_t* row_ = nullptr;          // [kBlock]
  int* mask_of_ = nullptr;          // [kBlock]
  float* masks_of_rows_ = nullptr;  // [kBlock, pad(M)]
};

}  // namespace hisac::cpu
