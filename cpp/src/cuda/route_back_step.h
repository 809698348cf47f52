// SPDX-License-Identifier: Apache-2.0
// The two longest steps of route_back.h: from logits and products with the gradients of tokens to weights and slopes,
// and from those to columns of the rows' gradients.
#pragma once
#include "cuda/route_back.h"

namespace hisac::cuda {

template <int MT, int Q, int S, bool kShares, bool kAgents>
SIMT_DEVICE void RouteBack<MT, Q, S, kShares, kAgents>::gradients(int block) {
  const int q = simt::lane() & 3;
  float top[MT][2], with[MT][2];  // of agents: lse; the rest of a dz, then its slope
  SIMT_EACH (h, MT)
    SIMT_EACH (r, 2) {
      top[h][r] = agent(2, h, r);
      with[h][r] = agent(3, h, r);
    }
  SIMT_EACH (n, R / 8) {
    SIMT_EACH (i, 2) {
      const int row = n * 8 + 2 * q + i;
      const bool some = shift(block, row) != -kInfinity;
      const float plus = add(block, row);
      SIMT_EACH (h, MT)
        SIMT_EACH (r, 2) {
          float& dz = y[h][n][2 * r + i];
          const float w = simt::exp2(z[h][n][2 * r + i] + plus - top[h][r]);
          dz = some && top[h][r] != kInfinity ? w * (dz + with[h][r]) : 0.f;
        }
      simt::sync_warp();  // one column after another, for want of registers
    }
  }
  if (kShares || (!kAgents && b.d_bias)) sum_agents(0);
  float* const bias = floats(b.at.row_bias) + (several() ? block * R : 0);
  if (kShares && (!several() || what == kSums)) {
    SIMT_UNLESS_PLANTED(45, simt::sync());
    for (int r = simt::thread(); r < R; r += simt::threads()) bias[r] = (several() ? bias[r] : 0.f) + sum_of(0, r);
    if (what == kSums) return;
    SIMT_UNLESS_PLANTED(46, simt::sync());
  }
  SIMT_EACH (h, MT)
    SIMT_EACH (r, 2) with[h][r] = agent(4, h, r);
  SIMT_EACH (n, R / 8) {
    SIMT_EACH (i, 2) {
      const int row = n * 8 + 2 * q + i;
      const bool some = shift(block, row) != -kInfinity;
      const float plus = add(block, row), less = kShares ? this->row_lse(block)[row] : 0.f;
      SIMT_EACH (h, MT)
        SIMT_EACH (r, 2) {
          float &w = z[h][n][2 * r + i], &dz = y[h][n][2 * r + i];
          const float logit = larger(w, -3e38f);  // 0 times -inf would be NaN
          if (kShares && some && top[h][r] != kInfinity) dz -= simt::exp2(w - less) * bias[row];
          if (!kAgents) total[h][r] = simt::fused(dz, logit, total[h][r]);
          w = simt::exp2(w + plus - top[h][r]);
          dz *= with[h][r];
          if (kAgents) total[h][r] += dz;
        }
      simt::sync_warp();
    }
  }
  if constexpr (kAgents)
    return this->accumulate(moment, y, this->operand_v(this->buffer_of({block, g.chunks - 1})), t.x.width);
  if (b.dv) put_operand(halves(b.at.weights), z);
  if (!b.dx) return;
  put_operand(halves(b.at.slopes), y);
  sum_agents(1);
}

template <int MT, int Q, int S, bool kShares, bool kAgents>
SIMT_DEVICE void RouteBack<MT, Q, S, kShares, kAgents>::multiply_weights(const Output& out, int block, int rows,
                                                                         int row, int column) const {
  float sum[4][4] = {};
  const int lane = simt::lane();
  const uint16_t* const left = out.left + ((lane >> 4) * 8 + (lane & 7)) * kPitch + row + (lane & 8);
  const uint16_t* const right = out.right + place(out.pitch) + column;
  SIMT_ROLLED for (int k = 0; k < g.tile_agents; k += 16) {
    uint32_t a[Q][4];
    SIMT_EACH (part, Q) simt::load_matrices_transposed(a[part], left + (part * g.tile_agents + k) * kPitch);
    SIMT_EACH (n, 2) {
      if (column + n * 16 >= out.columns) continue;
      SIMT_EACH (other, Q) {
        uint32_t p[4];
        simt::load_matrices_transposed(p, right + (other * g.tile_agents + k) * out.pitch + n * 16);
        SIMT_EACH (part, Q - other) {
          simt::multiply_add(sum[2 * n], a[part], p[0], p[1]);
          simt::multiply_add(sum[2 * n + 1], a[part], p[2], p[3]);
        }
      }
    }
  }
  SIMT_EACH (r, 2) {
    const int at = row + r * 8 + lane / 4;
    if (at >= rows) continue;
    const int behaviour = static_cast<int>(work().start) + begin + block * R + at;
    const bool here = shift(block, at) != -kInfinity;
    const float weight = out.of_x ? sum_of(1, at) : 0.f;
    const int64_t x_row = out.of_x && here ? this->row_of(false, block, at) : 0;
    const float scale = this->scale() && out.of_x ? t.scale[t.scales ? x_row : 0] : 1.f;
    SIMT_EACH (n, 4)
      SIMT_EACH (i, 2) {
        const int local = column + n * 8 + 2 * (lane & 3) + i;
        const int64_t d = out.column + local;
        if (local >= out.columns || d >= out.width) continue;
        float value = here ? sum[n][2 * r + i] : out.of_x ? 0.f : absent(block, at, d);
        if (here && out.of_x) value -= element(t.x.data, t.x.dtype, x_row * t.x.width + d) * scale * weight;
        put(out.to, behaviour, out.width, d, value);
      }
  }
}

}  // namespace hisac::cuda
