// SPDX-License-Identifier: Apache-2.0
// The inner kernel of `route`: a warp holds 16 MT agents, a block up to 16 warps; rows stream through shared memory.
//
// A step is `rows` behaviours by one chunk of D. Step s: raw rows of s + 2 begin to arrive (cp.async), those of s + 1
// are made into operands (any type to bfloat16 parts, norms, absence), step s is multiplied; one barrier. Products
// start at -(|x|^2 + |p|^2) / 2, so what leaves the tensor cores is -d / 2. A behaviour that is absent has a logit of
// -inf whatever its product is: the clamp at 0 takes NaN away. Weights become operands without leaving their registers.
// In agents mode logits first lose their log-sum-exp over agents: exchanged between the warps where all agents are in
// one tile, from a sweep over all agent tiles for every tile of rows otherwise.
#pragma once
#include "cuda/route_agents.h"

namespace hisac::cuda {

/// kShares: agents mode.
template <int MT, int Q, int S, bool kShares>
class RouteTile : RouteAgents<MT, Q, S> {
  using Base = RouteAgents<MT, Q, S>;
  using Base::buffer_of, Base::operand_v, Base::agent, Base::place, Base::row_lse;
  using Base::fetch_agents, Base::fetch, Base::fetch_first_ids, Base::prepare, Base::multiply;
  using Base::t, Base::g, Base::begin, Base::end, Base::kRows, Base::floats, Base::work, Base::after;
  using typename Base::Step;
  using typename Base::Work;

 public:
  SIMT_DEVICE explicit RouteTile(const Task& task) : Base(task) {}

  SIMT_DEVICE void run() {
    Work& w = *reinterpret_cast<Work*>(simt::shared() + g.at.work);
    for (;;) {
      if (simt::thread() == 0) {
        const int item = simt::atomic_add(&t.plan->next, 1), unit = item / t.items();
        w.some = unit < t.plan->units;
        if (w.some) {
          w.unit = t.unit[unit];
          w.start = t.start(w.unit.user);
          w.rows = static_cast<int32_t>(t.end(w.unit.user) - w.start);
          w.own = item % t.items() % g.agent_tiles;
          w.values = item % t.items() / g.agent_tiles;
        }
      }
      simt::sync();
      if (!w.some) return;
      unit();
      SIMT_UNLESS_PLANTED(1, simt::sync());
    }
  }

 private:
  SIMT_DEVICE int unit_end() const { return least(int64_t{work().unit.last} * kTile, work().rows); }
  SIMT_DEVICE void unit() {
    reset();
    const bool single = !kShares || g.agent_tiles == 1;
    const int last = kShares ? g.agent_tiles : 0;
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

  SIMT_DEVICE bool some(Step s) const { return begin + s.block * kRows < end; }

  /// Rows [begin, end) by one tile of agents, only to the rows' sums over agents; past the last by the block's own, to
  /// weights and sums.
  SIMT_DEVICE void sweep(int a) {
    const auto tile = [&] { return !kShares || a == g.agent_tiles ? work().own : a; };
    const int64_t first = (int64_t{work().unit.user} * g.agent_tiles + tile()) * g.tile_agents;
    for (int i = simt::thread(); i < g.tile_agents; i += simt::threads()) {
      floats(g.at.agents)[i] = t.half[first + i];
      floats(g.at.agents)[g.tile_agents + i] = t.rate[first + i];
    }
    fetch_first_ids();
    fetch_agents({}, tile());
    fetch({});
    simt::commit();
    if (some(after({}))) fetch(after({}));
    simt::commit();
    simt::template wait<1>();
    simt::sync();
    prepare({});
    Step s;
    SIMT_ROLLED while (some(s)) {
      SIMT_UNLESS_PLANTED(2, simt::template wait<0>());
      SIMT_UNLESS_PLANTED(3, simt::sync());
      if (g.chunks > 1 && some(after(s))) fetch_agents(after(s), tile());
      if (some(after(after(s)))) fetch(after(after(s)));
      simt::commit();
      if (some(after(s))) prepare(after(s));
      multiply(z, s);
      if (s.chunk + 1 == g.chunks) {
        logits(s.block & 1);
        if (kShares) share(s.block, a == g.agent_tiles);
        if (!kShares || a == g.agent_tiles) {
          weights();
          this->accumulate(sum, z, operand_v(buffer_of(s)), t.value_width());
          absent(s.block & 1, buffer_of(s));
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
            const float add = kShares ? 0.f : floats(g.at.shift)[kind * kRows + n * 8 + 2 * q + i];
            z[h][n][2 * r + i] = simt::fused(rate, smaller(z[h][n][2 * r + i], 0.f), add);
          }
      }
  }

  /// z <- z + shift - lse over agents, or their sums are kept.
  SIMT_DEVICE void share(int block, bool weigh) {
    const int q = simt::lane() & 3, kind = block & 1;
    if (g.agent_tiles == 1 || !weigh) this->over_agents(z, block, !weigh);
    if (!weigh) return;
    SIMT_EACH (n, kRows / 8)
      SIMT_EACH (i, 2) {
        const int r = n * 8 + 2 * q + i;
        const float add = smaller(floats(g.at.shift)[kind * kRows + r] - row_lse(block)[r], kLargest);
        SIMT_EACH (h, MT) {
          z[h][n][i] += add;
          z[h][n][2 + i] += add;
        }
      }
  }

  /// z <- 2^(z - top), one step of the online softmax over rows.
  SIMT_DEVICE void weights() {
    SIMT_EACH (h, MT)
      SIMT_EACH (r, 2) {
        float peak = top[h][r];
        SIMT_EACH (n, kRows / 8) peak = larger(peak, larger(z[h][n][2 * r], z[h][n][2 * r + 1]));
        peak = larger(peak, simt::shuffle_xor(peak, 1));
        peak = larger(peak, simt::shuffle_xor(peak, 2));
        const float safe = peak == -kInfinity ? 0.f : peak;  // nothing yet: -inf - -inf would be NaN
        if (peak != top[h][r]) {
          const float factor = simt::exp2(top[h][r] - safe);
          top[h][r] = peak;
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

  /// Absent rows that have a v, one column a thread.
  SIMT_DEVICE void absent(int kind, int buffer) {
    if (!t.missing || t.refining || work().own != 0 || simt::thread() >= kValues) return;
    const uint16_t* const v = operand_v(buffer) + simt::thread();
    for (int r = 0; r < kRows; ++r) {
      if (floats(g.at.gone)[kind * kRows + r] == 0.f) continue;
      float y = of_bfloat16(v[r * kValuePitch]);
      if (S > 1) y += of_bfloat16(v[(kRows + r) * kValuePitch]);
      floats(g.at.absent)[simt::thread()] += y;
      floats(g.at.absent)[simt::threads() + simt::thread()] += 1;
    }
  }

  // ---- states

  /// f(register) for every float of a state, in the order of memory.
  template <class F>
  SIMT_DEVICE void each(F f) {
    SIMT_EACH (h, MT)
      SIMT_EACH (r, 2) {
        f(top[h][r]);
        f(mass[h][r]);
      }
    SIMT_EACH (h, MT)
      SIMT_EACH (c, kValues / 8)
        SIMT_EACH (i, 4) f(sum[h][c][i]);
    for (int i = 0; t.missing && i < 2; ++i) f(floats(g.at.absent)[i * simt::threads() + simt::thread()]);
  }

  SIMT_DEVICE void reset() {
    each([](float& y) { y = 0; });
    SIMT_EACH (h, MT) top[h][0] = top[h][1] = -kInfinity;
  }

  SIMT_DEVICE float* stacked(int n) const {
    return t.stack + (int64_t{simt::block()} * g.levels + n) * g.state_floats() + simt::thread();
  }

  /// registers <- the state before it, merged with them.
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
        m[h][r] = Merge(next(), top[h][r]);
        top[h][r] = m[h][r].top;
        mass[h][r] = m[h][r].of(next(), mass[h][r]);
      }
    SIMT_EACH (h, MT)
      SIMT_EACH (c, kValues / 8) {
        SIMT_EACH (i, 4) sum[h][c][i] = m[h][i / 2].of(next(), sum[h][c][i]);
        simt::sync_warp();  // few loads under way at a time, for want of registers
      }
    for (int i = 0; t.missing && i < 2; ++i) floats(g.at.absent)[i * simt::threads() + simt::thread()] += next();
  }

  /// Down the tree; the unit's last state stays in registers.
  SIMT_DEVICE void end_tile(int so_far) {
    SIMT_EACH (h, MT)
      SIMT_EACH (r, 2) {
        mass[h][r] += simt::shuffle_xor(mass[h][r], 1);
        mass[h][r] += simt::shuffle_xor(mass[h][r], 2);
      }
    // as a binary counter: a state waits for every bit of how many tiles are done
    const bool last = so_far >= unit_end();
    const int before = (so_far - 1) / kTile - work().unit.first;  // tiles
    int level = simt::count_bits(static_cast<uint32_t>(before));
    const int left = last ? 0 : simt::count_bits(static_cast<uint32_t>(before + 1)) - 1;
    SIMT_ROLLED while (level > left) merge_down(--level);
    if (last) return;
    float* to = stacked(level);
    each([&](float& y) {
      *to = y;
      to += simt::threads();
    });
    reset();
  }

  /// The unit's state to its slot, or the user's results.
  SIMT_DEVICE void end_unit() {
    const Work& w = work();
    if (w.unit.slot >= 0) {
      float* to = t.slots + (int64_t{w.unit.slot} * t.items() + w.values * g.agent_tiles + w.own) * g.state_floats() +
                  simt::thread();
      each([&](float& y) {
        *to = y;
        to += simt::threads();
      });
      return;
    }
    const int64_t first = int64_t{w.own} * g.tile_agents + simt::warp() * 16 * MT + simt::lane() / 4;
    const int64_t column = int64_t{w.values} * kValues + (simt::lane() & 3) * 2;
    SIMT_EACH (h, MT)
      SIMT_EACH (r, 2) {
        const Row out(t, w.unit.user, first + h * 16 + r * 8, top[h][r], mass[h][r]);
        if (column == 0) out.finish();
        SIMT_EACH (c, kValues / 8) out.put(column + c * 8, sum[h][c][2 * r], sum[h][c][2 * r + 1]);
      }
    if (t.missing && w.own == 0 && simt::thread() < kValues)
      finish_missing(t, w.unit.user, int64_t{w.values} * kValues + simt::thread(),
                     floats(g.at.absent)[simt::threads() + simt::thread()], floats(g.at.absent)[simt::thread()]);
  }

  float z[MT][kRows / 8][4], sum[MT][kValues / 8][4], top[MT][2], mass[MT][2];
};

}  // namespace hisac::cuda
