// SPDX-License-Identifier: Apache-2.0
// The inner kernel of `attend` and its backward. A block keeps up to 64 rows of one side of a head, 16 a warp; the
// other side's rows stream past, 32 a step. Own rows are candidates for the outputs and d q, and tokens for what sums
// over candidates, so that all sums stay in registers. Logits become weights, and d logits, where the tensor cores
// leave them, and go back as operands. Whatever streams comes from memory through registers: any type and alignment
// ends there; several blocks a processor hide its latency. A side's chunks turn so that the last one is that of the
// wanted columns: it is still there when the weights are.
#pragma once
#include "cuda/attend_task.h"

namespace hisac::cuda::attention {

/// P: bfloat16 parts of an input; 1 where all are bfloat16.
template <Pass kPass, int P>
class AttendTile {
  static constexpr bool kGradients = kPass != kForward, kTokens = kPass == kOfTokens;
  static constexpr int kAhead = P > 1 ? 2 : kGradients ? 3 : 4;  // pieces under way; as registers allow
  static constexpr int kWords = 4 * P;                           // of a piece, eight neighbours
  static constexpr int kNone = 1 << 30;                          // a column past every matrix

  struct Work {
    int32_t some, user, head, own, own_rows, other, other_rows, column, slot, span;
  };

 public:
  static constexpr int kWorkBytes = sizeof(Work);

  SIMT_DEVICE explicit AttendTile(const Task& task) : t(task) {}

  SIMT_DEVICE void run() {
    for (;;) {
      if (simt::thread() == 0) take();
      simt::sync();
      if (!work().some) return;
      if (work().user < 0)
        nobody();
      else
        item();
      SIMT_UNLESS_PLANTED(51, simt::sync());
    }
  }

 private:
  static SIMT_DEVICE float* floats(int offset) { return reinterpret_cast<float*>(simt::shared() + offset); }
  SIMT_DEVICE Work& work() const { return *reinterpret_cast<Work*>(simt::shared() + t.at.work); }
  /// 0: q or keys, 1: d_out or values.
  SIMT_DEVICE const Matrix& matrix(bool tokens, int which) const {
    return tokens ? which ? t.values : t.keys : which ? t.d_out : t.q;
  }
  SIMT_DEVICE Operand<P> own(int which) const {
    const int pitch = matrix(kTokens, which).depth + 8;
    return {reinterpret_cast<uint16_t*>(simt::shared() + t.at.own[which]), pitch, 16 * t.warps * pitch};
  }
  SIMT_DEVICE Operand<P> other(int which) const {
    const int pitch = least(matrix(!kTokens, which).depth, kChunk) + 8;
    return {reinterpret_cast<uint16_t*>(simt::shared() + t.at.other[which]), pitch, kRows * pitch};
  }
  /// The warp's first row: where there are few candidates, heads spread them over the warps.
  SIMT_DEVICE int mine() const { return ((simt::warp() + work().head) & (t.warps - 1)) * 16; }
  SIMT_DEVICE int64_t row_of(bool tokens, int i) const {
    return (tokens ? int64_t{work().user} * t.tokens + i : i) * t.heads + work().head;
  }

  SIMT_DEVICE void take() const {
    Work& w = work();
    const List& list = kTokens ? t.spans : t.tiles;
    const int tiles = t.tiles_of(kPass), columns = t.column_tiles(kPass);
    const auto item = static_cast<int64_t>(simt::atomic_add(&list.head->next, 1ull));
    const int64_t unit = item / tiles / t.heads;
    w.some = unit < list.head->units;
    if (!w.some) return;
    const Unit u = list.unit[unit];
    const int tile = static_cast<int>(item % tiles);
    w.user = u.user;
    w.head = static_cast<int>(item / tiles % t.heads);
    w.column = tile % columns * (kTokens ? kColumns / 2 : kColumns);
    const int first = tile / columns * 16 * t.warps, count = least(t.tokens - first, 16 * t.warps);
    w.own = kTokens ? first : u.first;
    w.own_rows = kTokens ? count : u.last - u.first;
    w.other = kTokens ? u.first : 0;
    w.other_rows = kTokens ? u.last - u.first : t.tokens;
    w.span = static_cast<int>(unit);
    if (kTokens) w.slot = unit == t.spans.before[u.user] ? -1 : static_cast<int>(unit) - u.user - 1;
  }

  /// Candidates outside every user's range.
  SIMT_DEVICE void nobody() const {
    const Work& w = work();
    const int width = kGradients ? t.q.width : t.values.width;
    for (int i = simt::thread(); w.column == 0 && i < w.own_rows; i += simt::threads()) {
      const int64_t row = row_of(false, w.own + i);
      if (!kGradients) t.result_lse[row] = -kInfinity;
      for (int c = 0; c < width; ++c) {
        if (kGradients)
          t.d_q[row * width + c] = 0;
        else
          store(t.result, t.q.type, row * width + c, 0.f);
      }
    }
  }

  // ---- rows from memory to operands

  SIMT_DEVICE float bias(int token) const { return t.bias ? t.bias[int64_t{work().user} * t.tokens + token] : 0.f; }

  /// Eight neighbours as they lie in memory, zero past the matrix.
  SIMT_DEVICE void read(const Matrix& m, int64_t row, int column, bool valid, uint32_t (&word)[kWords]) const {
    const bool wide = P > 1 && m.type == DType::float32;
    const auto* const from = static_cast<const std::byte*>(m.data) + (row * m.width + column) * (wide ? 4 : 2);
    SIMT_EACH (i, kWords) word[i] = 0;
    if (valid && m.aligned && column + 8 <= m.width) {
      SIMT_EACH (i, P) {
        if (i && !wide) continue;
        const simt::Quad q = reinterpret_cast<const simt::Quad*>(from)[i];
        SIMT_EACH (k, 4) word[4 * i + k] = q.word[k];
      }
    } else if (valid) {
      SIMT_EACH (i, 8) {
        if (column + i >= m.width) continue;
        if (wide)
          word[i % kWords] = reinterpret_cast<const uint32_t*>(from)[i];
        else
          word[i / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(from)[i]) << i % 2 * 16;
      }
    }
  }

  SIMT_DEVICE void write(const uint32_t (&word)[kWords], DType type, const Operand<P>& to) const {
    simt::Quad high, low;
    SIMT_EACH (i, 4) {
      const uint32_t pair = word[i], x = word[2 * i % kWords], y = word[(2 * i + 1) % kWords];
      if (P == 1)
        high.word[i] = pair;
      else if (type == DType::float32)
        high.word[i] = split_wide(simt::float_of(x), simt::float_of(y), &low.word[i]);
      else if (type == DType::float16)
        high.word[i] = split_wide(simt::from_half(static_cast<uint16_t>(pair)),
                                  simt::from_half(static_cast<uint16_t>(pair >> 16)), &low.word[i]);
      else
        high.word[i] = split_wide(of_bfloat16(pair), simt::float_of(pair & 0xffff0000u), &low.word[i]);
    }
    *reinterpret_cast<simt::Quad*>(to.data) = high;
    if (P > 1) *reinterpret_cast<simt::Quad*>(to.data + to.apart) = low;
  }

  /// A chunk of a matrix as pieces of eight neighbours: a row is a power of two of them, some of them empty.
  struct Chunk {
    const Matrix* m;
    int column, log, pieces;
    Operand<P> to;
    SIMT_DEVICE Chunk or_else(const Chunk& b, bool other) const {  // by members, which so stay in registers
      return {other ? b.m : m,
              other ? b.column : column,
              other ? b.log : log,
              other ? b.pieces : pieces,
              {other ? b.to.data : to.data, other ? b.to.pitch : to.pitch, other ? b.to.apart : to.apart}};
    }
  };
  SIMT_DEVICE Chunk chunk_at(bool tokens, int which, int column, int rows, const Operand<P>& to) const {
    const Matrix& m = matrix(tokens, which);
    const int columns = least(m.depth - column, kChunk);
    int log = 1;
    while (8 << log < columns) ++log;
    return {&m, column, log, columns > 0 ? rows << log : 0, to};
  }

  /// Rows [first, first + valid) of a side as operands, then zeros to the next 16: from each matrix the chunk at a
  /// column, none where that is past the last. What an absent token holds must not meet a weight of 0. Up to kAhead
  /// pieces are on their way before a thread waits for any.
  template <bool kOfTokens>
  SIMT_DEVICE void stage(int first, int valid, int column0, int column1, const Operand<P>& to0,
                         const Operand<P>& to1) const {
    const int rows = (valid + 15) / 16 * 16;
    const Chunk a = chunk_at(kOfTokens, 0, column0, rows, to0), b = chunk_at(kOfTokens, 1, column1, rows, to1);
    const int pieces = a.pieces + b.pieces, step = simt::threads();
    const auto each_ahead = [&](int n, auto f) {  // f(j, chunk, row, its first column, there is one)
      SIMT_EACH (j, kAhead) {
        const int at = n + j * step;
        const Chunk c = a.or_else(b, at >= a.pieces);
        const int k = at < a.pieces ? at : at - a.pieces, column = (k & ((1 << c.log) - 1)) * 8;
        f(j, c, k >> c.log, column, at < pieces && c.column + column < c.m->depth);
      }
    };
    SIMT_ROLLED for (int n = simt::thread(); n < pieces; n += kAhead * step) {
      uint32_t word[kAhead][kWords];
      float here[kAhead];
      each_ahead(n, [&](int j, const Chunk& c, int row, int column, bool some) {
        some = some && row < valid;
        here[j] = kOfTokens && some ? bias(first + row) : 0.f;
        read(*c.m, row_of(kOfTokens, first + row), c.column + column, some, word[j]);
      });
      each_ahead(n, [&](int j, const Chunk& c, int row, int column, bool some) {
        SIMT_EACH (i, kWords) SIMT_UNLESS_PLANTED(54, word[j][i] = finite(here[j]) ? word[j][i] : 0);
        if (some) write(word[j], c.m->type, c.to.at(row, column));
      });
    }
  }

  /// A token's bias in base 2, -inf where it is absent.
  SIMT_DEVICE float shift_of(int token, bool valid) const {
    const float x = valid ? bias(token) : kInfinity;
    return finite(x) ? base2(x) : -kInfinity;
  }

  /// What a side's rows add to logits and, candidates, to slopes; rows past the last have no weight.
  SIMT_DEVICE void stage_terms(bool tokens, int first, int valid, int rows, float* to) const {
    for (int i = simt::thread(); i < rows; i += simt::threads()) {
      const bool here = i < valid;
      if (tokens) {
        to[i] = shift_of(first + i, here);
      } else {
        const int64_t row = row_of(false, first + i);
        to[i] = here ? t.shift[row] : -kInfinity;
        to[rows + i] = here ? t.slope[row] : 0.f;
      }
    }
  }

  // ---- a head's unit

  SIMT_DEVICE void item() {
    const Work& w = work();
    const bool active = mine() < w.own_rows;
    SIMT_EACH (n, kColumns / 8)
      SIMT_EACH (i, 4) sum[n][i] = 0;
    SIMT_EACH (r, 2) {
      top[r] = -kInfinity;
      mass[r] = 0;
    }
    if (kGradients) stage_terms(kTokens, w.own, w.own_rows, 16 * t.warps, floats(t.at.own_terms));
    for (int c = 0; c < t.keys.depth || (kGradients && c < t.values.depth); c += kChunk)
      stage<kTokens>(w.own, w.own_rows, c, kGradients ? c : kNone, own(0).at(0, c), own(1).at(0, c));
    const int turns[2] = {matrix(!kTokens, 0).chunks(), kGradients ? matrix(!kTokens, 1).chunks() : 1};
    const int last = (turns[0] > turns[1] ? turns[0] : turns[1]) - 1;
    SIMT_ROLLED for (int at = 0; at < w.other_rows; at += kRows) {
      const int rows = least(w.other_rows - at, kRows);
      SIMT_EACH (n, kRows / 8)
        SIMT_EACH (i, 4) z[n][i] = slopes[n][i] = 0;
      SIMT_ROLLED for (int turn = 0; turn <= last; ++turn) {
        const int chunk[2] = {chunk_of(turn, turns[0]), kGradients ? chunk_of(turn, turns[1]) : w.column};
        const bool both = kGradients ? turn < turns[1] : turn == last;
        stage<!kTokens>(w.other + at, rows, turn < turns[0] ? chunk[0] : kNone, both ? chunk[1] : kNone, other(0),
                        other(1));
        if (turn == last) stage_terms(!kTokens, w.other + at, rows, kRows, floats(t.at.terms));
        SIMT_UNLESS_PLANTED(52, simt::sync());
        if (active && turn < turns[0]) multiply(z, 0, chunk[0], rows);
        if (active && kGradients && turn < turns[1]) multiply(slopes, 1, chunk[1], rows);
        if (active && turn == last) add(rows);
        SIMT_UNLESS_PLANTED(53, simt::sync());
      }
    }
    if (w.other_rows == 0) simt::sync();  // own rows are there
    if (!active) return;
    if (kPass == kForward) end_forward();
    if (kPass == kOfCandidates) end_candidates();
    if (kPass == kOfTokens) end_tokens();
  }

  /// The first column of the chunk whose turn it is; the last turn has the chunk of w.column, if there is one.
  SIMT_DEVICE int chunk_of(int turn, int turns) const { return (work().column / kChunk + 1 + turn) % turns * kChunk; }

  SIMT_DEVICE void multiply(float (&to)[kRows / 8][4], int which, int chunk, int rows) const {
    const int columns = least(matrix(kTokens, which).depth - chunk, kChunk);
    multiply_rows<P>(to, own(which).at(mine(), chunk), other(which), columns, rows);
  }

  SIMT_DEVICE void add(int rows) {
    const int column = work().column;
    if (!kGradients) {
      weigh();
      multiply_weights<kColumns / 8, P>(sum, z, other(1), rows, t.values.depth - column);
      return;
    }
    differentiate();
    if (kPass == kOfCandidates) {
      multiply_weights<kColumns / 8, P>(sum, slopes, other(0), rows, t.keys.depth - column);
    } else {  // half a chunk of each
      const int half = column % kChunk;
      multiply_weights<kColumns / 16, P>(sum, slopes, other(0).at(0, half), rows, t.keys.depth - column);
      multiply_weights<kColumns / 16, P>(sum + kColumns / 16, z, other(1).at(0, half), rows, t.values.depth - column);
    }
  }

  /// z <- 2^(z - top), one step of the online softmax. The largest weight is 2^-spread and their sum below 1, so that
  /// no finite value overflows.
  SIMT_DEVICE void weigh() {
    const int q = simt::lane() & 3;
    SIMT_EACH (r, 2) {
      float peak = -kInfinity;
      SIMT_EACH (n, kRows / 8)
        SIMT_EACH (i, 2) {
          float& y = z[n][2 * r + i];
          y = bounded(t.rate * y) + floats(t.at.terms)[n * 8 + 2 * q + i];
          peak = larger(peak, y);
        }
      peak = larger(peak, simt::shuffle_xor(peak, 1));
      peak = larger(peak, simt::shuffle_xor(peak, 2));
      SIMT_UNLESS_PLANTED(56, peak += t.spread);
      peak = larger(peak, top[r]);
      const float safe = peak == -kInfinity ? 0.f : peak;  // nothing yet: -inf - -inf would be NaN
      const float factor = simt::exp2(top[r] - safe);
      if (peak != top[r]) {
        mass[r] *= factor;
        SIMT_EACH (n, kColumns / 8)
          SIMT_EACH (i, 2) sum[n][2 * r + i] *= factor;
      }
      top[r] = peak;
      SIMT_EACH (n, kRows / 8)
        SIMT_EACH (i, 2) {
          float& y = z[n][2 * r + i];
          y = simt::exp2(y - safe);
          mass[r] += y;
        }
    }
  }

  /// z <- w = 2^(z - lse), slopes <- dz = w (dout . values - dout . out + dlse).
  SIMT_DEVICE void differentiate() {
    const float* const theirs = floats(t.at.terms) + 2 * (simt::lane() & 3);
    SIMT_EACH (r, 2) {
      const float* const ours = floats(t.at.own_terms) + mine() + simt::lane() / 4 + 8 * r;
      const float shift = ours[0], slope = kTokens ? 0.f : ours[16 * t.warps];
      SIMT_EACH (n, kRows / 8)
        SIMT_EACH (i, 2) {
          float &y = z[n][2 * r + i], &dz = slopes[n][2 * r + i];
          const float other = theirs[n * 8 + i], logit = bounded(t.rate * y) + (kTokens ? shift : other);
          y = simt::exp2(logit + (kTokens ? other : shift));
          dz = y * (dz + (kTokens ? theirs[kRows + n * 8 + i] : slope));
          if (kTokens) mass[r] += dz;
        }
    }
  }

  // ---- results

  /// f(row of the side, r, column from the first, value) for the warp's sums.
  template <class F>
  SIMT_DEVICE void each(F f) const {
    const Work& w = work();
    SIMT_EACH (r, 2) {
      const int row = mine() + simt::lane() / 4 + 8 * r;
      if (row >= w.own_rows) continue;
      SIMT_EACH (n, kColumns / 8)
        SIMT_EACH (i, 2) f(w.own + row, r, n * 8 + 2 * (simt::lane() & 3) + i, sum[n][2 * r + i]);
    }
  }

  SIMT_DEVICE float over_lanes(float x) const {
    x += simt::shuffle_xor(x, 1);
    return x + simt::shuffle_xor(x, 2);
  }

  SIMT_DEVICE void end_forward() {
    float odd[4] = {};  // q times 0: NaN where a candidate's q is not finite, which is its own
    const Operand<P> q = own(0).at(mine(), 0);
    SIMT_EACH (part, P) SIMT_ROLLED for (int k = 0; k < t.q.depth; k += 16) {
        uint32_t left[4];
        simt::load_matrices(left, q.place(part, 0, k));
        SIMT_UNLESS_PLANTED(55, simt::multiply_add(odd, left, 0, 0));
      }
    SIMT_EACH (r, 2) mass[r] = over_lanes(mass[r]);
    const float scale[2] = {top[0] == -kInfinity ? 0.f : 1.f / mass[0], top[1] == -kInfinity ? 0.f : 1.f / mass[1]};
    each([&](int row, int r, int c, float x) {
      const int column = work().column + c;
      const int64_t at = row_of(false, row);
      if (column < t.values.width)
        store(t.result, t.q.type, at * t.values.width + column,
              (top[r] == -kInfinity ? 0.f : x * scale[r]) + odd[2 * r]);
      if (column != 0) return;
      const double total = static_cast<double>(top[r]) + static_cast<double>(simt::log2(mass[r]));
      t.result_lse[at] = (top[r] == -kInfinity ? -kInfinity : static_cast<float>(total * kLn2)) + odd[2 * r];
    });
  }

  SIMT_DEVICE void end_candidates() const {
    each([&](int row, int, int c, float x) {
      const int column = work().column + c;
      if (column < t.q.width) t.d_q[row_of(false, row) * t.q.width + column] = x * t.scale;
    });
  }

  SIMT_DEVICE void end_tokens() {
    const Work& w = work();
    const int64_t keys = int64_t{t.tokens} * t.heads * t.keys.width;
    float* const d_keys = w.slot < 0 ? t.d_keys + w.user * keys : t.slots + w.slot * t.slot_floats();
    float* const d_values =
        w.slot < 0 ? t.d_values + int64_t{w.user} * t.tokens * t.heads * t.values.width : d_keys + keys;
    SIMT_EACH (r, 2) mass[r] = over_lanes(mass[r]);
    each([&](int row, int r, int c, float x) {
      const int64_t at = int64_t{row} * t.heads + w.head;
      const int column = w.column + c % (kColumns / 2);
      if (c < kColumns / 2 && column < t.keys.width) d_keys[at * t.keys.width + column] = x * t.scale;
      if (c >= kColumns / 2 && column < t.values.width) d_values[at * t.values.width + column] = x;
      if (c == 0 && w.column == 0 && t.d_bias)
        t.biases[(int64_t{w.span} * t.heads + w.head) * t.tokens + row] = mass[r];
    });
  }

  const Task& t;
  float z[kRows / 8][4], slopes[kRows / 8][4], sum[kColumns / 8][4], top[2], mass[2];
};

}  // namespace hisac::cuda::attention
