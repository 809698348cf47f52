// SPDX-License-Identifier: Apache-2.0
#include "cpu/groups.h"

#include <algorithm>

namespace hisac::cpu {

void Groups::carve(Arena& arena, int64_t agents, int64_t width) noexcept {
  lists_.carve(arena, agents, width);
  arena.take_into(agents, column_of_, columns_);
  mask_ = arena.take<float>(simd::pad(agents));
  node_ = arena.take<int32_t>(kTile);
  begin_ = arena.take<int64_t>(kTile + 1);
  arena.take_into(simd::kBlock, row_, mask_of_);
  masks_of_rows_ = arena.take<float>(simd::kBlock, simd::pad(agents));
}

bool Groups::load(const Codebook* book, const RouteAgents& agents, const CodeOrder& order, const Spans& spans,
                  int64_t user, const AgentPanel& panel, int64_t k) noexcept {
  const int64_t rows = spans.end(user) - spans.start(user);
  if (k == 0 || !is_sparse(rows, order.groups(user), count_of(agents, user), k)) return false;
  lists_.load(*book, agents, user);
  if (!is_sparse(rows, order.groups(user), lists_.present(), k)) return false;
  k_ = k;
  panel_ = panel.m;
  for (int64_t j = 0, column = 0; j < lists_.present(); ++j) {
    const bool here = column < panel.m && panel.index[column] == lists_.index()[j];
    column_of_[j] = here ? static_cast<int32_t>(column++) : -1;
  }
  return true;
}

int64_t Groups::find(const RowLoader& loader, const int64_t* rows, int64_t n) noexcept {
  int64_t groups = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t node = loader.node_of(rows[i]);
    if (node == loader.nodes()) n = i;  // invalid codes are the last
    if (i == n || (groups > 0 && node_[groups - 1] == node)) continue;
    begin_[groups] = i;
    node_[groups++] = static_cast<int32_t>(node);
  }
  begin_[groups] = n;
  return groups;
}

int64_t Groups::list(int64_t g, int64_t groups) noexcept {
  const int number = static_cast<int>(g % simd::kBlock);
  if (number == 0) lists_.measure(node_ + g, static_cast<int>(std::min<int64_t>(simd::kBlock, groups - g)));
  lists_.find(number, k_, mask_);
  for (int64_t j = 0; j < lists_.present(); ++j)
    if (column_of_[j] >= 0) mask_[column_of_[j]] = mask_[j];
  return simd::kernels().columns_below(panel_, mask_, 0, columns_);
}

bool Groups::has_own_panel(int64_t rows, int64_t listed) const noexcept {
  // in steps of a product of a row, an agent and a column: a panel costs about 16 for each of its columns, and a fixed
  // part, to be selected, packed and added
  const int64_t padded = (rows + simd::kRowStep - 1) / simd::kRowStep * simd::kRowStep;
  return padded * (simd::pad(panel_) - simd::pad(listed)) > 16 * simd::pad(listed) + 512;
}

void Groups::hide(const Block& block, int64_t first, int64_t m, float* z, int64_t ldz) const noexcept {
  for (int i = 0, given = 0; i < block.n; ++i, ++given) {
    while (row_[given] != block.row[i]) ++given;  // absent rows are not in the block
    const float* const mask = masks_of_rows_ + mask_of_[given] * simd::pad(panel_) + first;
    simd::kernels().add_row(m, mask, -1.f, z + i * ldz);
  }
}

}  // namespace hisac::cpu
