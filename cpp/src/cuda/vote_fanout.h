// SPDX-License-Identifier: Apache-2.0
// One user's votes by fan-out, by one block, where the counters of all children of kept nodes fit in shared memory: a
// level at a time from the root, one reading of the rows each. Votes of a node are those of the rows below it, whoever
// counts them, so this equals the sums from the leaves up. Nodes are numbered in the order of their codes, so cells,
// node * C + code, are too, and stand for the leaves in agent_keys. A level's cells then name the nodes: number + 1 of
// a kept child, 0 of another.
#pragma once
#include "cuda/vote_task.h"

namespace hisac::cuda {

template <bool kWeighted>
class FanoutVote {
  using Sum = VoteSum<kWeighted>;

 public:
  SIMT_DEVICE FanoutVote(const VoteTask& task, int64_t user) : t(task), b(user) {}

  SIMT_DEVICE void run() {
    uint64_t *const agent_keys = shared<uint64_t>(t.offset.area), *path = shared<uint64_t>(t.offset.nodes),
                    *next_path = path + t.seats;
    uint32_t& cursor = *shared<uint32_t>(t.offset.sums);
    if (simt::thread() == 0) path[0] = cursor = 0;
    if (kWeighted) find_scale(t, b, rows());
    int nodes = 1;
    for (int level = 0; level < t.levels; ++level) {
      const int size = static_cast<int>(t.size[level]), cells = nodes * size;
      Sum* const cell = cells_of(level);
      for (int i = simt::thread(); i < cells; i += simt::threads()) cell[i] = 0;
      SIMT_UNLESS_PLANTED(36, simt::sync());
      count(level);
      SIMT_UNLESS_PLANTED(37, simt::sync());
      const bool last = level + 1 == t.levels;
      for (int k = simt::warp(); k < nodes; k += simt::threads() / 32) {
        const int begin = k * size, end = begin + size;
        Sum all = 0;
        for (int i = begin + simt::lane(); i < end; i += 32) all += cell[i];
        for (int m = 16; m; m /= 2) all += simt::shuffle_xor(all, m);
        pick(
            begin, end, t.kept[level], all, [&](int i) { return cell[i]; },
            [&](int i, bool taken) {
              if (last)
                append(agent_keys, &cursor, taken, taken ? cell[i] : 0, i);
              else if (i < end)
                cell[i] = taken;
            });
      }
      simt::sync();
      if (last) break;
      nodes = gather(
          cells, [&](int i) { return cell[i] != 0; },
          [&](int i, int place) {
            cell[i] = static_cast<Sum>(place + 1);
            next_path[place] = path[i / size] * static_cast<uint64_t>(size) + static_cast<uint64_t>(i % size);
          });
      swap(path, next_path);
    }
    const uint32_t size = t.size[t.levels - 1];
    write_agents(t, b, agent_keys, static_cast<int>(cursor), [&](int place) {
      const uint32_t cell = static_cast<uint32_t>(place);
      return path[cell / size] * size + cell % size;
    });
  }

 private:
  SIMT_DEVICE int rows() const { return static_cast<int>(t.voters(b)); }
  SIMT_DEVICE Sum* cells_of(int level) const { return shared<Sum>(t.offset.before) + t.cells_before[level]; }

  /// The rows below kept nodes into the cells of `level`.
  SIMT_DEVICE void count(int level) const {
    Sum* const cell = cells_of(level);
    each_row<kWeighted, int>(
        t, b, rows(),
        [&](int& node, int l, uint32_t code) {  // -1: not below one; last, a cell
          if (l > level || node < 0) return;
          node = node * static_cast<int>(t.size[l]) + static_cast<int>(code);
          if (l < level) node = static_cast<int>(cells_of(l)[node]) - 1;
        },
        [&](int node, Sum votes) {
          if (votes && node >= 0) simt::atomic_add(&cell[node], votes);
        });
  }

  const VoteTask& t;
  int64_t b;
};

}  // namespace hisac::cuda
