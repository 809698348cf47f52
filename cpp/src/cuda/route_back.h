// SPDX-License-Identifier: Apache-2.0
// The inner kernels of `route_backward`: one for the gradients of rows and of the temperature, one for those of
// prototypes. Both go through blocks of R rows by phases, each with one tile of agents:
//
//   phases         rows' kernel                             prototypes' kernel
//   chunks of D    z += prototypes . x, in the end logits;  the same
//                  y += d_mean_x . x, where that is given
//   chunks of V    y += d_tokens . v; in the end weights w  the same; in the end moment += q x and total += q
//                  and distance gradients q, which go to
//                  shared memory as operands
//   chunks of V    dv = w d_tokens, by all warps
//   chunks of D    dx = q (prototypes - x), by all warps
//
//   warp w         agents 16 MT w .. 16 MT (w + 1) of the tile. In registers: z and y [16 MT, R]; for prototypes moment
//                  [16 MT, 64] too.
//   shared memory  prototypes and d_tokens of the tile, as operands; x and v of a block, raw and as operands, each in
//                  one buffer or two; for rows w and q [agents of the tile, R].
//
// Between the barriers of phases s and s + 1, as in route_tile.h: the rows of phase s + 2 begin to arrive, those of
// s + 1 become operands, those of s are multiplied. Where agents are in several tiles, agents mode sweeps over all of
// them first, for every tile of rows: for row_lse, then for the rows' sums of dz.
#pragma once
#include "cuda/route_back_task.h"
#include "cuda/route_logits.h"

namespace hisac::cuda {

/// kOverAgents: the softmax is over agents. kAgents: the prototypes' gradients, else the rows' and the temperature's.
template <int MT, int Q, int S, bool kOverAgents, bool kAgents>
class RouteBack : RouteLogits<MT, Q, S, rows_of_step(Q, kAgents), true> {
  static constexpr int R = rows_of_step(Q, kAgents), kPitch = R + 8;
  using Base = RouteLogits<MT, Q, S, R, true>;
  using Base::t, Base::g, Base::begin, Base::end, Base::floats, Base::halves, Base::work, Base::agent, Base::unit_end,
      Base::term_of;
  using typename Base::Products;
  using typename Base::Step;  // chunk: the phase
  using typename Base::Work;
  enum What { kRowLse, kRowSums, kAll };  // a sweep's: log-sum-exp over agents; sums of dz; everything

 public:
  SIMT_DEVICE explicit RouteBack(const BackTask& task) : Base(task.x), b(task), values(task.v) {}

  SIMT_DEVICE void run() {
    const auto take = [&] {
      if (kAgents) return this->take_item();
      work().value_tile = simt::atomic_add(b.next, 1);
      work().found = work().value_tile < b.chunks.count;
    };
    each_taken(work().found, take, [&] {
      if constexpr (kAgents)
        unit();
      else
        chunk();
    });
  }

 private:
  // ---- the rows of a chunk

  SIMT_DEVICE int chunk_from() const { return work().value_tile * b.chunks.size; }
  SIMT_DEVICE int chunk_to() const { return least(int64_t{chunk_from()} + b.chunks.size, t.rows); }

  SIMT_DEVICE void chunk() {
    auto* const users = reinterpret_cast<uint32_t*>(simt::shared() + b.offset.users);
    if (simt::thread() == 0) covered() = {chunk_from(), chunk_from()};
    for (int64_t a = simt::thread(); b.raw && a < b.padded(); a += simt::threads())
      b.raw[a * b.chunks.count + work().value_tile] = 0;
    SIMT_ROLLED for (int first = static_cast<int>(t.users) - b.chunks.first[work().value_tile];
                     first < b.chunks.last[work().value_tile]; first += simt::threads()) {
      const int user = first + simt::thread();
      const bool reaches = user < b.chunks.last[work().value_tile] && t.start(user) < chunk_to() &&
                           t.end(user) > chunk_from() && t.start(user) < t.end(user);
      const uint32_t reaching = simt::ballot(reaches);
      if (simt::lane() == 0) users[simt::warp()] = reaching;
      simt::sync();
      SIMT_ROLLED for (int w = 0; w < g.warps; ++w) SIMT_ROLLED for (uint32_t bits = users[w]; bits; bits &= bits - 1)
          history(first + 32 * w + lowest(bits));
      simt::sync();
    }
    simt::sync();
    clear(chunk_from(), covered().from);
    clear(covered().to, chunk_to());
  }

  /// Those rows of a chunk that hold sums of earlier users, or of agents of earlier tiles; T is below 2^31.
  struct Covered {
    int from, to;
  };
  SIMT_DEVICE Covered& covered() const {
    return *reinterpret_cast<Covered*>(simt::shared() + b.offset.users + 4 * g.warps);
  }

  /// A user's rows of the chunk.
  SIMT_DEVICE void history(int user) {
    const int start = static_cast<int>(t.start(user)), last = least(t.end(user), chunk_to());
    const int first = start > chunk_from() ? start : chunk_from();
    const Covered c = covered();
    const bool none = c.from == c.to;
    if (!none) {
      clear(c.to, first);
      clear(last, c.from);
    }
    simt::sync();
    if (simt::thread() == 0) {
      work().start = start;
      work().unit.user = user;
      covered() = {none ? first : least(c.from, last), none || c.to < first ? first : c.to};
    }
    simt::sync();
    begin = first - start;
    end = last - start;
    range();
  }

  SIMT_DEVICE void clear(int from, int to) const {
    const int chunk = work().value_tile;
    const auto zero = [&](float* p, int64_t width, bool gathers) {
      if (!p || (gathers && b.chunks.last[chunk] == 0)) return;
      float* const first = p + (from + (gathers ? b.chunks.shift(chunk) : 0)) * width;
      const int n = static_cast<int>((to - from) * width);  // of a chunk, at most
      SIMT_ROLLED for (int i = simt::thread(); i < n; i += simt::threads()) first[i] = 0;
    };
    zero(b.out.v.data, b.v.x.width, b.of_v.gathers());
    zero(b.out.x.data, t.x.width, b.of_x.gathers());
    zero(b.out.bias.data, 1, false);
    zero(b.out.spread.data, 1, false);
  }

  // ---- rows by agents

  SIMT_DEVICE bool several() const { return kOverAgents && g.agent_tiles > 1; }

  /// Rows [begin, end), at most kTile of them where several() sums are kept.
  SIMT_DEVICE void range() {
    values.begin = begin;
    values.end = end;
    float* const bias = floats(b.offset.row_bias);
    if (several()) {
      this->begin_rows();
      for (int r = simt::thread(); r < kTile; r += simt::threads()) bias[r] = 0;
    }
    SIMT_ROLLED for (what = several() ? kRowLse : kAll; what <= kAll; ++what) {
      const bool one = kAgents && what == kAll;
      SIMT_ROLLED for (tile = one ? work().agent_tile : 0; tile < (one ? work().agent_tile + 1 : g.agent_tiles); ++tile)
          sweep();
      if (what == kRowLse) this->end_rows();
    }
  }

  SIMT_DEVICE int outputs_v() const { return !kAgents && b.out.v.data ? values.g.chunks : 0; }
  SIMT_DEVICE int outputs_x() const { return !kAgents && b.out.x.data ? g.chunks : 0; }
  SIMT_DEVICE int phases() const {
    const int outputs = outputs_v() + outputs_x();
    return g.chunks + (what == kRowLse ? 0 : values.g.chunks) + (kAgents || what != kAll ? 0 : outputs ? outputs : 1);
  }
  SIMT_DEVICE Step next(Step s) const {
    return s.chunk + 1 < phases() ? Step{s.block, s.chunk + 1} : Step{s.block + 1, 0};
  }
  SIMT_DEVICE bool has_rows(Step s) const { return begin + s.block * R < end; }

  SIMT_DEVICE void fetch_rows(Step s) {
    if (s.chunk < g.chunks)
      this->fetch(s);
    else if (s.chunk < g.chunks + values.g.chunks)
      values.fetch({s.block, s.chunk - g.chunks});
  }
  SIMT_DEVICE void prepare_rows(Step s) {
    if (s.chunk < g.chunks)
      this->prepare(s);
    else if (s.chunk < g.chunks + values.g.chunks)
      values.prepare({s.block, s.chunk - g.chunks});
  }
  /// Where agents do not stay: those of a phase. Two buffers take turns, in the outputs' phases too.
  SIMT_DEVICE void fetch_parts(Step s) {
    const int c = s.chunk - g.chunks, o = c - values.g.chunks, x = o - outputs_v();
    if (c < 0 ? g.chunks > 1 : x >= 0 && x < outputs_x() && g.chunks > 1)
      this->fetch_agents({s.block, c < 0 ? s.chunk : x}, tile);
    else if (c >= 0 && (o < 0 || x < 0) && values.g.chunks > 1)
      values.fetch_agents(o < 0 ? Step{s.block, c} : Step{s.block + 1, o}, tile);
  }

  SIMT_DEVICE void sweep() {
    const int64_t first = int64_t{work().unit.user} * b.padded() + int64_t{tile} * g.tile_agents;
    const float* const sources[] = {t.half, t.rate, b.agent_lse, b.dz_constant, b.slope};
    SIMT_EACH (k, 5)
      for (int i = simt::thread(); i < g.tile_agents; i += simt::threads())
        floats(g.offset.agents)[k * g.tile_agents + i] = sources[k][first + i];
    if (!kAgents)
      SIMT_EACH (h, MT) total[h][0] = total[h][1] = 0;
    if (g.chunks == 1) this->fetch_agents({}, tile);
    if (values.g.chunks == 1) values.fetch_agents({}, tile);
    SIMT_UNLESS_PLANTED(61, this->fetch_first_ids());
    SIMT_UNLESS_PLANTED(62, values.fetch_first_ids());
    Step s{0, -2};
    SIMT_ROLLED while (has_rows(s)) {
      const Step s1 = next(s), s2 = next(s1);
      const bool goes_on = has_rows(s1) && s1.chunk >= 0;
      SIMT_UNLESS_PLANTED(43, simt::template wait<0>());
      SIMT_UNLESS_PLANTED(44, simt::sync());
      if (goes_on) fetch_parts(s1);
      if (has_rows(s2)) fetch_rows(s2);
      simt::commit();
      if (goes_on) prepare_rows(s1);
      const int c = s.chunk - g.chunks, o = c - values.g.chunks;
      if (s.chunk < 0) {
        // the first rows are on their way
      } else if (c < 0) {
        this->multiply(z, s);
        if (s.chunk == 0) clear(y);
        if (g.sides > 1 && what != kRowLse) this->multiply_step(y, s, 1);
        if (c == -1) logits(s.block);
      } else if (o < 0) {
        values.multiply_step(y, {s.block, c});
        if (o == -1) gradients(s.block);
      } else {
        output(s.block, o);
      }
      s = s1;
    }
    if (!kAgents && what == kAll) end_sweep();
    SIMT_UNLESS_PLANTED(42, simt::sync());
  }

  static SIMT_DEVICE void clear(Products& products) {
    SIMT_EACH (h, MT)
      SIMT_EACH (n, R / 8)
        SIMT_EACH (i, 4) products[h][n][i] = 0;
  }

  /// z: logits in base 2, 0 or less.
  SIMT_DEVICE void logits(int block) {
    SIMT_UNLESS_PLANTED(73, this->hide(z, block, tile));
    SIMT_EACH (h, MT)
      SIMT_EACH (r, 2) {
        const float rate = agent(1, h, r);
        SIMT_EACH (n, R / 8)
          SIMT_EACH (i, 2) z[h][n][2 * r + i] = rate * smaller(z[h][n][2 * r + i], 0.f);
      }
    if (kOverAgents && (g.agent_tiles == 1 || what == kRowLse)) this->sum_over_agents(z, block, what == kRowLse);
  }

  SIMT_DEVICE float shift(int block, int row) const { return term_of(g.offset.shift, block & 1, row); }
  /// What makes a logit of a row one of its user's softmax.
  SIMT_DEVICE float add(int block, int row) const {
    return smaller(shift(block, row) - (kOverAgents ? this->row_lse(block)[row] : 0.f), kLargest);
  }

  /// The warps' sums of a row over agents: 0: of dz, 1: of q.
  SIMT_DEVICE float* sums(int warp, int which) const { return floats(b.offset.sums) + (2 * warp + which) * R; }
  SIMT_DEVICE float sum_of(int which, int row) const {
    float sum = 0;
    for (int w = 0; w < g.warps; ++w) sum += sums(w, which)[row];
    return sum;
  }
  SIMT_DEVICE void sum_agents(int which) const {
    const int q = simt::lane() & 3;
    SIMT_EACH (n, R / 8)
      SIMT_EACH (i, 2) {
        float sum = 0;
        SIMT_EACH (h, MT) sum += y[h][n][i] + y[h][n][2 + i];
        for (int m = 4; m < 32; m *= 2) sum += simt::shuffle_xor(sum, m);
        if (simt::lane() < 4) sums(simt::warp(), which)[n * 8 + 2 * q + i] = sum;
        simt::sync_warp();
      }
  }

  /// z, y <- w, q, from logits and dtoken . v + dmean_x . x. Absent rows, and agents that are absent or have no mass
  /// (lse is inf for all of them), get 0 whatever it is multiplied with.
  SIMT_DEVICE void gradients(int block);

  // ---- the rows' gradients

  /// An operand [Q, agents, rows].
  SIMT_DEVICE void put_operand(uint16_t* to, const Products& from) const {
    SIMT_EACH (h, MT)
      SIMT_EACH (r, 2)
        SIMT_EACH (n, R / 8) {
          const float* const pair = &from[h][n][2 * r];
          uint16_t* const target = to + (simt::warp() * 16 * MT + h * 16 + r * 8 + simt::lane() / 4) * kPitch + n * 8 +
                                   2 * (simt::lane() & 3);
          uint32_t low;
          *reinterpret_cast<uint32_t*>(target) =
              Q > 1 ? bf16_parts(pair[0], pair[1], &low) : simt::pack(pair[0], pair[1]);
          if (Q > 1) *reinterpret_cast<uint32_t*>(target + g.tile_agents * kPitch) = low;
        }
  }

  /// shift: of the place of a row in `to`.
  SIMT_DEVICE void put(float* to, int row, int64_t shift, int64_t width, int64_t column, float value) const {
    float& sum = to[(row + shift) * width + column];
    sum = row >= covered().from && row < covered().to ? sum + value : value;
  }

  /// What a phase of outputs multiplies: weights or slopes by columns of d_tokens or prototypes.
  struct Output {
    const uint16_t* left;
    Operand<Q> right;
    float* to;
    int64_t shift, width;
    int columns, column;  // in shared memory; the first
    bool of_x;
  };

  /// Columns of dv, then of dx; the first phase has bias and spread too.
  SIMT_DEVICE void output(int block, int phase) {
    const int rows = least(end - begin - block * R, R);
    for (int r = simt::thread(); phase == 0 && r < rows; r += simt::threads()) {
      const int behaviour = static_cast<int>(work().start) + begin + block * R + r;
      if (b.out.bias.data) put(b.out.bias.data, behaviour, 0, 1, 0, sum_of(0, r));
      if (b.out.spread.data) put(b.out.spread.data, behaviour, 0, 1, 0, -0.5f * sum_of(1, r));
    }
    const int x = phase - outputs_v();
    if (x >= outputs_x()) return;
    const auto columns_of = [&](const auto& stream, int left, float* to, const TableGradient& table, Step s) -> Output {
      const int column = s.chunk * stream.g.chunk;
      const int64_t shift = table.gathers() ? b.chunks.shift(work().value_tile) : 0;
      return {halves(left), stream.prototypes(s), to, shift, stream.t.x.width, stream.columns(s.chunk), column, x >= 0};
    };
    Output out;
    if (x < 0)
      out = columns_of(values, b.offset.weights, b.out.v.data, b.of_v, {block + 1, phase});
    else
      out = columns_of(*this, b.offset.slopes, b.out.x.data, b.of_x, {block, x});
    const int wide = (out.columns + 31) / 32;
    SIMT_ROLLED for (int i = simt::warp(); i < R / 16 * wide; i += g.warps)
        multiply_weights(out, block, rows, i / wide * 16, i % wide * 32);
  }

  /// 16 rows by 32 columns, summed over the agents.
  SIMT_DEVICE void multiply_weights(const Output& out, int block, int rows, int row, int column) const;

  SIMT_DEVICE void end_sweep() {
    if (b.raw)
      SIMT_EACH (h, MT)
        SIMT_EACH (r, 2) {
          const float sum = over_quad(total[h][r]);
          const int64_t a = int64_t{tile} * g.tile_agents + simt::warp() * 16 * MT + h * 16 + r * 8 + simt::lane() / 4;
          if ((simt::lane() & 3) == 0) b.raw[a * b.chunks.count + work().value_tile] += sum;
        }
    const int first = static_cast<int>(work().start) + begin, last = static_cast<int>(work().start) + end;
    simt::sync();
    if (simt::thread() == 0) covered() = {least(covered().from, first), covered().to > last ? covered().to : last};
  }

  // ---- the prototypes' gradients

  SIMT_DEVICE void unit() {
    reset();
    for (begin = work().unit.first * kTile; begin < unit_end(); begin = end) {
      end = least(int64_t{begin} + kTile, unit_end());
      range();
      end_tile();
    }
    const Work& w = work();
    if (w.unit.slot >= 0) {
      write(t.slots +
            (int64_t{w.unit.slot} * t.items() + w.value_tile * g.agent_tiles + w.agent_tile) * b.state_floats());
      return;
    }
    const int64_t first = int64_t{w.agent_tile} * g.tile_agents + simt::warp() * 16 * MT + simt::lane() / 4;
    const int64_t column = int64_t{w.value_tile} * kValues + (simt::lane() & 3) * 2;
    SIMT_EACH (h, MT)
      SIMT_EACH (c, kValues / 8)
        SIMT_EACH (i, 4)
          b.put_prototype(w.unit.user, first + h * 16 + i / 2 * 8, column + c * 8 + i % 2, moment[h][c][i],
                          total[h][i / 2]);
  }

  /// f(register) for every float of a state, in the order of memory.
  template <class F>
  SIMT_DEVICE void each(F f) {
    SIMT_EACH (h, MT)
      SIMT_EACH (r, 2) f(total[h][r]);
    SIMT_EACH (h, MT)
      SIMT_EACH (c, kValues / 8)
        SIMT_EACH (i, 4) f(moment[h][c][i]);
  }
  SIMT_DEVICE void reset() {
    each([](float& f) { f = 0; });
  }
  SIMT_DEVICE void write(float* to) {
    to += simt::thread();
    each([&](float& f) {
      *to = f;
      to += simt::threads();
    });
  }

  /// Down the tree, as a binary counter; the unit's last state stays in registers.
  SIMT_DEVICE void end_tile() {
    SIMT_EACH (h, MT)
      SIMT_EACH (r, 2) total[h][r] = over_quad(total[h][r]);
    const bool last = end >= unit_end();
    const int before = (end - 1) / kTile - work().unit.first;  // tiles
    int level = simt::count_bits(static_cast<uint32_t>(before));
    const int left = last ? 0 : simt::count_bits(static_cast<uint32_t>(before + 1)) - 1;
    float* const stack = t.stack + int64_t{simt::block()} * g.levels * b.state_floats();
    SIMT_ROLLED while (level > left) {
      const float* from = stack + --level * b.state_floats() + simt::thread();
      each([&](float& f) {
        f += *from;
        from += simt::threads();
        simt::sync_warp();  // one load at a time: more would need more registers
      });
    }
    if (last) return;
    write(stack + level * b.state_floats());
    reset();
  }

  const BackTask& b;
  RouteStream<MT, Q, S, R, true> values;
  int what = kAll, tile = 0;
  Products z, y;
  float total[MT][2];  // of a thread's agents: dz times logits, or q
  float moment[MT][kAgents ? kValues / 8 : 1][4];
};

}  // namespace hisac::cuda
