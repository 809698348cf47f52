// SPDX-License-Identifier: Apache-2.0
// Agents in registers by rows in shared memory: half squared distances from tensor cores, and what a row's logits of
// all agents add up to. A lane has agents lane / 4 (+ 8) of every 16 and the rows 2 (lane % 4) (+ 1) of every 8.
#pragma once
#include "cuda/route_stream.h"

namespace hisac::cuda {

template <int MT, int Q, int S, int R = 64 / S, bool kBack = false>
class RouteLogits : protected RouteStream<MT, Q, S, R, kBack> {
  using Base = RouteStream<MT, Q, S, R, kBack>;

 protected:
  using Base::t, Base::g, Base::floats, Base::agent;
  using typename Base::Step;
  using Products = float[MT][R / 8][4];

  SIMT_DEVICE explicit RouteLogits(const Task& task) : Base(task) {}

  /// sum [agents, kValues] += w [agents, rows] times the step's values.
  SIMT_DEVICE void accumulate(float (&sum)[MT][kValues / 8][4], const Products& w, Step s) const {
    const Operand<S> v{this->operand_v(this->buffer_of(s)), kValuePitch, R * kValuePitch};
    const int columns = least(this->values().width - this->work().values.first, kValues);
    multiply_weights<MT, Q, kValues / 8>(sum, w, v, R, columns);
  }

  /// z = -d / 2, after the last chunk.
  SIMT_DEVICE void multiply(Products& z, Step s) const {
    const int q = simt::lane() & 3, kind = s.block & 1;
    if (s.chunk == 0 || s.chunk + 1 == g.chunks)
      SIMT_EACH (h, MT)
        SIMT_EACH (r, 2) {
          const float agent_half = agent(0, h, r);
          SIMT_EACH (n, R / 8)
            SIMT_EACH (i, 2) {
              const float row_half =
                  s.chunk + 1 == g.chunks ? this->term_of(g.offset.half, kind, n * 8 + 2 * q + i) : 0.f;
              float& y = z[h][n][2 * r + i];
              y = g.chunks == 1 ? row_half + agent_half : s.chunk == 0 ? 0.f : y + (row_half + agent_half);
            }
        }
    this->multiply_step(z, s);
  }

  /// z = -inf where sparse routing does not route a row to an agent of a tile.
  SIMT_DEVICE void hide(Products& z, int block, int tile) const {
    if (!t.mask_words) return;
    const int q = simt::lane() & 3, first = tile * g.tile_agents + simt::warp() * 16 * MT, word = first / 32;
    SIMT_EACH (n, R / 8)
      SIMT_EACH (i, 2) {
        const int32_t node = this->node_of(block & 1, n * 8 + 2 * q + i);
        const int64_t mask = int64_t{this->work().unit.user} * t.sizes[0] + node;
        const bool any = node >= 0 && word < t.mask_words;
        const uint32_t agents = any ? t.masks[mask * t.mask_words + word] >> (first % 32 + simt::lane() / 4) : 0;
        SIMT_EACH (h, MT)
          SIMT_EACH (r, 2)
            if (!(agents >> (16 * h + 8 * r) & 1)) z[h][n][2 * r + i] = -kInfinity;
        simt::sync_warp();  // one column after another, for want of registers
      }
  }

  /// The log-sum-exp over agents of a step's rows. While tiles of agents are added, it is the rows' largest logits, and
  /// kTile further on their sums.
  SIMT_DEVICE float* row_lse(int block) const { return floats(g.offset.row_lse) + (g.agent_tiles > 1 ? block * R : 0); }

  /// Adds the warps' largest logits and sums of every row to row_lse. partly: other tiles of agents are to come.
  SIMT_DEVICE void sum_over_agents(const Products& z, int block, bool partly) const {
    const int q = simt::lane() & 3;
    float* const kept = row_lse(block);
    float *const cross = floats(g.offset.cross), *const warp_sums = cross + simt::warp() * 2 * R + 2 * q;
    SIMT_EACH (n, R / 8)
      SIMT_EACH (i, 2) {
        float row_max = -kInfinity, total = 0;
        SIMT_EACH (h, MT) row_max = larger(row_max, larger(z[h][n][i], z[h][n][2 + i]));
        for (int m = 4; m < 32; m *= 2) row_max = larger(row_max, simt::shuffle_xor(row_max, m));
        const float safe = row_max == -kInfinity ? 0.f : row_max;
        SIMT_EACH (h, MT) total += simt::exp2(z[h][n][i] - safe) + simt::exp2(z[h][n][2 + i] - safe);
        for (int m = 4; m < 32; m *= 2) total += simt::shuffle_xor(total, m);
        if (simt::lane() < 4) {
          warp_sums[n * 8 + i] = row_max;
          warp_sums[R + n * 8 + i] = total;
        }
        simt::sync_warp();  // one column after another: together they need more registers than there are
      }
    SIMT_UNLESS_PLANTED(6, simt::sync());
    for (int r = simt::thread(); r < R; r += simt::threads()) {
      float row_max = -kInfinity, total = 0;
      for (int w = 0; w < g.warps; ++w) row_max = larger(row_max, cross[2 * w * R + r]);
      const float before = partly ? kept[r] : -kInfinity, safe = larger(larger(row_max, before), -kLargest);
      for (int w = 0; w < g.warps; ++w) total += cross[(2 * w + 1) * R + r] * simt::exp2(cross[2 * w * R + r] - safe);
      if (partly) {
        kept[r] = larger(row_max, before);
        kept[kTile + r] = simt::fused(kept[kTile + r], simt::exp2(before - safe), total);
      } else {
        kept[r] = row_max == -kInfinity ? 0.f : row_max + simt::log2(total);
      }
    }
    SIMT_UNLESS_PLANTED(7, simt::sync());
  }

  /// The rows before the first tile of agents, and after the last.
  SIMT_DEVICE void begin_rows() const {
    float* const kept = floats(g.offset.row_lse);
    for (int r = simt::thread(); r < kTile; r += simt::threads()) {
      kept[r] = -kInfinity;
      kept[kTile + r] = 0;
    }
  }
  SIMT_DEVICE void end_rows() const {
    float* const kept = floats(g.offset.row_lse);
    for (int r = simt::thread(); r < kTile; r += simt::threads())
      kept[r] = kept[r] == -kInfinity ? 0.f : kept[r] + simt::log2(kept[kTile + r]);
    simt::sync();
  }
};

}  // namespace hisac::cuda
