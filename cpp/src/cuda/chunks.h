// SPDX-License-Identifier: Apache-2.0
// Behaviours in runs of one size, for gradients that histories share: a block or a warp has a run and takes, in their
// order, the users whose histories reach into it, so that histories may overlap and nothing is added by two.
#pragma once
#include "base/arena.h"
#include "cuda/device/elements.h"

namespace hisac::cuda {

struct Chunks {
  int size = 0, count = 0;
  int32_t *first = nullptr, *last = nullptr;  // [count] B - the first user, the last + 1

  /// By all threads of a launch.
  SIMT_DEVICE void clear() const {
    for (int c = simt::block() * simt::threads() + simt::thread(); c < count; c += simt::blocks() * simt::threads())
      first[c] = last[c] = 0;
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

  void carve(int64_t most, Arena& arena) {
    first = arena.take<int32_t>(most);
    last = arena.take<int32_t>(most);
  }
};

}  // namespace hisac::cuda
