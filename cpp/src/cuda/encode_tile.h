// SPDX-License-Identifier: Apache-2.0
// The inner kernel of `encode`. A block's warps take 32 rows each through all levels and share the codes that stream
// past, 32 at a time:
//
//   warp w         32 rows. In registers: a chunk of their residuals as float16 operands, scores z [32 rows, 32 codes],
//                  what bounds the scores' errors.
//   shared memory  residuals of all rows in float32, or a chunk of them where D is too large; two buffers for panels,
//                  that is 32 codes by a chunk of up to 128 columns in float16, and for the codes' norms and bounds;
//                  survivors, up to 8 for each row and each of the 4 lanes that hold its scores.
//
// A step is a tile of codes by a chunk. Step s: the panel of s + 1 begins to arrive (cp.async) in buffer (s + 1) % 2,
// that in buffer s % 2 is multiplied; after a tile's last chunk its codes are screened. After a level's last tile, what
// the screen cannot decide is re-scored in float64, as the definition says, and the codes' centers are subtracted.
//
// Why the screen is safe. With a and b_c the residual and a center less the mean, times the level's scale (see
// codebook/image.h), s_c = |b_c|^2 / 2 - a . b_c is half the scaled square distance, less a constant of the row.
// Multiplied are A and B_c, the same in float16. Let R, E, N_c, F_c bound |a|, |A - a|, |b_c|, |B_c - b_c|, where
// subnormal float16 counts as lost, that is sqrt(D) 2^-14 of each; N the largest N_c; u = 2^-24; P = R + E.
//   - |A . B_c - a . b_c| <= E N_c + P F_c;
//   - a tensor core may cut each of the 17 terms of a step, and their sum, by 2^-23 of the largest: D / 16 steps lose
//     at most D 2^-22 of |b_c|^2 / 2 + P (N_c + F_c);
//   - rounding the stored half norm, the bounds and the thresholds loses at most 64 2^-22 of (P + N) N_c;
// so with g = (D + 64) 2^-22 the score z_c = -s_c of the tensor cores errs by at most
//     N_c (E + g (P + N)) + F_c P (1 + g);
//   - the definition's own float64 sums err by (D + 3) 2^-53 (R + N)^2 each: `slack_` for two.
// All codes of a tile are given its largest N_c and F_c. A code survives unless its greatest possible score is below
// the least possible one of another. Where a square might overflow, every code survives.
#pragma once
#include "cuda/encode_rows.h"

namespace hisac::cuda {

template <bool kOnChip>
class EncodeTile : EncodeRows<kOnChip> {
  using Base = EncodeRows<kOnChip>;
  using Base::subtract;
  using Base::t, Base::row_, Base::alive_, Base::kRows, Base::alive, Base::center, Base::distance, Base::residuals;
  template <int n>
  using Few = typename Base::template Few<n>;

  static constexpr int kCodes = CodebookImage::kCodes, kHead = CodebookImage::kHead;
  static constexpr uint32_t kKept = 8;  // survivors of a row that a lane keeps

 public:
  static constexpr int kKeptBytes = kRows * 4 * int{kKept} * 4;  // of a warp

  SIMT_DEVICE explicit EncodeTile(const EncodeTask& task) : Base(task) {}

  SIMT_DEVICE void run() {
    int64_t tile = simt::block();
    if (tile >= t.tiles) return;
    Step s;
    fetch(s);
    for (; tile < t.tiles; tile += simt::blocks()) {
      more_ = tile + simt::blocks() < t.tiles;
      Base::begin((tile * t.warps + simt::warp()) * kRows);
      SIMT_ROLLED for (int level = 0; level < t.book.levels; ++level) {
        s = sweep(s);
        decide(level);
        if (kOnChip && level + 1 < t.book.levels) subtract(level, code_, 0);
      }
    }
  }

 private:
  struct Step {
    int level = 0, tile = 0, chunk = 0;
    int panel = 0, head = 0;  // buffers
  };
  SIMT_DEVICE Step after(Step s) const {
    const int panel = s.panel ^ 1, head = s.head ^ 1;
    if (s.chunk + 1 < t.chunks()) return {s.level, s.tile, s.chunk + 1, panel, s.head};
    if (s.tile + 1 < t.book.level[s.level].tiles) return {s.level, s.tile + 1, 0, panel, head};
    return {s.level + 1 < t.book.levels ? s.level + 1 : 0, 0, 0, panel, head};
  }

  SIMT_DEVICE uint16_t* panel(int buffer) const {
    return shared<uint16_t>(t.offset.panels) + buffer * kCodes * t.panel_pitch();
  }
  SIMT_DEVICE float* head(int buffer) const { return shared<float>(t.offset.heads) + buffer * kHead; }
  SIMT_DEVICE int32_t* kept(int row, int quad) const {
    return shared<int32_t>(t.offset.kept) + ((simt::warp() * kRows + row) * 4 + quad) * kKept;
  }
  SIMT_DEVICE const CodebookImage::Screen& screen_of(int level) const {
    return *Base::template part<CodebookImage::Screen>(t.book.level[level].screen);
  }
  SIMT_DEVICE int columns(int chunk) const { return least(t.book.depth - chunk * t.chunk(), t.chunk()); }

  SIMT_DEVICE void fetch(Step s) const {
    const CodebookImage::Level& level = t.book.level[s.level];
    const uint16_t* const from =
        Base::template part<uint16_t>(level.panels) + int64_t{s.tile} * kCodes * t.book.depth + s.chunk * t.chunk();
    const int lane = simt::thread() & 15;
    SIMT_ROLLED for (int c = simt::thread() / 16; c < kCodes; c += simt::threads() / 16) {
      if (lane * 8 >= columns(s.chunk)) continue;
      simt::copy16(panel(s.panel) + c * t.panel_pitch() + lane * 8, from + int64_t{c} * t.book.depth + lane * 8, true);
    }
    const int piece = simt::thread() * 4;
    if (s.chunk == 0 && piece < kHead)
      simt::copy16(head(s.head) + piece, Base::template part<float>(level.heads) + int64_t{s.tile} * kHead + piece,
                   true);
    simt::commit();
  }

  // ---- the screen; row slot 2 h + r of a lane is row 16 h + 8 r + lane / 4

  /// All tiles of a level; the step after them.
  SIMT_DEVICE Step sweep(Step s) {
    const int level = s.level, tiles = static_cast<int>(t.book.level[level].tiles);
    SIMT_EACH (i, 4) {
      squares_[i] = errors_[i] = 0;
      least_[i] = greatest_[i] = -kInfinity;
    }
    counts_ = every_ = 0;
    SIMT_ROLLED for (int n = tiles * t.chunks(); n > 0; --n) {
      SIMT_UNLESS_PLANTED(22, simt::template wait<0>());
      SIMT_UNLESS_PLANTED(23, simt::sync());
      const Step next = after(s);
      if (n > 1 || level + 1 < t.book.levels || more_) fetch(next);
      if (!kOnChip || t.chunks() > 1 || s.tile == 0) {
        if (!kOnChip) Base::fill(level, s.chunk);
        if (s.tile == 0)
          make<true>(s);
        else
          make<false>(s);
      }
      if (s.tile == 0 && s.chunk + 1 == t.chunks()) bound(level);
      multiply(s);
      if (s.chunk + 1 == t.chunks()) screen(s);
      s = next;
    }
    return s;
  }

  /// A chunk of the rows as operands; measured: what they are and what they lose.
  template <bool kMeasured>
  SIMT_DEVICE void make(Step s) {
    const int q = simt::lane() & 3, begin = s.chunk * t.chunk(), pitch = 8 * t.row_pitch();
    const CodebookImage::Screen& screen = screen_of(s.level);
    const float scale = screen.scale, *const mean = reinterpret_cast<const float*>(&screen + 1) + begin + 2 * q;
    const float* const r = residuals(simt::lane() >> 2) + (kOnChip ? begin : 0) + 2 * q;
    SIMT_EACH (k, kChunk / 16) {
      Few<2> f[2][4], m[2];
      if (k * 16 < columns(s.chunk)) {
        SIMT_EACH (i, 2) {
          m[i] = *reinterpret_cast<const Few<2>*>(mean + k * 16 + i * 8);
          SIMT_EACH (slot, 4) f[i][slot] = *reinterpret_cast<const Few<2>*>(r + slot * pitch + k * 16 + i * 8);
        }
      }
      SIMT_EACH (i, 2)
        SIMT_EACH (slot, 4) {
          uint32_t& pair = a_[k][slot / 2][2 * i + slot % 2];
          pair = 0;  // a register that is not written would have to be kept
          if (k * 16 >= columns(s.chunk)) continue;
          float y[2];
          SIMT_EACH (j, 2) y[j] = (f[i][slot].value[j] - m[i].value[j]) * scale;
          pair = simt::pack_half(y[0], y[1]);
          SIMT_EACH (j, 2) {
            if (!kMeasured) continue;
            const float lost = y[j] - simt::from_half(static_cast<uint16_t>(pair >> (16 * j)));
            squares_[slot] = simt::fused(y[j], y[j], squares_[slot]);
            errors_[slot] = simt::fused(lost, lost, errors_[slot]);
          }
        }
    }
  }

  /// The level's bounds for each row.
  SIMT_DEVICE void bound(int level) {
    const float width = static_cast<float>(t.book.width), most = screen_of(level).largest;
    const float lost = simt::root(width) * 0x1p-14f, g = (width + 64) * 0x1p-22f;
    SIMT_EACH (i, 4) {
      squares_[i] = over_quad(squares_[i]);
      errors_[i] = over_quad(errors_[i]);
      const float norm = 1.01f * simt::root(squares_[i]) + lost;
      const float error = 1.01f * simt::root(errors_[i]) + 0x1p-22f * norm + lost, both = norm + error;
      by_norm_[i] = error + g * (both + most);
      by_error_[i] = both * (1 + g);
      slack_[i] = (width + 8) * 0x1p-52f * (norm + most) * (norm + most);
      every_ |= static_cast<uint32_t>(!(squares_[i] < 0x1p30f && most < 0x1p8f)) << i;
    }
  }

  SIMT_DEVICE void multiply(Step s) {
    const int q = simt::lane() & 3;
    if (s.chunk == 0)
      SIMT_EACH (n, kCodes / 8) {
        const Few<2> half = *reinterpret_cast<const Few<2>*>(head(s.head) + n * 8 + 2 * q);
        SIMT_EACH (h, 2)
          SIMT_EACH (i, 4) z_[h][n][i] = half.value[i & 1];
      }
    const int code = (simt::lane() & 7) + (simt::lane() >> 4) * 8;  // so that each factor's registers are neighbours
    const uint16_t* const b = panel(s.panel) + code * t.panel_pitch() + (simt::lane() & 8);
    uint32_t c[2][kCodes / 16][4];  // loaded a step before their use
    SIMT_EACH (n, kCodes / 16) simt::load_matrices(c[0][n], b + n * 16 * t.panel_pitch());
    SIMT_EACH (k, kChunk / 16) {
      if (k * 16 >= columns(s.chunk)) continue;
      if (k * 16 + 16 < columns(s.chunk))
        SIMT_EACH (n, kCodes / 16) simt::load_matrices(c[(k + 1) & 1][n], b + n * 16 * t.panel_pitch() + k * 16 + 16);
      SIMT_EACH (n, kCodes / 16)
        SIMT_EACH (h, 2) {
          simt::multiply_add_half(z_[h][2 * n], a_[k][h], c[k & 1][n][0], c[k & 1][n][1]);
          simt::multiply_add_half(z_[h][2 * n + 1], a_[k][h], c[k & 1][n][2], c[k & 1][n][3]);
        }
    }
  }

  /// Survivors so far. A lane's are void once the least score that the nearest can have is above all that they reach.
  SIMT_DEVICE void screen(Step s) {
    const float* const bounds = head(s.head) + kCodes;
    float largest[4], best[4], lowest_score[4];
    bool passes = false;
    SIMT_EACH (i, 4) {
      float (&z)[kCodes / 8][4] = z_[i / 2];
      largest[i] = larger(z[0][i % 2 * 2], z[0][i % 2 * 2 + 1]);
      SIMT_EACH (n, kCodes / 8) largest[i] = larger(largest[i], larger(z[n][i % 2 * 2], z[n][i % 2 * 2 + 1]));
      best[i] = largest[i];
    }
    for (int m = 1; m < 4; m *= 2)
      SIMT_EACH (i, 4) best[i] = larger(best[i], simt::shuffle_xor(best[i], m));
    SIMT_EACH (i, 4) {
      float reach = 0;
      SIMT_UNLESS_PLANTED(24,
                          reach = simt::fused(bounds[0], by_norm_[i], simt::fused(bounds[1], by_error_[i], slack_[i])));
      least_[i] = larger(least_[i], best[i] - reach);
      if (least_[i] > greatest_[i]) counts_ &= ~(255u << (8 * i));
      greatest_[i] = larger(greatest_[i], best[i] + reach);
      lowest_score[i] = least_[i] - reach;
      passes = passes || largest[i] >= lowest_score[i];
    }
    uint32_t passed = 0;
    if (passes)
      SIMT_EACH (i, 4)
        SIMT_EACH (n, kCodes / 8)
          SIMT_EACH (j, 2)
            passed |= static_cast<uint32_t>(z_[i / 2][n][i % 2 * 2 + j] >= lowest_score[i]) << (8 * i + 2 * n + j);
    SIMT_ROLLED for (; passed; passed &= passed - 1) {
      const int bit = lowest(passed), slot = bit / 8;
      const uint32_t n = counts_ >> (8 * slot) & 255;
      if (n < kKept)
        kept(slot * 8 + (simt::lane() >> 2), simt::lane() & 3)[n] =
            s.tile * kCodes + bit % 8 / 2 * 8 + (simt::lane() & 3) * 2 + bit % 2;
      if (n <= kKept) counts_ += 1u << (8 * slot);
    }
  }

  // ---- survivors; lane i has row i

  /// The k-th survivor of a row, given how many each of its lanes kept, a byte each.
  SIMT_DEVICE int survivor(int row, uint32_t counts, int k) const {
    int quad = 0;
    for (; quad < 3 && k >= static_cast<int>(counts & 255); ++quad, counts >>= 8) k -= static_cast<int>(counts & 255);
    return kept(row, quad)[k];
  }

  /// A code and its distance; the nearer wins, then the lower.
  struct Found {
    double distance = static_cast<double>(kInfinity);
    int code = 0;  // also where all distances are infinite
    SIMT_DEVICE void take(double d, int c) {
      bool wins = d < distance;
      SIMT_UNLESS_PLANTED(25, wins = wins || (d == distance && c < code));
      if (!wins) return;
      distance = d;
      code = c;
    }
  };

  SIMT_DEVICE void decide(int level) {
    const int lane = simt::lane();
    SIMT_UNLESS_PLANTED(29, simt::sync_warp());
    uint32_t counts = 0;
    SIMT_EACH (slot, 4) {
      uint32_t bytes = (every_ >> slot & 1 ? kKept + 1 : counts_ >> (8 * slot) & 255) << (8 * (lane & 3));
      bytes |= simt::shuffle_xor(bytes, 1);
      bytes |= simt::shuffle_xor(bytes, 2);
      bytes = simt::shuffle(bytes, (lane & 7) * 4);
      if (lane >> 3 == slot) counts = bytes;
    }
    uint32_t n = 0;
    bool every = false;
    SIMT_EACH (i, 4) {
      const uint32_t c = counts >> (8 * i) & 255;
      n += c;
      every = every || c > kKept;
    }
    const int pairs = alive(lane) && !every && n > 1 ? static_cast<int>(n) : 0;
    Found found;
    if (alive(lane) && !every && n == 1) found.code = survivor(lane, counts, 0);
    rescore(level, counts, pairs, found);
    for (uint32_t left = simt::ballot(every && alive(lane)); left; left &= left - 1) {
      const int row = lowest(left);
      Found nearest;
      SIMT_UNLESS_PLANTED(26, nearest = among_all(level, row));
      if (lane == row) found = nearest;
    }
    code_ = found.code;
    if (row_ + lane < t.x.rows) t.codes[(row_ + lane) * t.book.levels + level] = alive(lane) ? code_ : -1;
  }

  /// `pairs` of each lane's row and a survivor, in rounds of one pair for each lane.
  SIMT_DEVICE void rescore(int level, uint32_t counts, int pairs, Found& found) {
    const int lane = simt::lane();
    const int end = sum_so_far(pairs), first = end - pairs, total = simt::shuffle(end, 31);
    SIMT_ROLLED for (int begin = 0; begin < total; begin += 32) {
      const int pair = begin + lane;
      int row = 0;  // the first whose end is above
      for (int m = 16; m; m /= 2)
        if (simt::shuffle(end, row + m - 1) <= pair) row += m;
      const uint32_t its_counts = simt::shuffle(counts, row);
      const int its_first = simt::shuffle(first, row);
      const int its_code = pair < total ? survivor(row, its_counts, pair - its_first) : 0;
      Found candidate;
      candidate.take(distance(level, row, its_code), its_code);
      if (pair >= total) row = -1;
      for (int m = 1; m < 32; m *= 2) {  // a row's best comes to the first of its lanes
        const int from = lane + m < 32 ? lane + m : lane;
        const double d = simt::shuffle(candidate.distance, from);
        const int c = simt::shuffle(candidate.code, from);
        if (simt::shuffle(row, from) == row) candidate.take(d, c);
      }
      const int from = first > begin ? first - begin : 0;
      const double d = simt::shuffle(candidate.distance, from & 31);
      const int c = simt::shuffle(candidate.code, from & 31);
      if (from < 32 && end > begin && pairs) found.take(d, c);
    }
  }

  /// Of all codes, by the whole warp; a copy of the center before is never nearer.
  SIMT_DEVICE Found among_all(int level, int row) {
    const CodebookImage::Level& book = t.book.level[level];
    Found found;
    SIMT_ROLLED for (int tile = 0; tile < book.tiles; ++tile) {
      const bool real = Base::template part<float>(book.heads)[int64_t{tile} * kHead + simt::lane()] > -kInfinity;
      if (!simt::ballot(real)) continue;
      const int code = real ? tile * kCodes + simt::lane() : 0;
      found.take(distance(level, row, code), code);
    }
    for (int m = 16; m; m /= 2) {
      const double d = simt::shuffle_xor(found.distance, m);
      const int c = simt::shuffle_xor(found.code, m);
      found.take(d, c);
    }
    return found;
  }

  bool more_ = false;  // the block has rows after these
  int code_ = 0;
  uint32_t a_[kChunk / 16][2][4];
  float z_[2][kCodes / 8][4];
  float squares_[4], errors_[4], by_norm_[4], by_error_[4], slack_[4], least_[4], greatest_[4];
  uint32_t counts_, every_;  // of survivors, a byte a slot, up to kKept + 1; a bit a slot: all codes survive
};

}  // namespace hisac::cuda
