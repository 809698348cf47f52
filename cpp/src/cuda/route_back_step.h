// SPDX-License-Identifier: Apache-2.0
// The two longest steps of route_back.h: from logits and products with the gradients of tokens and of mean x to weights
// and slopes, and from those to columns of the rows' gradients.
#pragma once
#include "cuda/route_back.h"

namespace hisac::cuda {

template <int MT, int Q, int S, bool kOverAgents, bool kAgents>
SIMT_DEVICE void RouteBack<MT, Q, S, kOverAgents, kAgents>::gradients(int block) {
  const int q = simt::lane() & 3;
  float lse[MT][2], term[MT][2];  // of agents: lse; the rest of a dz, then its slope
  SIMT_EACH (h, MT)
    SIMT_EACH (r, 2) {
      lse[h][r] = agent(2, h, r);
      term[h][r] = agent(3, h, r);
    }
  SIMT_EACH (n, R / 8) {
    SIMT_EACH (i, 2) {
      const int row = n * 8 + 2 * q + i;
      const bool present = shift(block, row) != -kInfinity;
      const float row_term = add(block, row);
      SIMT_EACH (h, MT)
        SIMT_EACH (r, 2) {
          float& dz = y[h][n][2 * r + i];
          const float w = simt::exp2(z[h][n][2 * r + i] + row_term - lse[h][r]);
          dz = present && lse[h][r] != kInfinity ? w * (dz + term[h][r]) : 0.f;
        }
      simt::sync_warp();  // one column after another, for want of registers
    }
  }
  if (kOverAgents || (!kAgents && b.out.bias.data)) sum_agents(0);
  float* const bias = floats(b.offset.row_bias) + (several() ? block * R : 0);
  if (kOverAgents && (!several() || what == kRowSums)) {
    SIMT_UNLESS_PLANTED(45, simt::sync());
    for (int r = simt::thread(); r < R; r += simt::threads()) bias[r] = (several() ? bias[r] : 0.f) + sum_of(0, r);
    if (what == kRowSums) return;
    SIMT_UNLESS_PLANTED(46, simt::sync());
  }
  SIMT_EACH (h, MT)
    SIMT_EACH (r, 2) term[h][r] = agent(4, h, r);
  SIMT_EACH (n, R / 8) {
    SIMT_EACH (i, 2) {
      const int row = n * 8 + 2 * q + i;
      const bool present = shift(block, row) != -kInfinity;
      const float row_term = add(block, row), log_sum = kOverAgents ? this->row_lse(block)[row] : 0.f;
      SIMT_EACH (h, MT)
        SIMT_EACH (r, 2) {
          float &w = z[h][n][2 * r + i], &dz = y[h][n][2 * r + i];
          const float logit = larger(w, -3e38f);  // 0 times -inf would be NaN
          if (kOverAgents && present && lse[h][r] != kInfinity) dz -= simt::exp2(w - log_sum) * bias[row];
          if (!kAgents) total[h][r] = simt::fused(dz, logit, total[h][r]);
          w = simt::exp2(w + row_term - lse[h][r]);
          dz *= term[h][r];
          if (kAgents) total[h][r] += dz;
        }
      simt::sync_warp();
    }
  }
  if constexpr (kAgents) return this->accumulate(moment, y, {block, g.chunks - 1});
  if (b.out.v.data) put_operand(halves(b.offset.weights), z);
  if (b.out.x.data) put_operand(halves(b.offset.slopes), y);
  if (b.out.x.data || b.out.spread.data) sum_agents(1);
}

template <int MT, int Q, int S, bool kOverAgents, bool kAgents>
SIMT_DEVICE void RouteBack<MT, Q, S, kOverAgents, kAgents>::multiply_weights(const Output& out, int block, int rows,
                                                                             int row, int column) const {
  float sum[4][4] = {};
  const int lane = simt::lane();
  const uint16_t* const left = out.left + ((lane >> 4) * 8 + (lane & 7)) * kPitch + row + (lane & 8);
  SIMT_ROLLED for (int k = 0; k < g.tile_agents; k += 16) {
    uint32_t a[Q][4];
    SIMT_EACH (part, Q) simt::load_matrices_transposed(a[part], left + (part * g.tile_agents + k) * kPitch);
    SIMT_EACH (n, 2) {
      if (column + n * 16 >= out.columns) continue;
      SIMT_EACH (other, Q) {
        uint32_t p[4];
        simt::load_matrices_transposed(p, out.right.place(other, k, column + n * 16));
        SIMT_EACH (part, Q - other) {
          simt::multiply_add(sum[2 * n], a[part], p[0], p[1]);
          simt::multiply_add(sum[2 * n + 1], a[part], p[2], p[3]);
        }
      }
    }
  }
  SIMT_EACH (r, 2) {
    const int step_row = row + r * 8 + lane / 4;
    if (step_row >= rows) continue;
    const int behaviour = static_cast<int>(work().start) + begin + block * R + step_row;
    const bool here = shift(block, step_row) != -kInfinity;
    const float weight = out.of_x ? sum_of(1, step_row) : 0.f;
    const int64_t x_row = out.of_x && here ? this->row_of(false, block, step_row) : 0;
    const float scale = this->scale() && out.of_x ? t.scale[t.scale_per_row ? x_row : 0] : 1.f;
    SIMT_EACH (n, 4)
      SIMT_EACH (i, 2) {
        const int local = column + n * 8 + 2 * (lane & 3) + i;
        const int64_t d = out.column + local;
        if (local >= out.columns || d >= out.width) continue;
        float value = here ? sum[n][2 * r + i] : 0.f;
        if (here && out.of_x) value -= element(t.x.data, t.x.dtype, x_row * t.x.width + d) * scale * weight;
        put(out.to, behaviour, out.shift, out.width, d, value);
      }
  }
}

}  // namespace hisac::cuda
