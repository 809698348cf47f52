// SPDX-License-Identifier: Apache-2.0
// The inner kernel of `route`. A block takes a unit of a user's rows, a tile of agents and 64 columns of v or of x as
// the values:
//
//   warp w         agents 16 MT w .. 16 MT (w + 1) of the tile. In registers: z, logits and then weights of a step's
//                  rows; sum [16 MT, 64], max_logit and mass of each agent.
//   shared memory  the prototypes of the tile, as operands; x and values of a step's rows, in two buffers each: raw, as
//                  they lie in memory, and as operands, that is in bfloat16 parts.
//
// A step is kRows behaviours by one chunk of up to 128 columns of D. Between the barriers of steps s and s + 1:
//
//   raw buffer s % 2            the rows of step s + 2 begin to arrive (cp.async)
//   raw buffer (s + 1) % 2      the rows of step s + 1 become operands, with their norms and whether they are absent,
//   operand buffer (s + 1) % 2  here
//   operand buffer s % 2        the rows of step s are multiplied by the prototypes; after D's last chunk their logits
//                               become weights, and multiply the values
//   prototypes                  stay, if D is one chunk; else those of step s + 1 begin to arrive in one of two buffers
//
// Products start at -(|x|^2 + |p|^2) / 2, so what leaves the tensor cores is -d / 2. An absent behaviour has a logit of
// -inf whatever its product is: the clamp at 0 takes NaN away. Weights become operands without leaving their registers.
// In agents mode logits first lose their log-sum-exp over agents. Where all agents are in one tile, the warps exchange
// it; otherwise a sweep over all tiles of agents makes it, for every tile of rows.
#pragma once
#include "cuda/route_logits.h"

namespace hisac::cuda {

/// kOverAgents: the softmax is over agents, not over the history.
template <int MT, int Q, int S, bool kOverAgents>
class RouteTile : RouteLogits<MT, Q, S> {
  using Base = RouteLogits<MT, Q, S>;
  using Base::agent, Base::row_lse;
  using Base::fetch_agents, Base::fetch, Base::fetch_first_ids, Base::prepare, Base::multiply;
  using Base::t, Base::g, Base::begin, Base::end, Base::kRows, Base::floats, Base::work, Base::after, Base::unit_end;
  using typename Base::Step;
  using typename Base::Work;

 public:
  SIMT_DEVICE explicit RouteTile(const Task& task) : Base(task) {}

  SIMT_DEVICE void run() {
    each_taken(work().found, [&] { this->take_item(); }, [&] { unit(); });
  }

 private:
  SIMT_DEVICE void unit() {
    reset();
    const bool single = !kOverAgents || g.agent_tiles == 1;
    const int last = kOverAgents ? g.agent_tiles : 0;
    for (begin = work().unit.first * kTile; begin < unit_end(); begin = end) {
      end = single ? unit_end() : least(int64_t{begin} + kTile, unit_end());
      if (!single) this->begin_rows();
      SIMT_ROLLED for (int a = single ? last : 0; a <= last; ++a) {
        sweep(a);
        if (a + 1 == last) this->end_rows();
      }
    }
    end_unit();
  }

  SIMT_DEVICE bool has_rows(Step s) const { return begin + s.block * kRows < end; }

  /// Rows [begin, end) by tile `a` of agents, for the rows' log-sum-exp. Past the last tile: by the block's, for
  /// weights and sums.
  SIMT_DEVICE void sweep(int a) {
    const auto tile = [&] { return !kOverAgents || a == g.agent_tiles ? work().agent_tile : a; };
    const int64_t first = (int64_t{work().unit.user} * g.agent_tiles + tile()) * g.tile_agents;
    for (int i = simt::thread(); i < g.tile_agents; i += simt::threads()) {
      floats(g.offset.agents)[i] = t.half[first + i];
      floats(g.offset.agents)[g.tile_agents + i] = t.rate[first + i];
    }
    fetch_first_ids();
    fetch_agents({}, tile());
    fetch({});
    simt::commit();
    if (has_rows(after({}))) fetch(after({}));
    simt::commit();
    simt::template wait<1>();
    simt::sync();
    prepare({});
    Step s;
    SIMT_ROLLED while (has_rows(s)) {
      SIMT_UNLESS_PLANTED(2, simt::template wait<0>());
      SIMT_UNLESS_PLANTED(3, simt::sync());
      if (g.chunks > 1 && has_rows(after(s))) fetch_agents(after(s), tile());
      if (has_rows(after(after(s)))) fetch(after(after(s)));
      simt::commit();
      if (has_rows(after(s))) prepare(after(s));
      multiply(z, s);
      if (s.chunk + 1 == g.chunks) {
        SIMT_UNLESS_PLANTED(72, this->hide(z, s.block, tile()));
        logits(s.block & 1);
        if (kOverAgents) subtract_row_lse(s.block, a == g.agent_tiles);
        if (!kOverAgents || a == g.agent_tiles) {
          weights();
          this->accumulate(sum, z, s);
          const int so_far = begin + (s.block + 1) * kRows;
          if (so_far % kTile == 0 || so_far >= end) end_tile(so_far);
        }
      }
      s = after(s);
    }
    SIMT_UNLESS_PLANTED(4, simt::sync());
  }

  // ---- products and weights

  SIMT_DEVICE void logits(int kind) {
    const int q = simt::lane() & 3;
    SIMT_EACH (h, MT)
      SIMT_EACH (r, 2) {
        const float rate = agent(1, h, r);
        SIMT_EACH (n, kRows / 8)
          SIMT_EACH (i, 2) {
            const float add = kOverAgents ? 0.f : this->term_of(g.offset.shift, kind, n * 8 + 2 * q + i);
            z[h][n][2 * r + i] = simt::fused(rate, smaller(z[h][n][2 * r + i], 0.f), add);
          }
      }
  }

  /// z <- z + shift - row_lse; or, without `weigh`, a tile of agents is added to row_lse.
  SIMT_DEVICE void subtract_row_lse(int block, bool weigh) {
    const int q = simt::lane() & 3, kind = block & 1;
    if (g.agent_tiles == 1 || !weigh) this->sum_over_agents(z, block, !weigh);
    if (!weigh) return;
    SIMT_EACH (n, kRows / 8)
      SIMT_EACH (i, 2) {
        const int r = n * 8 + 2 * q + i;
        const float add = smaller(this->term_of(g.offset.shift, kind, r) - row_lse(block)[r], kLargest);
        SIMT_EACH (h, MT) {
          z[h][n][i] += add;
          z[h][n][2 + i] += add;
        }
      }
  }

  /// z <- 2^(z - max_logit), one step of the online softmax over rows.
  SIMT_DEVICE void weights() {
    SIMT_EACH (h, MT)
      SIMT_EACH (r, 2) {
        float maximum = max_logit[h][r];
        SIMT_EACH (n, kRows / 8) maximum = larger(maximum, larger(z[h][n][2 * r], z[h][n][2 * r + 1]));
        maximum = larger(maximum, simt::shuffle_xor(maximum, 1));
        maximum = larger(maximum, simt::shuffle_xor(maximum, 2));
        const float safe = maximum == -kInfinity ? 0.f : maximum;  // nothing yet: -inf - -inf would be NaN
        if (maximum != max_logit[h][r]) {
          const float factor = simt::exp2(max_logit[h][r] - safe);
          max_logit[h][r] = maximum;
          mass[h][r] *= factor;
          SIMT_EACH (n, kValues / 8) {
            sum[h][n][2 * r] *= factor;
            sum[h][n][2 * r + 1] *= factor;
          }
        }
        SIMT_EACH (n, kRows / 8)
          SIMT_EACH (i, 2) {
            float& y = z[h][n][2 * r + i];
            y = simt::exp2(y - safe);
            mass[h][r] += y;
          }
      }
  }

  // ---- states

  /// f(register) for every float of a state, in the order of memory.
  template <class F>
  SIMT_DEVICE void each(F f) {
    SIMT_EACH (h, MT)
      SIMT_EACH (r, 2) {
        f(max_logit[h][r]);
        f(mass[h][r]);
      }
    SIMT_EACH (h, MT)
      SIMT_EACH (c, kValues / 8)
        SIMT_EACH (i, 4) f(sum[h][c][i]);
  }

  SIMT_DEVICE void reset() {
    each([](float& y) { y = 0; });
    SIMT_EACH (h, MT) max_logit[h][0] = max_logit[h][1] = -kInfinity;
  }

  SIMT_DEVICE void write(float* to) {
    each([&](float& y) {
      *to = y;
      to += simt::threads();
    });
  }

  SIMT_DEVICE float* stacked(int n) const {
    return t.stack + (int64_t{simt::block()} * g.levels + n) * g.state_floats() + simt::thread();
  }

  /// registers <- the state of that level, merged with them.
  SIMT_DEVICE void merge_down(int level) {
    const float* from = stacked(level);
    const auto next = [&] {
      const float y = *from;
      from += simt::threads();
      return y;
    };
    Merge m[MT][2];
    SIMT_EACH (h, MT)
      SIMT_EACH (r, 2) {
        m[h][r] = Merge(next(), max_logit[h][r]);
        max_logit[h][r] = m[h][r].max_logit;
        mass[h][r] = m[h][r].sum(next(), mass[h][r]);
      }
    SIMT_EACH (h, MT)
      SIMT_EACH (c, kValues / 8) {
        SIMT_EACH (i, 4) sum[h][c][i] = m[h][i / 2].sum(next(), sum[h][c][i]);
        simt::sync_warp();  // few loads are under way together: more would need more registers
      }
  }

  /// Down the tree; the unit's last state stays in registers.
  SIMT_DEVICE void end_tile(int so_far) {
    SIMT_EACH (h, MT)
      SIMT_EACH (r, 2) mass[h][r] = over_quad(mass[h][r]);
    // as a binary counter: a state waits for every bit of how many tiles are done
    const bool last = so_far >= unit_end();
    const int before = (so_far - 1) / kTile - work().unit.first;  // tiles
    int level = simt::count_bits(static_cast<uint32_t>(before));
    const int left = last ? 0 : simt::count_bits(static_cast<uint32_t>(before + 1)) - 1;
    SIMT_ROLLED while (level > left) merge_down(--level);
    if (last) return;
    write(stacked(level));
    reset();
  }

  /// The unit's state to its slot, or the user's results.
  SIMT_DEVICE void end_unit() {
    const Work& w = work();
    if (w.unit.slot >= 0) {
      write(t.slots +
            (int64_t{w.unit.slot} * t.items() + w.value_tile * g.agent_tiles + w.agent_tile) * g.state_floats() +
            simt::thread());
      return;
    }
    const int64_t first = int64_t{w.agent_tile} * g.tile_agents + simt::warp() * 16 * MT + simt::lane() / 4;
    const int64_t column = w.values.first + (simt::lane() & 3) * 2;
    SIMT_EACH (h, MT)
      SIMT_EACH (r, 2) {
        const Row out(t, w.values.of_x, w.unit.user, first + h * 16 + r * 8, max_logit[h][r], mass[h][r]);
        if (w.value_tile == 0 && column == 0) out.finish();
        SIMT_EACH (c, kValues / 8) out.put(column + c * 8, sum[h][c][2 * r], sum[h][c][2 * r + 1]);
      }
  }

  float z[MT][kRows / 8][4], sum[MT][kValues / 8][4], max_logit[MT][2], mass[MT][2];
};

}  // namespace hisac::cuda
