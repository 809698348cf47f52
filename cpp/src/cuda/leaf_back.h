// SPDX-License-Identifier: Apache-2.0
// What the gradients of leaves' mean v give to behaviours. A warp has 32 behaviours and takes, in their order, the
// users whose histories hold some of them, so that histories may overlap and nothing is added by two warps.
#pragma once
#include "cuda/leaf_sums.h"
#include "cuda/route_back_task.h"

namespace hisac::cuda {

/// T, B and the sums are below 2^31.
struct LeafBack {
  LeafTask t;
  BackTask b;  // of the leaves: dv [sums, V]
  float* dv;   // [T, V]

  SIMT_DEVICE void run() const {
    const int warps = simt::threads() / 32, lane = simt::lane();
    SIMT_ROLLED for (int w = simt::block() * warps + simt::warp(); w < b.windows.count; w += simt::blocks() * warps) {
      const int first = w * 32, count = least(t.rows - first, 32), last = b.windows.last[w];
      const Behaviour behaviour{first + lane, lane < count ? t.norm[first + lane] : t.kNothing,
                                lane < count ? t.leaf[first + lane] : 0};
      uint32_t given = 0;  // those that hold a sum
      SIMT_ROLLED for (int user = static_cast<int>(t.users) - b.windows.first[w]; user < last; user += 32) {
        const int probe = user + lane;
        uint32_t users = simt::ballot(probe < last && t.start(probe) < first + count && t.end(probe) > first &&
                                      t.start(probe) < t.end(probe));
        SIMT_ROLLED for (; users; users &= users - 1) given = give(user + lowest(users), behaviour, given);
      }
      for (int i = 0; i < count; ++i)
        for (int c = lane; !(given >> i & 1) && c < width(); c += 32) dv[int64_t{first + i} * width() + c] = 0;
    }
  }

 private:
  struct Behaviour {
    int row;
    float norm;
    uint64_t leaf;
  };
  SIMT_DEVICE int width() const { return static_cast<int>(t.v.width); }

  /// Adds what a user's history holds of a warp's behaviours, a lane each; `given`, with these.
  SIMT_DEVICE uint32_t give(int user, const Behaviour& behaviour, uint32_t given) const {
    const int64_t first = t.first[user];
    const int sums = static_cast<int>(t.out.offsets.data[user]);
    const int leaves = static_cast<int>(t.out.offsets.data[user + 1]) - sums;
    const auto leaf_of = [&](int g) { return t.leaf[t.entry[first + t.begin[first + user + g]]]; };
    int g = 0;  // the last leaf that is not above its own
    SIMT_ROLLED for (int left = leaves; left > 1; left -= left / 2) if (leaf_of(g + left / 2) <= behaviour.leaf) g +=
        left / 2;
    const bool reached = behaviour.row >= t.start(user) && behaviour.row < t.end(user);
    const bool here = reached && behaviour.norm >= 0 && leaves > 0 && leaf_of(g) == behaviour.leaf;
    float weight = 0;
    if (here)
      weight = simt::exp2(((t.bias ? t.bias[behaviour.row] : 0.f) - t.out.bias.data[sums + g]) * kLog2e);
    else if (reached && t.missing && behaviour.norm == t.kAbsent)
      SIMT_UNLESS_PLANTED(64, weight = b.absent[user]);
    const uint32_t present = simt::ballot(here);
    SIMT_ROLLED for (uint32_t left = simt::ballot(weight != 0); left; left &= left - 1) {
      const int lane = lowest(left);
      const float factor = simt::shuffle(weight, lane);
      const bool of_leaf = present >> lane & 1, more = given >> lane & 1;
      const int leaf = sums + simt::shuffle(g, lane);
      const int64_t from = of_leaf ? leaf : int64_t{user} * b.token_rows() + b.x.agents;
      float* const to = dv + (behaviour.row - simt::lane() + lane) * int64_t{width()};
      for (int c = simt::lane(); c < width(); c += 32) {
        const int64_t i = from * width() + c;
        const float d = of_leaf ? b.out.v.data[i] : element(b.forward.d_tokens.data, b.forward.d_tokens.dtype, i);
        to[c] = simt::fused(factor, d, more ? to[c] : 0.f);
      }
      SIMT_UNLESS_PLANTED(63, given |= 1u << lane);
    }
    return given;
  }
};

}  // namespace hisac::cuda
