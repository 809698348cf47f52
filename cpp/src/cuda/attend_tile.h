// SPDX-License-Identifier: Apache-2.0
// The inner kernel of `attend` and its backward. A block keeps up to 64 rows of one side of a head, while the other
// side's rows stream past, 32 a step:
//
//                   out and lse, d q      d keys, d values, d bias
//   kept rows       candidates            tokens
//   streamed rows   tokens                candidates
//
//   warp w          16 kept rows. In registers: z [16, 32], logits and then weights; slopes [16, 32] (backward); sum
//                   [16, 128 columns of the result]. So all sums stay in registers.
//   shared memory   q or keys of all kept rows, in bfloat16 parts; d_out or values of them too (backward); one chunk of
//                   up to 128 columns of 32 streamed rows of either matrix; what each row adds to logits and slopes.
//
// A step takes the chunks in turn: memory to registers to operands, which is where types and alignments end; barrier;
// products; barrier. Nothing is copied asynchronously: several blocks of a processor hide the latency. The chunk of
// the wanted columns comes last, so it is still there when z and slopes are weights and gradients, and multiply it.
#pragma once
#include "cuda/attend_task.h"

namespace hisac::cuda::attention {

/// P: bfloat16 parts of an input; 1 where all are bfloat16.
template <Pass kPass, int P>
class AttendTile {
  static constexpr bool kGradients = kPass != kForward, kTokens = kPass == kOfTokens;
  static constexpr int kPrefetched = P > 1 ? 2 : kGradients ? 3 : 4;  // pieces under way; as registers allow
  static constexpr int kWords = 4 * P;                                // of a piece, eight neighbours
  static constexpr int kNone = 1 << 30;                               // a column past every matrix

  struct Work {
    int32_t found, user, head, token, kept, kept_rows, streamed, streamed_rows, column, slot;  // token: the first's row
  };

 public:
  static constexpr int kWorkBytes = sizeof(Work);

  SIMT_DEVICE explicit AttendTile(const Task& task) : t(task) {}

  SIMT_DEVICE void run() {
    each_taken(work().found, [&] { take(); }, [&] { item(); });
  }

 private:
  static SIMT_DEVICE float* floats(int offset) { return reinterpret_cast<float*>(simt::shared() + offset); }
  SIMT_DEVICE Work& work() const { return *reinterpret_cast<Work*>(simt::shared() + t.offset.work); }
  /// 0: q or keys, 1: d_out or values.
  SIMT_DEVICE const Matrix& matrix(bool tokens, int which) const {
    return tokens ? which ? t.values : t.keys : which ? t.d_out : t.q;
  }
  SIMT_DEVICE Operand<P> kept(int which) const {
    const int pitch = matrix(kTokens, which).depth + 8;
    return {reinterpret_cast<uint16_t*>(simt::shared() + t.offset.kept[which]), pitch, 16 * t.warps * pitch};
  }
  SIMT_DEVICE Operand<P> streamed(int which) const {
    const int pitch = least(matrix(!kTokens, which).depth, kChunk) + 8;
    return {reinterpret_cast<uint16_t*>(simt::shared() + t.offset.streamed[which]), pitch, kRows * pitch};
  }
  /// The warp's first row: where there are few candidates, heads spread them over the warps.
  SIMT_DEVICE int warp_row() const { return ((simt::warp() + work().head) & (t.warps - 1)) * 16; }
  SIMT_DEVICE int64_t row_of(bool tokens, int i) const {
    return (tokens ? int64_t{work().token} + i : i) * t.heads + work().head;
  }

  SIMT_DEVICE void take() const {
    Work& w = work();
    const List& list = kTokens ? t.spans : t.tiles;
    const int tiles = t.tiles_of(kPass), columns = t.column_tiles(kPass);
    const auto item = static_cast<int64_t>(simt::atomic_add(&list.head->next, 1ull));
    const int64_t unit = item / tiles / t.heads;
    w.found = unit < list.head->units;
    if (!w.found) return;
    const Unit u = list.unit[unit];
    const int tile = static_cast<int>(item % tiles);
    w.user = u.user;
    w.token = u.user < 0 ? 0 : static_cast<int>(t.first_token(u.user));
    const int tokens = u.user < 0 ? 0 : t.tokens_of(u.user);
    w.head = static_cast<int>(item / tiles % t.heads);
    w.column = tile % columns * (kTokens ? kColumns / 2 : kColumns);
    const int first = tile / columns * 16 * t.warps, count = least(tokens - first, 16 * t.warps);
    w.kept = kTokens ? first : u.first;
    w.kept_rows = kTokens ? count : u.last - u.first;
    w.streamed = kTokens ? u.first : 0;
    w.streamed_rows = kTokens ? u.last - u.first : tokens;
    if (kTokens) w.slot = unit == t.spans.before[u.user] ? -1 : static_cast<int>(unit) - u.user - 1;
  }

  /// Candidates outside every user's range.
  SIMT_DEVICE void nobody() const {
    const Work& w = work();
    const int width = kGradients ? t.q.width : t.values.width;
    for (int i = simt::thread(); w.column == 0 && i < w.kept_rows; i += simt::threads()) {
      const int64_t row = row_of(false, w.kept + i);
      if (!kGradients) t.result.lse.data[row] = -kInfinity;
      for (int c = 0; c < width; ++c) {
        if (kGradients)
          t.gradients.q.data[row * width + c] = 0;
        else
          store(t.result.out.data, t.q.type, row * width + c, 0.f);
      }
    }
  }

  // ---- rows from memory to operands

  SIMT_DEVICE float bias(int token) const { return t.bias ? t.bias[work().token + token] : 0.f; }

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
        high.word[i] = bf16_parts_clamped(simt::float_of(x), simt::float_of(y), &low.word[i]);
      else
        high.word[i] = bf16_parts_clamped(half_of(pair, 0, type), half_of(pair, 1, type), &low.word[i]);
    }
    *reinterpret_cast<simt::Quad*>(to.data) = high;
    if (P > 1) *reinterpret_cast<simt::Quad*>(to.data + to.part_stride) = low;
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
              {other ? b.to.data : to.data, other ? b.to.pitch : to.pitch, other ? b.to.part_stride : to.part_stride}};
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
  /// column, none where that is past the last. What an absent token holds must not meet a weight of 0. Up to
  /// kPrefetched pieces are on their way before a thread waits for any.
  template <bool kOfTokens>
  SIMT_DEVICE void stage(int first, int valid, int column0, int column1, const Operand<P>& to0,
                         const Operand<P>& to1) const {
    const int rows = (valid + 15) / 16 * 16;
    const Chunk a = chunk_at(kOfTokens, 0, column0, rows, to0), b = chunk_at(kOfTokens, 1, column1, rows, to1);
    const int pieces = a.pieces + b.pieces, step = simt::threads();
    const auto each_prefetched = [&](int n, auto f) {  // f(j, chunk, row, its first column, there is one)
      SIMT_EACH (j, kPrefetched) {
        const int piece = n + j * step;
        const Chunk c = a.or_else(b, piece >= a.pieces);
        const int k = piece < a.pieces ? piece : piece - a.pieces, column = (k & ((1 << c.log) - 1)) * 8;
        f(j, c, k >> c.log, column, piece < pieces && c.column + column < c.m->depth);
      }
    };
    SIMT_ROLLED for (int n = simt::thread(); n < pieces; n += kPrefetched * step) {
      uint32_t word[kPrefetched][kWords];
      float here[kPrefetched];
      each_prefetched(n, [&](int j, const Chunk& c, int row, int column, bool inside) {
        inside = inside && row < valid;
        here[j] = kOfTokens && inside ? bias(first + row) : 0.f;
        read(*c.m, row_of(kOfTokens, first + row), c.column + column, inside, word[j]);
      });
      each_prefetched(n, [&](int j, const Chunk& c, int row, int column, bool inside) {
        SIMT_EACH (i, kWords) SIMT_UNLESS_PLANTED(54, word[j][i] = finite(here[j]) ? word[j][i] : 0);
        if (inside) write(word[j], c.m->type, c.to.from(row, column));
      });
    }
  }

  /// What a side's rows add to logits and, candidates, to slopes; rows past the last have no weight.
  SIMT_DEVICE void stage_terms(bool tokens, int first, int valid, int rows, float* to) const {
    for (int i = simt::thread(); i < rows; i += simt::threads()) {
      const bool here = i < valid;
      if (tokens) {
        const float x = here ? bias(first + i) : kInfinity;  // not finite: the token is absent
        to[i] = finite(x) ? base2(x) : -kInfinity;
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
    if (w.user < 0) return nobody();
    if (kTokens && w.kept_rows <= 0) return;  // the user has fewer than M tokens
    const bool active = warp_row() < w.kept_rows;
    SIMT_EACH (n, kColumns / 8)
      SIMT_EACH (i, 4) sum[n][i] = 0;
    SIMT_EACH (r, 2) {
      max_logit[r] = -kInfinity;
      mass[r] = 0;
    }
    if (kGradients) stage_terms(kTokens, w.kept, w.kept_rows, 16 * t.warps, floats(t.offset.kept_terms));
    for (int c = 0; c < t.keys.depth || (kGradients && c < t.values.depth); c += kChunk)
      stage<kTokens>(w.kept, w.kept_rows, c, kGradients ? c : kNone, kept(0).from(0, c), kept(1).from(0, c));
    const int turns[2] = {matrix(!kTokens, 0).chunks(), kGradients ? matrix(!kTokens, 1).chunks() : 1};
    const int last = (turns[0] > turns[1] ? turns[0] : turns[1]) - 1;
    SIMT_ROLLED for (int first = 0; first < w.streamed_rows; first += kRows) {
      const int rows = least(w.streamed_rows - first, kRows);
      SIMT_EACH (n, kRows / 8)
        SIMT_EACH (i, 4) z[n][i] = slopes[n][i] = 0;
      SIMT_ROLLED for (int turn = 0; turn <= last; ++turn) {
        const int chunk[2] = {chunk_of(turn, turns[0]), kGradients ? chunk_of(turn, turns[1]) : w.column};
        const bool both = kGradients ? turn < turns[1] : turn == last;
        stage<!kTokens>(w.streamed + first, rows, turn < turns[0] ? chunk[0] : kNone, both ? chunk[1] : kNone,
                        streamed(0), streamed(1));
        if (turn == last) stage_terms(!kTokens, w.streamed + first, rows, kRows, floats(t.offset.streamed_terms));
        SIMT_UNLESS_PLANTED(52, simt::sync());
        if (active && turn < turns[0]) multiply(z, 0, chunk[0], rows);
        if (active && kGradients && turn < turns[1]) multiply(slopes, 1, chunk[1], rows);
        if (active && turn == last) add(rows);
        SIMT_UNLESS_PLANTED(53, simt::sync());
      }
    }
    if (w.streamed_rows == 0) simt::sync();  // the kept rows are there
    if (!active) return;
    if (kPass == kForward) end_forward();
    if (kPass == kOfCandidates) end_candidates();
    if (kPass == kOfTokens) end_tokens();
  }

  /// The first column of the chunk whose turn it is; the last turn has the chunk of w.column, if there is one.
  SIMT_DEVICE int chunk_of(int turn, int turns) const { return (work().column / kChunk + 1 + turn) % turns * kChunk; }

  SIMT_DEVICE void multiply(float (&to)[kRows / 8][4], int which, int chunk, int rows) const {
    const int columns = least(matrix(kTokens, which).depth - chunk, kChunk);
    multiply_rows<1>(&to, kept(which).from(warp_row(), chunk), streamed(which), columns, rows);
  }

  SIMT_DEVICE void add(int rows) {
    const int column = work().column;
    if (!kGradients) {
      weigh();
      multiply_weights<1, 2, kColumns / 8>(&sum, &z, streamed(1), rows, t.values.depth - column);
      return;
    }
    differentiate();
    if (kPass == kOfCandidates) {
      multiply_weights<1, 2, kColumns / 8>(&sum, &slopes, streamed(0), rows, t.keys.depth - column);
    } else {  // half a chunk of each
      const int half = column % kChunk;
      multiply_weights<1, 2, kColumns / 16>(&sum, &slopes, streamed(0).from(0, half), rows, t.keys.depth - column);
      multiply_weights<1, 2, kColumns / 16>(&sum, &z, streamed(1).from(0, half), rows, t.values.depth - column,
                                            kColumns / 16);
    }
  }

  /// z <- 2^(z - max_logit), one step of the online softmax. The largest weight is 2^-spread and their sum below 1, so
  /// that no finite value overflows.
  SIMT_DEVICE void weigh() {
    const int q = simt::lane() & 3;
    SIMT_EACH (r, 2) {
      float peak = -kInfinity;
      SIMT_EACH (n, kRows / 8)
        SIMT_EACH (i, 2) {
          float& y = z[n][2 * r + i];
          y = bounded(t.rate * y) + floats(t.offset.streamed_terms)[n * 8 + 2 * q + i];
          peak = larger(peak, y);
        }
      peak = larger(peak, simt::shuffle_xor(peak, 1));
      peak = larger(peak, simt::shuffle_xor(peak, 2));
      SIMT_UNLESS_PLANTED(56, peak += t.spread);
      peak = larger(peak, max_logit[r]);
      const float safe = peak == -kInfinity ? 0.f : peak;  // nothing yet: -inf - -inf would be NaN
      const float factor = simt::exp2(max_logit[r] - safe);
      if (peak != max_logit[r]) {
        mass[r] *= factor;
        SIMT_EACH (n, kColumns / 8)
          SIMT_EACH (i, 2) sum[n][2 * r + i] *= factor;
      }
      max_logit[r] = peak;
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
    const float* const streamed_terms = floats(t.offset.streamed_terms) + 2 * (simt::lane() & 3);
    SIMT_EACH (r, 2) {
      const float* const kept_terms = floats(t.offset.kept_terms) + warp_row() + simt::lane() / 4 + 8 * r;
      const float shift = kept_terms[0], slope = kTokens ? 0.f : kept_terms[16 * t.warps];
      SIMT_EACH (n, kRows / 8)
        SIMT_EACH (i, 2) {
          float &y = z[n][2 * r + i], &dz = slopes[n][2 * r + i];
          const float streamed_shift = streamed_terms[n * 8 + i],
                      logit = bounded(t.rate * y) + (kTokens ? shift : streamed_shift);
          y = simt::exp2(logit + (kTokens ? streamed_shift : shift));
          dz = y * (dz + (kTokens ? streamed_terms[kRows + n * 8 + i] : slope));
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
      const int row = warp_row() + simt::lane() / 4 + 8 * r;
      if (row >= w.kept_rows) continue;
      SIMT_EACH (n, kColumns / 8)
        SIMT_EACH (i, 2) f(w.kept + row, r, n * 8 + 2 * (simt::lane() & 3) + i, sum[n][2 * r + i]);
    }
  }

  SIMT_DEVICE void end_forward() {
    float q_nan[4] = {};  // q times 0: NaN for a candidate whose q is not finite
    const Operand<P> q = kept(0).from(warp_row(), 0);
    SIMT_EACH (part, P) SIMT_ROLLED for (int k = 0; k < t.q.depth; k += 16) {
        uint32_t left[4];
        simt::load_matrices(left, q.place(part, 0, k));
        SIMT_UNLESS_PLANTED(55, simt::multiply_add(q_nan, left, 0, 0));
      }
    SIMT_EACH (r, 2) mass[r] = over_quad(mass[r]);
    const float scale[2] = {max_logit[0] == -kInfinity ? 0.f : 1.f / mass[0],
                            max_logit[1] == -kInfinity ? 0.f : 1.f / mass[1]};
    each([&](int row, int r, int c, float x) {
      const int column = work().column + c;
      const int64_t out = row_of(false, row);
      if (column < t.values.width)
        store(t.result.out.data, t.q.type, out * t.values.width + column,
              (max_logit[r] == -kInfinity ? 0.f : x * scale[r]) + q_nan[2 * r]);
      if (column != 0) return;
      const double total = static_cast<double>(max_logit[r]) + static_cast<double>(simt::log2(mass[r]));
      t.result.lse.data[out] =
          (max_logit[r] == -kInfinity ? -kInfinity : static_cast<float>(total * kLn2)) + q_nan[2 * r];
    });
  }

  SIMT_DEVICE void end_candidates() const {
    each([&](int row, int, int c, float x) {
      const int column = work().column + c;
      if (column < t.q.width) t.gradients.q.data[row_of(false, row) * t.q.width + column] = x * t.scale;
    });
  }

  SIMT_DEVICE void end_tokens() {
    const Work& w = work();
    const int64_t first = int64_t{w.token} * t.heads;
    const bool in_place = w.slot < 0;
    float* const slot = t.slots + w.slot * t.slot_floats();
    float* const d_keys = in_place ? t.gradients.keys.data + first * t.keys.width : slot;
    float* const d_values =
        in_place ? t.gradients.values.data + first * t.values.width : slot + int64_t{t.tokens} * t.heads * t.keys.width;
    float* const d_bias = in_place ? t.biases + w.head * t.token_rows + w.token
                                   : t.slot_biases + (int64_t{w.slot} * t.heads + w.head) * t.tokens;
    SIMT_EACH (r, 2) mass[r] = over_quad(mass[r]);
    each([&](int row, int r, int c, float x) {
      const int64_t out = int64_t{row} * t.heads + w.head;
      const int column = w.column + c % (kColumns / 2);
      if (c < kColumns / 2 && column < t.keys.width) d_keys[out * t.keys.width + column] = x * t.scale;
      if (c >= kColumns / 2 && column < t.values.width) d_values[out * t.values.width + column] = x;
      if (c == 0 && w.column == 0 && t.gradients.bias.data) d_bias[row] = mass[r];
    });
  }

  const Task& t;
  float z[kRows / 8][4], slopes[kRows / 8][4], sum[kColumns / 8][4], max_logit[2], mass[2];
};

}  // namespace hisac::cuda::attention
