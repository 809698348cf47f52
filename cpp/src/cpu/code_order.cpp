// SPDX-License-Identifier: Apache-2.0
#include "cpu/code_order.h"

#include <algorithm>
#include <numeric>

#include "base/parallel.h"
#include "base/radix_sort.h"
#include "cpu/agent_lists.h"

namespace hisac::cpu {

void CodeOrder::carve(Arena& arena, const Histories& in, int64_t nodes, int workers) noexcept {
  arena.take_into(in.offsets.users, begin_, groups_);
  order_ = arena.take<int64_t>(in.rows);
  worker_ = arena.take_each<Worker>(workers, [&](Worker& one) {
    arena.take_into(in.longest, one.key, one.spare_key, one.row, one.spare_row);
    one.seen = arena.take<uint64_t>(nodes / 64 + 1);
  });
}

void CodeOrder::sort(const Context& context, const RowLoader& loader, const Histories& in, const RouteAgents& agents,
                     int64_t sparse) noexcept {
  int64_t total = 0;
  for (int64_t b = 0; b < in.offsets.users; ++b) {
    begin_[b] = total;
    total += in.offsets.end(b) - in.offsets.start(b);
  }
  const auto nodes = static_cast<uint64_t>(loader.nodes());
  const int bits = bits_of(nodes);
  parallel_for(context, in.offsets.users, [&](int64_t first, int64_t last, int w) {
    for (int64_t b = first; b < last; ++b) {
      Worker s = worker_[w];  // radix_sort swaps
      const int64_t start = in.offsets.start(b), n = in.offsets.end(b) - start;
      groups_[b] = 1;
      if (!is_sparse(n, 1, count_of(agents, b), sparse)) continue;  // nor with more groups, nor with fewer agents
      groups_[b] = 0;
      std::fill_n(s.seen, nodes / 64 + 1, uint64_t{0});
      for (int64_t i = 0; i < n; ++i) {
        const uint64_t node = s.key[i] = static_cast<uint64_t>(loader.node_of(start + i));
        const uint64_t bit = uint64_t{1} << node % 64, before = s.seen[node / 64];
        groups_[b] += node < nodes && !(before & bit);
        s.seen[node / 64] = before | bit;
      }
      if (!is_sparse(n, groups_[b], count_of(agents, b), sparse)) continue;
      std::iota(s.row, s.row + n, start);
      radix_sort<true>(n, 0, bits, s.key, s.spare_key, s.row, s.spare_row);
      std::copy_n(s.row, n, order_ + begin_[b]);
    }
  });
}

}  // namespace hisac::cpu
