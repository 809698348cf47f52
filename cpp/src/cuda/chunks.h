// SPDX-License-Identifier: Apache-2.0
// Behaviours in runs of one size, for gradients that histories share: a block or a warp has a run and takes, in their
// order, the users whose histories reach into it, so that histories may overlap and nothing is added by two. Where
// behaviours give rows to a table, those of the chunks that are reached have slots of scratch, in their order.
#pragma once
#include "base/arena.h"
#include "cuda/device/block.h"
#include "cuda/device/launcher.h"

namespace hisac::cuda {

struct Chunks {
  int size = 0, count = 0;
  int32_t *first = nullptr, *last = nullptr;  // [count] B - the first user, the last + 1
  int most = 0;                               // chunks that have slots; 0: there is no table
  int32_t* place = nullptr;    // [count + 1] of a chunk that is reached, how many are before it; how many there are
  int32_t* reached = nullptr;  // [most] the chunks that are

  /// By all threads of a launch.
  SIMT_DEVICE void clear() const {
    for (int c = simt::block() * simt::threads() + simt::thread(); c < count; c += simt::blocks() * simt::threads())
      first[c] = last[c] = 0;
  }
  /// By a warp: calls each(user) for the users whose histories have some of the behaviours [begin, end) of a run, in
  /// their order.
  template <class Each>
  SIMT_DEVICE void each_user(const ClampedSpans& s, int64_t begin, int64_t end, Each each) const {
    const int64_t c = begin / size;
    SIMT_ROLLED for (int user = static_cast<int>(s.users) - first[c]; user < last[c]; user += 32) {
      const int probe = user + simt::lane();
      uint32_t users = simt::ballot(probe < last[c] && s.start(probe) < end && begin < s.end(probe));
      SIMT_ROLLED for (; users; users &= users - 1) each(user + lowest(users));
    }
  }

  /// By all threads of a later launch: a warp has a user.
  SIMT_DEVICE void plan(const ClampedSpans& s) const {
    const int warps = simt::threads() / 32;
    for (int64_t user = int64_t{simt::block()} * warps + simt::warp(); user < s.users;
         user += int64_t{simt::blocks()} * warps) {
      const int64_t start = s.start(user), end = s.end(user);
      for (int64_t c = start / size + simt::lane(); start < end && c * size < end; c += 32) {
        simt::atomic_max(first + c, static_cast<int32_t>(s.users - user));
        simt::atomic_max(last + c, static_cast<int32_t>(user + 1));
      }
    }
  }

  /// By the only block of a launch after that. Those beyond `most` are as though no history reached them.
  SIMT_DEVICE void number() const {
    const int all = gather(
        count, [&](int c) { return last[c] > 0; },
        [&](int c, int before) {
          place[c] = before;
          if (before < most)
            reached[before] = c;
          else
            first[c] = last[c] = 0;
        });
    if (simt::thread() == 0) place[count] = all < most ? all : most;
  }
  SIMT_DEVICE int64_t slots() const { return place ? int64_t{place[count]} * size : 0; }
  SIMT_DEVICE int64_t behaviour(int64_t slot) const { return int64_t{reached[slot / size]} * size + slot % size; }
  /// What makes a behaviour of a chunk that is reached its slot.
  SIMT_DEVICE int64_t shift(int64_t c) const { return (place[c] - c) * size; }

  /// tables: whether there are any; rows: of all histories.
  void reserve_slots(bool tables, int64_t rows, int64_t users) {
    most = tables ? static_cast<int>(std::min<int64_t>(count, rows / size + 2 * users)) : 0;
  }
  /// chunks: at least count.
  void carve(int64_t chunks, Arena& arena) {
    arena.take_into(chunks, first, last);
    if (most > 0) arena.take_into(chunks + 1, place, reached);
  }
};

/// Before launch_plan_chunks.
void launch_clear_chunks(const Chunks& chunks, Launcher& launch);
void launch_plan_chunks(const ClampedSpans& spans, const Chunks& chunks, Launcher& launch);

}  // namespace hisac::cuda
