// SPDX-License-Identifier: Apache-2.0
// What `encode` is told, and a warp's 32 rows in shared memory: x of any type, width and alignment, residuals, the
// canonical distance.
#pragma once
#include "codebook/image.h"
#include "cuda/device/block.h"

namespace hisac::cuda {

constexpr int kChunk = 128;  // columns of x at a time, as operands

struct EncodeTask {
  explicit EncodeTask(const Codebook& codebook) : book(codebook) {}

  CodebookImage book;
  Rows x;
  bool aligned = false;  // rows of whole 16 bytes at 16
  int32_t* codes = nullptr;
  const std::byte* image = nullptr;
  int warps = 0;
  bool on_chip = true;
  int64_t tiles = 0;  // of 32 rows a warp
  struct Offsets {    // in shared memory
    int residuals, panels, heads, kept;
  } offset = {};

  SIMT_BOTH int chunk() const { return book.depth < kChunk ? book.depth : kChunk; }
  SIMT_BOTH int chunks() const { return (book.depth + chunk() - 1) / chunk(); }
  SIMT_BOTH int held() const { return on_chip ? book.depth : chunk(); }  // columns of residuals
  SIMT_BOTH int row_pitch() const { return held() + 8; }     // floats; in banks 8 or 24 more than a multiple of 32
  SIMT_BOTH int panel_pitch() const { return chunk() + 8; }  // an odd number of 16 bytes, so that no bank conflicts
};

/// kOnChip: residuals stay in shared memory; else a chunk of them, made again from x and the codes so far.
template <bool kOnChip>
class EncodeRows {
 protected:
  static constexpr int kRows = 32;
  static constexpr int kBatch = 8;  // rows whose loads are under way together

  SIMT_DEVICE explicit EncodeRows(const EncodeTask& task) : t(task) {}

  template <int n>
  struct alignas(4 * n) Few {
    float value[n];
  };

  template <class T>
  SIMT_DEVICE const T* part(int64_t offset) const {
    return reinterpret_cast<const T*>(t.image + offset);
  }
  SIMT_DEVICE float* residuals(int row) const {
    return shared<float>(t.offset.residuals) + (simt::warp() * kRows + row) * t.row_pitch();
  }
  SIMT_DEVICE const float* center(int level, int code) const {
    return part<float>(t.book.level[level].pitched) + int64_t{code} * t.book.pitch;
  }
  SIMT_DEVICE bool alive(int row) const { return alive_ >> row & 1; }

  /// Rows from here on: which are there and finite; on the chip their elements.
  SIMT_DEVICE void begin(int64_t row) {
    row_ = row;
    alive_ = 0;
    for (int i = 0; i < kRows; ++i) alive_ |= static_cast<uint32_t>(row_ + i < t.x.rows) << i;
    SIMT_ROLLED for (int first = 0; first < t.book.depth; first += t.held()) load(first);
  }

  /// Columns [first, first + held) of x, zeros past D; a row with an element that is not finite is dead.
  SIMT_DEVICE void load(int first) {
    const int bytes = size_of(t.x.dtype), per = t.aligned ? 16 / bytes : 1, width = t.book.width;
    SIMT_UNLESS_PLANTED(28, simt::sync_warp());  // others have read what was there
    SIMT_ROLLED for (int row = 0; row < kRows; row += kBatch) {
      uint32_t broken = 0;
      SIMT_ROLLED for (int d = simt::lane() * per; d < t.held(); d += 32 * per) {
        simt::Quad raw[kBatch];
        SIMT_EACH (j, kBatch) {
          raw[j] = {};
          if (row_ + row + j >= t.x.rows || first + d >= width) continue;
          const std::byte* const from =
              static_cast<const std::byte*>(t.x.data) + ((row_ + row + j) * width + first + d) * bytes;
          if (t.aligned)
            raw[j] = *reinterpret_cast<const simt::Quad*>(from);
          else
            raw[j].word[0] = simt::bits_of(element(from, t.x.dtype, 0));
        }
        SIMT_EACH (j, kBatch) {
          Few<4> f[2] = {};
          SIMT_EACH (i, 4) {
            const uint32_t w = raw[j].word[i];
            if (per < 8)
              f[0].value[i] = simt::float_of(w);
            else
              SIMT_EACH (k, 2) f[i / 2].value[i % 2 * 2 + k] = half_of(w, k, t.x.dtype);
          }
          SIMT_EACH (i, 8)
            if (!finite(f[i / 4].value[i % 4])) broken |= 1u << j;
          float* const to = residuals(row + j) + d;
          if (per == 1) {
            to[0] = f[0].value[0];
            continue;
          }
          *reinterpret_cast<Few<4>*>(to) = f[0];
          if (per == 8) reinterpret_cast<Few<4>*>(to)[1] = f[1];
        }
      }
      SIMT_EACH (j, kBatch) {
        const bool dead = simt::ballot(broken >> j & 1);
        SIMT_UNLESS_PLANTED(27, alive_ &= ~(static_cast<uint32_t>(dead) << (row + j)));
      }
    }
  }

  /// r <- r - c in the columns held, from `first` on; lane i has row i's code.
  SIMT_DEVICE void subtract(int level, int row_code, int first) {
    SIMT_UNLESS_PLANTED(21, simt::sync_warp());  // others have read them, or written
    SIMT_ROLLED for (int row = 0; row < kRows; row += kBatch) {
      int code[kBatch];
      SIMT_EACH (j, kBatch) code[j] = simt::shuffle(row_code, row + j);
      SIMT_ROLLED for (int d = simt::lane() * 4; d < t.held() && first + d < t.book.pitch; d += 128) {
        Few<4> c[kBatch];
        SIMT_EACH (j, kBatch) c[j] = *reinterpret_cast<const Few<4>*>(center(level, code[j]) + first + d);
        SIMT_EACH (j, kBatch) {
          Few<4>& r = *reinterpret_cast<Few<4>*>(residuals(row + j) + d);
          SIMT_EACH (i, 4) r.value[i] -= c[j].value[i];
        }
      }
    }
  }

  /// Off the chip: a chunk of the level's residuals.
  SIMT_DEVICE void fill(int level, int chunk) {
    const int64_t row = row_ + simt::lane();
    load(chunk * t.chunk());
    SIMT_ROLLED for (int l = 0; l < level; ++l) {
      const int code = alive(simt::lane()) ? t.codes[row * t.book.levels + l] : 0;
      subtract(l, code, chunk * t.chunk());
    }
    simt::sync_warp();
  }

  /// The definition: sum over d in index order of (r_d - c_d)^2 in float64, for a pair of each lane; zeros at the end
  /// change nothing.
  SIMT_DEVICE double distance(int level, int row, int code) {
    const float* const c = center(level, code);
    double sum = 0;
    SIMT_ROLLED for (int begin = 0; begin < t.book.pitch; begin += t.held()) {
      if (!kOnChip) fill(level, begin / t.chunk());
      const int end = least(t.book.pitch - begin, t.held());
      SIMT_ROLLED for (int first = 0; first < end; first += 4 * kBatch) {
        Few<4> b[kBatch];
        SIMT_EACH (j, kBatch)
          if (first + 4 * j < end) b[j] = *reinterpret_cast<const Few<4>*>(c + begin + first + 4 * j);
        SIMT_EACH (j, kBatch) {
          if (first + 4 * j >= end) continue;
          const Few<4> r = *reinterpret_cast<const Few<4>*>(residuals(row) + first + 4 * j);
          SIMT_EACH (i, 4) {
            const double step = simt::plain_sum(static_cast<double>(r.value[i]), -static_cast<double>(b[j].value[i]));
            sum = simt::plain_sum(sum, simt::plain_product(step, step));
          }
        }
      }
    }
    return sum;
  }

  const EncodeTask& t;
  int64_t row_ = 0;     // the warp's first
  uint32_t alive_ = 0;  // a bit a row
};

}  // namespace hisac::cuda
