// SPDX-License-Identifier: Apache-2.0
// The inner kernel of `route`: a warp holds 16 MT agents, a block up to 14 warps; rows stream through shared memory.
//
// A step is `rows` behaviours by one chunk of D. Step s: raw rows of s + 2 begin to arrive (cp.async), those of s + 1 are
// made into operands (any type to bfloat16 parts, norms, absence), step s is multiplied; one barrier. Products
// start at -(|x|^2 + |p|^2) / 2, so what leaves the tensor cores is -d / 2. A behaviour that is absent has a logit of -inf
// whatever its product is: the clamp at 0 takes NaN away. Weights become operands without leaving their registers.
// In agents mode logits first lose their log-sum-exp over agents: exchanged between the warps where all agents are in one
// tile, from a sweep over all agent tiles for every tile of rows otherwise.
#pragma once
#include "route_task.h"

namespace hisac::cuda {

template <int MT, int Q, int S>
class RouteTile {
 public:
  static constexpr int kRows = 64 / S;

  SIMT_DEVICE explicit RouteTile(const Task& task) : t(task), g(task.g) {}

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
  /// What the block has taken.
  struct Work {
    int64_t start;  // the user's first row; others count from it
    Unit unit;
    int32_t some, rows, own, values;  // the tile of agents, of value columns
  };
  static_assert(sizeof(Work) <= kWorkBytes, "Work has its place");
  SIMT_DEVICE const Work& work() const { return *reinterpret_cast<const Work*>(simt::shared() + g.at.work); }

  // in shared memory: from offsets that lie in constant memory, so that no register holds a pointer
  static SIMT_DEVICE float* floats(int offset) { return reinterpret_cast<float*>(simt::shared() + offset); }
  static SIMT_DEVICE uint16_t* halves(int offset) { return reinterpret_cast<uint16_t*>(simt::shared() + offset); }
  SIMT_DEVICE int pitch() const { return g.chunk + 8; }
  SIMT_DEVICE int agents_size() const { return Q * g.tile_agents * pitch(); }  // elements of a buffer of each kind
  SIMT_DEVICE int rows_size() const { return S * kRows * pitch(); }
  SIMT_DEVICE uint16_t* prototypes(int buffer) const { return halves(g.at.prototypes) + buffer * agents_size(); }
  SIMT_DEVICE uint16_t* operand_x(int buffer) const { return halves(g.at.x) + buffer * rows_size(); }
  SIMT_DEVICE uint16_t* operand_v(int buffer) const { return halves(g.at.v) + buffer * (S * kRows * kValuePitch); }
  SIMT_DEVICE std::byte* raw_x(int buffer, int row) const {
    return simt::shared() + g.at.raw_x + (buffer * kRows + row) * g.chunk * bytes_of(t.x.dtype);
  }
  SIMT_DEVICE std::byte* raw_v(int buffer, int row) const {
    return simt::shared() + g.at.raw_v + (buffer * kRows + row) * kValues * bytes_of(t.values().dtype);
  }
  /// What is known of this thread's agent: 0: half its norm, 1: its rate.
  SIMT_DEVICE float agent(int what, int h, int r) const {
    return floats(g.at.agents)[what * g.tile_agents + simt::warp() * 16 * MT + h * 16 + r * 8 + simt::lane() / 4];
  }
  SIMT_DEVICE float& raw_bias(int buffer, int row) const { return floats(g.at.bias)[buffer * kRows + row]; }
  SIMT_DEVICE int32_t* raw_codes(int buffer, int row) const {
    return reinterpret_cast<int32_t*>(simt::shared() + g.at.codes) + (buffer * kRows + row) * t.levels;
  }

  struct Step {
    int block = 0, chunk = 0;  // of rows, of columns
  };
  SIMT_DEVICE Step after(Step s) const {
    return s.chunk + 1 < g.chunks ? Step{s.block, s.chunk + 1} : Step{s.block + 1, 0};
  }
  SIMT_DEVICE int buffer_of(Step s) const { return (s.block * g.chunks + s.chunk) & 1; }
  SIMT_DEVICE int columns(int chunk) const { return least(g.depth - chunk * g.chunk, g.chunk); }

  SIMT_DEVICE int unit_end() const { return least(int64_t{work().unit.last} * kTile, work().rows); }
  SIMT_DEVICE void unit() {
    reset();
    const int from = work().unit.first * kTile, to = unit_end();
    float* const row_lse = floats(g.at.row_lse);
    const bool single = !t.shares || g.agent_tiles == 1;
    for (int i = from; i < to;) {
      const int next = single ? to : least(int64_t{i} + kTile, to);
      for (int r = simt::thread(); !single && r < kTile; r += simt::threads()) {
        row_lse[r] = -kInfinity;
        row_lse[kTile + r] = 0;
      }
      SIMT_ROLLED for (int a = single ? g.agent_tiles : 0; a <= g.agent_tiles; ++a) {
        const bool weigh = a == g.agent_tiles;
        sweep(i, next, weigh ? work().own : a, weigh);
        if (weigh || a + 1 < g.agent_tiles) continue;
        for (int r = simt::thread(); r < kTile; r += simt::threads())
          row_lse[r] = row_lse[r] == -kInfinity ? 0.f : row_lse[r] + simt::log2(row_lse[kTile + r]);
        simt::sync();
      }
      i = next;
    }
    end_unit();
  }

  /// Rows [from, to) by one tile of agents; `weigh`: to weights and sums, else only to the rows' sums over agents.
  SIMT_DEVICE void sweep(int from, int to, int agent_tile, bool weigh) {
    begin = from;
    end = to;
    const int blocks = (to - from + kRows - 1) / kRows;
    const int64_t agent = (int64_t{work().unit.user} * g.agent_tiles + agent_tile) * g.tile_agents;
    for (int a = simt::thread(); a < g.tile_agents; a += simt::threads()) {
      floats(g.at.agents)[a] = t.half[agent + a];
      floats(g.at.agents)[g.tile_agents + a] = t.rate[agent + a];
    }
    fetch_agents({}, agent_tile);
    fetch({});
    simt::commit();
    if (after({}).block < blocks) fetch(after({}));
    simt::commit();
    simt::template wait<1>();
    simt::sync();
    prepare({});
    Step s;
    SIMT_ROLLED while (s.block < blocks) {
      SIMT_UNLESS_PLANTED(2, simt::template wait<0>());
      SIMT_UNLESS_PLANTED(3, simt::sync());
      if (g.chunks > 1 && after(s).block < blocks) fetch_agents(after(s), agent_tile);
      if (after(after(s)).block < blocks) fetch(after(after(s)));
      simt::commit();
      if (after(s).block < blocks) prepare(after(s));
      multiply(s);
      if (s.chunk + 1 == g.chunks) {
        logits(s.block & 1);
        if (t.shares) over_agents(s.block, weigh);
        if (weigh) {
          weights();
          accumulate(buffer_of(s));
          absent(s.block & 1, buffer_of(s));
          const int so_far = begin + (s.block + 1) * kRows;
          if (so_far % kTile == 0 || s.block + 1 == blocks) end_tile(so_far);
        }
      }
      s = after(s);
    }
    SIMT_UNLESS_PLANTED(4, simt::sync());
  }

  // ---- rows in

  SIMT_DEVICE void fetch_agents(Step s, int agent_tile) {
    const int buffer = g.chunks > 1 ? buffer_of(s) : 0, pieces = columns(s.chunk) / 8, lane = simt::lane() & 15;
    const uint16_t* const from = t.packed + (int64_t{work().unit.user} * g.agent_tiles + agent_tile) * Q * g.tile_agents * g.depth +
                                 s.chunk * g.chunk;
    SIMT_ROLLED for (int r = simt::thread() / 16; r < Q * g.tile_agents; r += simt::threads() / 16)
      if (lane < pieces)
        simt::copy16(prototypes(buffer) + r * pitch() + lane * 8, from + int64_t{r} * g.depth + lane * 8, true);
  }

  /// Columns [first, first + n) of a row, raw; zero beyond the matrix.
  SIMT_DEVICE void fetch_row(std::byte* to, const Rows& m, bool aligned, int64_t row, int first, int n, bool valid,
                             int piece) {
    const int bytes = bytes_of(m.dtype), per = 16 / bytes;
    if (piece * per >= n) return;
    const int64_t column = first + piece * per;
    const std::byte* const from = static_cast<const std::byte*>(m.data) + (row * m.width + column) * bytes;
    if (aligned) {
      const bool some = valid && column < m.width;
      simt::copy16(to + piece * 16, some ? from : static_cast<const std::byte*>(m.data), some);
      return;
    }
    for (int e = 0; e < per; ++e) {
      const bool some = valid && column + e < m.width;
      if (bytes == 4)
        reinterpret_cast<float*>(to + piece * 16)[e] = some ? reinterpret_cast<const float*>(from)[e] : 0.f;
      else
        reinterpret_cast<uint16_t*>(to + piece * 16)[e] =
            some ? reinterpret_cast<const uint16_t*>(from)[e] : uint16_t{0};
    }
  }

  SIMT_DEVICE void fetch(Step s) {
    const int buffer = buffer_of(s), lane = simt::lane() & 15, x_bytes = bytes_of(t.x.dtype), v_bytes = bytes_of(t.values().dtype);
    const bool last = s.chunk + 1 == g.chunks;
    const int x_pieces = columns(s.chunk) * x_bytes / 16, v_pieces = last ? kValues * v_bytes / 16 : 0;
    SIMT_ROLLED for (int r = simt::thread() / 16; r < kRows; r += simt::threads() / 16) {
      const int place = begin + s.block * kRows + r;
      const int64_t row = work().start + place;
      const bool valid = place < end;
      SIMT_ROLLED for (int c = lane; c < x_pieces + v_pieces; c += 16)
        if (c < x_pieces)
          fetch_row(raw_x(buffer, r), t.x, t.x_aligned, row, s.chunk * g.chunk,
                    columns(s.chunk), valid, c);
        else
          fetch_row(raw_v(buffer, r), t.values(), t.values_aligned(), row,
                    work().values * kValues, kValues, valid, c - x_pieces);
      if (!last) continue;
      if (t.bias && lane == 0) simt::copy4(&raw_bias(buffer, r), valid ? t.bias + row : t.bias, valid);
      for (int l = lane; l < t.levels; l += 16)
        simt::copy4(raw_codes(buffer, r) + l, valid ? t.codes + row * t.levels + l : t.codes, valid);
    }
  }

  /// 16 lanes a row: raw to operands; with the last chunk the row's norm, shift and absence.
  SIMT_DEVICE void prepare(Step s) {
    const int buffer = buffer_of(s), lane = simt::lane() & 15, kind = s.block & 1;
    const bool last = s.chunk + 1 == g.chunks;
    SIMT_ROLLED for (int r = simt::thread() / 16; r < kRows; r += simt::threads() / 16) {
      float f[8] = {}, squares = 0;
      if (lane * 8 < columns(s.chunk)) {
        load8(raw_x(buffer, r) + lane * 8 * bytes_of(t.x.dtype), t.x.dtype, f);
        SIMT_UNROLL for (int i = 0; i < 8; ++i) squares = simt::fused(f[i], f[i], squares);
        put<false>(f, operand_x(buffer) + r * pitch() + lane * 8, kRows * pitch());
      }
      SIMT_UNROLL for (int m = 8; m; m /= 2) squares += simt::shuffle_xor(squares, m);
      float& norm = floats(g.at.norm)[r];
      if (s.chunk > 0) squares += norm;
      if (!last) {
        simt::sync_warp();
        if (lane == 0) norm = squares;
        continue;
      }
      const int place = begin + s.block * kRows + r;
      const int64_t row = work().start + place;
      const bool inside = place < end;
      const float bias = t.bias ? raw_bias(buffer, r) : 0.f;
      bool here = inside && finite(bias) && below_limit(squares, t.x.data, t.x.dtype, row, t.x.width);
      for (int l = 0; l < t.levels; ++l)
        here = here && static_cast<uint32_t>(raw_codes(buffer, r)[l]) < static_cast<uint32_t>(t.sizes[l]);
      bool whole = true;
      if (t.missing && g.value_tiles > 1 && inside && !here)  // a row's v counts whole or not at all
        for (int64_t c = lane; c < t.v.width; c += 16) whole = whole && finite(element(t.v.data, t.v.dtype, row * t.v.width + c));
      if (lane < kValues / 8) {
        load8(raw_v(buffer, r) + lane * 8 * bytes_of(t.values().dtype), t.values().dtype, f);
        SIMT_UNROLL for (int i = 0; i < 8; ++i) whole = whole && finite(f[i]);
      }
      const uint32_t broken = simt::ballot(!whole) >> (simt::lane() & 16) & 0xffffu;
      if (lane < kValues / 8) {
        SIMT_UNLESS_PLANTED(5, SIMT_UNROLL for (int i = 0; i < 8; ++i) f[i] = here || !broken ? f[i] : 0.f);
        put<true>(f, operand_v(buffer) + r * kValuePitch + lane * 8, kRows * kValuePitch);
      }
      if (lane == 0) {
        floats(g.at.half)[kind * kRows + r] = here ? -0.5f * squares : 0.f;
        floats(g.at.shift)[kind * kRows + r] = here ? base2(bias) : -kInfinity;
        floats(g.at.gone)[kind * kRows + r] = inside && !here ? 1.f : 0.f;
      }
    }
  }

  /// Eight floats as S operands, `apart` elements from one to the next.
  template <bool any>
  SIMT_DEVICE void put(const float (&f)[8], uint16_t* to, int apart) {
    simt::Quad high, low;
    SIMT_UNROLL for (int i = 0; i < 4; ++i)
      high.word[i] = any ? split_any(f[2 * i], f[2 * i + 1], &low.word[i]) : split(f[2 * i], f[2 * i + 1], &low.word[i]);
    *reinterpret_cast<simt::Quad*>(to) = high;
    if (S > 1) *reinterpret_cast<simt::Quad*>(to + apart) = low;
  }

  // ---- products and weights

  SIMT_DEVICE void multiply(Step s) {
    const int buffer = buffer_of(s), q = simt::lane() & 3, kind = s.block & 1;
    if (s.chunk == 0 || s.chunk + 1 == g.chunks)
      SIMT_UNROLL for (int h = 0; h < MT; ++h)
        SIMT_UNROLL for (int r = 0; r < 2; ++r) {
          const float theirs = agent(0, h, r);
          SIMT_UNROLL for (int n = 0; n < kRows / 8; ++n)
            SIMT_UNROLL for (int i = 0; i < 2; ++i) {
              const float mine = s.chunk + 1 == g.chunks ? floats(g.at.half)[kind * kRows + n * 8 + 2 * q + i] : 0.f;
              float& y = z[h][n][2 * r + i];
              y = g.chunks == 1 ? mine + theirs : s.chunk == 0 ? 0.f : y + (mine + theirs);
            }
        }
    const uint16_t* const p = prototypes(g.chunks > 1 ? buffer : 0) +
                              (simt::warp() * 16 * MT + (simt::lane() & 15)) * pitch() + (simt::lane() >> 4) * 8;
    const uint16_t* const x = operand_x(buffer) + ((simt::lane() & 7) + (simt::lane() >> 4) * 8) * pitch() +
                              (simt::lane() >> 3 & 1) * 8;
    const int depth = columns(s.chunk);
    SIMT_ROLLED for (int k = 0; k < depth; k += 16) {
      uint32_t a[Q][MT][4];
      SIMT_UNROLL for (int part = 0; part < Q; ++part)
        SIMT_UNROLL for (int h = 0; h < MT; ++h)
          simt::load_matrices(a[part][h], p + (part * g.tile_agents + h * 16) * pitch() + k);
      SIMT_UNROLL for (int n = 0; n < kRows / 16; ++n)
        SIMT_UNROLL for (int stored = 0; stored < S; ++stored) {
          uint32_t b[4];
          simt::load_matrices(b, x + (stored * kRows + n * 16) * pitch() + k);
          SIMT_UNROLL for (int part = 0; part + stored < Q; ++part)
            SIMT_UNROLL for (int h = 0; h < MT; ++h) {
              simt::multiply_add(z[h][2 * n], a[part][h], b[0], b[1]);
              simt::multiply_add(z[h][2 * n + 1], a[part][h], b[2], b[3]);
            }
        }
    }
  }

  SIMT_DEVICE void logits(int kind) {
    const int q = simt::lane() & 3;
    SIMT_UNROLL for (int h = 0; h < MT; ++h)
      SIMT_UNROLL for (int r = 0; r < 2; ++r) {
        const float rate = agent(1, h, r);
        SIMT_UNROLL for (int n = 0; n < kRows / 8; ++n)
          SIMT_UNROLL for (int i = 0; i < 2; ++i) {
            const float add = t.shares ? 0.f : floats(g.at.shift)[kind * kRows + n * 8 + 2 * q + i];
            z[h][n][2 * r + i] = simt::fused(rate, smaller(z[h][n][2 * r + i], 0.f), add);
          }
      }
  }

  /// The warps' largest logits and sums of every row meet; then z <- z + shift - lse, or the sums are kept.
  SIMT_DEVICE void over_agents(int block, bool weigh) {
    const int q = simt::lane() & 3, kind = block & 1;
    const bool known = g.agent_tiles > 1 && weigh;
    float* const kept = floats(g.at.row_lse) + (g.agent_tiles > 1 ? begin % kTile + block * kRows : 0);
    float *const cross = floats(g.at.cross), *const mine = cross + simt::warp() * 2 * kRows + 2 * q;
    if (!known) {
      SIMT_UNROLL for (int n = 0; n < kRows / 8; ++n)
        SIMT_UNROLL for (int i = 0; i < 2; ++i) {
          float peak = -kInfinity, total = 0;
          SIMT_UNROLL for (int h = 0; h < MT; ++h)
            peak = larger(peak, larger(z[h][n][i], z[h][n][2 + i]));
          SIMT_UNROLL for (int m = 4; m < 32; m *= 2) peak = larger(peak, simt::shuffle_xor(peak, m));
          const float safe = peak == -kInfinity ? 0.f : peak;
          SIMT_UNROLL for (int h = 0; h < MT; ++h)
            total += simt::exp2(z[h][n][i] - safe) + simt::exp2(z[h][n][2 + i] - safe);
          SIMT_UNROLL for (int m = 4; m < 32; m *= 2) total += simt::shuffle_xor(total, m);
          if (simt::lane() < 4) {
            mine[n * 8 + i] = peak;
            mine[kRows + n * 8 + i] = total;
          }
          simt::sync_warp();  // one column after another: together they need more registers than there are
        }
      SIMT_UNLESS_PLANTED(6, simt::sync());
      for (int r = simt::thread(); r < kRows; r += simt::threads()) {
        float peak = -kInfinity, total = 0;
        for (int w = 0; w < g.warps; ++w) peak = larger(peak, cross[2 * w * kRows + r]);
        const float before = weigh ? -kInfinity : kept[r], safe = larger(larger(peak, before), -kLargest);
        for (int w = 0; w < g.warps; ++w) total += cross[(2 * w + 1) * kRows + r] * simt::exp2(cross[2 * w * kRows + r] - safe);
        if (weigh) {
          kept[r] = peak == -kInfinity ? 0.f : peak + simt::log2(total);
        } else {
          kept[r] = larger(peak, before);
          kept[kTile + r] = simt::fused(kept[kTile + r], simt::exp2(before - safe), total);
        }
      }
      SIMT_UNLESS_PLANTED(7, simt::sync());
    }
    if (!weigh) return;
    SIMT_UNROLL for (int n = 0; n < kRows / 8; ++n)
      SIMT_UNROLL for (int i = 0; i < 2; ++i) {
        const int r = n * 8 + 2 * q + i;
        const float add = smaller(floats(g.at.shift)[kind * kRows + r] - kept[r], kLargest);
        SIMT_UNROLL for (int h = 0; h < MT; ++h) {
          z[h][n][i] += add;
          z[h][n][2 + i] += add;
        }
      }
  }

  /// z <- 2^(z - top), one step of the online softmax over rows.
  SIMT_DEVICE void weights() {
    SIMT_UNROLL for (int h = 0; h < MT; ++h)
      SIMT_UNROLL for (int r = 0; r < 2; ++r) {
        float peak = top[h][r];
        SIMT_UNROLL for (int n = 0; n < kRows / 8; ++n)
          peak = larger(peak, larger(z[h][n][2 * r], z[h][n][2 * r + 1]));
        peak = larger(peak, simt::shuffle_xor(peak, 1));
        peak = larger(peak, simt::shuffle_xor(peak, 2));
        const float safe = peak == -kInfinity ? 0.f : peak;  // nothing yet: -inf - -inf would be NaN
        if (peak != top[h][r]) {
          const float factor = simt::exp2(top[h][r] - safe);
          top[h][r] = peak;
          mass[h][r] *= factor;
          SIMT_UNROLL for (int n = 0; n < kValues / 8; ++n) {
            sum[h][n][2 * r] *= factor;
            sum[h][n][2 * r + 1] *= factor;
          }
        }
        SIMT_UNROLL for (int n = 0; n < kRows / 8; ++n)
          SIMT_UNROLL for (int i = 0; i < 2; ++i) {
            float& y = z[h][n][2 * r + i];
            y = simt::exp2(y - safe);
            mass[h][r] += y;
          }
      }
  }

  SIMT_DEVICE void accumulate(int buffer) {
    const uint16_t* const v = operand_v(buffer) +
                              ((simt::lane() & 7) + (simt::lane() >> 3 & 1) * 8) * kValuePitch + (simt::lane() >> 4) * 8;
    const int columns_left = least(t.value_width() - work().values * kValues, kValues);
    SIMT_UNROLL for (int k = 0; k < kRows / 16; ++k) {
      uint32_t a[2][MT][4];
      SIMT_UNROLL for (int h = 0; h < MT; ++h)
        SIMT_UNROLL for (int i = 0; i < 4; ++i) {
          const float *const pair = &z[h][2 * k + i / 2][i % 2 * 2];
          a[0][h][i] = Q > 1 ? split(pair[0], pair[1], &a[1][h][i]) : simt::pack(pair[0], pair[1]);
        }
      SIMT_UNROLL for (int n = 0; n < kValues / 16; ++n) {
        if (n * 16 >= columns_left) continue;
        SIMT_UNROLL for (int stored = 0; stored < S; ++stored) {
          uint32_t b[4];
          simt::load_matrices_transposed(b, v + (stored * kRows + k * 16) * kValuePitch + n * 16);
          SIMT_UNROLL for (int part = 0; part + stored < Q; ++part)
            SIMT_UNROLL for (int h = 0; h < MT; ++h) {
              simt::multiply_add(sum[h][2 * n], a[part][h], b[0], b[1]);
              simt::multiply_add(sum[h][2 * n + 1], a[part][h], b[2], b[3]);
            }
        }
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
    SIMT_UNROLL for (int h = 0; h < MT; ++h)
      SIMT_UNROLL for (int r = 0; r < 2; ++r) {
        f(top[h][r]);
        f(mass[h][r]);
      }
    SIMT_UNROLL for (int h = 0; h < MT; ++h)
      SIMT_UNROLL for (int c = 0; c < kValues / 8; ++c)
        SIMT_UNROLL for (int i = 0; i < 4; ++i) f(sum[h][c][i]);
    for (int i = 0; t.missing && i < 2; ++i) f(floats(g.at.absent)[i * simt::threads() + simt::thread()]);
  }

  SIMT_DEVICE void reset() {
    each([](float& y) { y = 0; });
    SIMT_UNROLL for (int h = 0; h < MT; ++h) top[h][0] = top[h][1] = -kInfinity;
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
    SIMT_UNROLL for (int h = 0; h < MT; ++h)
      SIMT_UNROLL for (int r = 0; r < 2; ++r) {
        m[h][r] = Merge(next(), top[h][r]);
        top[h][r] = m[h][r].top;
        mass[h][r] = m[h][r].of(next(), mass[h][r]);
      }
    SIMT_UNROLL for (int h = 0; h < MT; ++h)
      SIMT_UNROLL for (int c = 0; c < kValues / 8; ++c)
        SIMT_UNROLL for (int i = 0; i < 4; ++i) sum[h][c][i] = m[h][i / 2].of(next(), sum[h][c][i]);
    for (int i = 0; t.missing && i < 2; ++i) floats(g.at.absent)[i * simt::threads() + simt::thread()] += next();
  }

  /// Down the tree; the unit's last state stays in registers.
  SIMT_DEVICE void end_tile(int so_far) {
    SIMT_UNROLL for (int h = 0; h < MT; ++h)
      SIMT_UNROLL for (int r = 0; r < 2; ++r) {
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
    const int64_t agent = int64_t{w.own} * g.tile_agents + simt::warp() * 16 * MT + simt::lane() / 4;
    const int64_t column = int64_t{w.values} * kValues + (simt::lane() & 3) * 2;
    SIMT_UNROLL for (int h = 0; h < MT; ++h)
      SIMT_UNROLL for (int r = 0; r < 2; ++r) {
        const Row out(t, w.unit.user, agent + h * 16 + r * 8, top[h][r], mass[h][r]);
        if (column == 0) out.finish();
        SIMT_UNROLL for (int c = 0; c < kValues / 8; ++c)
          out.put(column + c * 8, sum[h][c][2 * r], sum[h][c][2 * r + 1]);
      }
    if (w.own == 0 && simt::thread() < kValues)
      finish_missing(t, w.unit.user, int64_t{w.values} * kValues + simt::thread(),
                     floats(g.at.absent)[simt::threads() + simt::thread()], floats(g.at.absent)[simt::thread()]);
  }

  const Task& t;
  const Geometry& g;
  int begin = 0, end = 0;  // the sweep's rows, from the user's first
  float z[MT][kRows / 8][4], sum[MT][kValues / 8][4], top[MT][2], mass[MT][2];
};

}  // namespace hisac::cuda
