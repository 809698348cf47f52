// SPDX-License-Identifier: Apache-2.0
// What k-means knows of the rows of a source that is read chunk by chunk: residuals, made anew whenever they are read,
// the first rows of distinct values in an order, and how large values are.
#pragma once
#include <algorithm>
#include <cstring>

#include "base/arena.h"
#include "cpu/rows.h"
#include "hisac/codebook.h"

namespace hisac::cpu {

constexpr float kFitLimit = 0x1p100f;
// A pass keeps sums below 2^62 in units of 2^(E + b - 61), E the exponent of the largest of n < 2^b values. Rows take
// part up to E = m + 46 - b, m that of the median row: its unit is 2^(m - 15) at most, what it rounds off 2^(m - 16).
constexpr int kFitRange = 46;
// Weights are summed in units of 2^(E + b - 61) too. From exponent E + b - 56 on, a weight has 2^(60 - 56) units or
// more, so the weight of a code is not off by more than 2^-5 of it.
constexpr int kWeightRange = 56;
constexpr int kExponents = 640;   // of a weighted value: from 2^-320 to 2^320
constexpr int32_t kLeftOut = -2;  // the code of a row that takes no part
constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;

inline uint64_t mix64(uint64_t z) noexcept {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

/// The largest |x|, or NaN if one is. Positive floats are ordered as their bits.
inline float largest_of(const float* x, int64_t n) noexcept {
  int32_t largest_bits = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    largest_bits = std::max(largest_bits, bits & 0x7fffffff);
  }
  float largest;
  std::memcpy(&largest, &largest_bits, 4);
  return largest;
}

inline int exponent_of(double x) noexcept {
  int exponent = 0;
  std::frexp(x, &exponent);
  return exponent;
}

/// What tells apart sources of other rows: a part of a sum, of row i and its largest |x|.
inline uint64_t mark_of(int64_t i, double largest) noexcept {
  uint64_t bits;
  std::memcpy(&bits, &largest, 8);
  return mix64(bits + static_cast<uint64_t>(i + 1) * kGolden);
}

/// How many values have each binary exponent; at the end, zeros.
struct Exponents {
  int64_t* count;  // [kExponents + 1]

  void add(double value) const noexcept { ++count[value > 0 ? exponent_of(value) + kExponents / 2 : kExponents]; }
  int64_t up_to(int limit) const noexcept {
    int64_t found = count[kExponents];  // zero is below every limit
    for (int e = 0; e < std::min(kExponents, limit + kExponents / 2 + 1); ++e) found += count[e];
    return found;
  }
  int64_t total() const noexcept { return up_to(kExponents); }
  /// The exponent of the value of this rank, ascending, among those above 0; 0 where there is none.
  int at(int64_t rank) const noexcept {
    for (int e = 0; e < kExponents; ++e)
      if ((rank -= count[e]) < 0) return e - kExponents / 2;
    return 0;
  }
  int64_t above_zero() const noexcept { return total() - count[kExponents]; }
  int median() const noexcept { return at(above_zero() / 2); }
  int largest() const noexcept { return at(above_zero() - 1); }
};

/// The rows of a chunk less the centers of their codes in the levels above.
struct Residuals {
  Rows x;         // the chunk
  int64_t first;  // of the chunk's rows, among all of this process
  int level;
  const int32_t* codes;        // [levels, rows]
  int64_t rows;                // of this process
  const float* const* center;  // of each level above, [C, D]

  /// out [count] = columns [begin, begin + count) of row i of this process.
  void load(int64_t i, int64_t begin, int64_t count, float* out) const noexcept {
    const simd::Kernels& k = simd::kernels();
    const int64_t at = (i - first) * x.width + begin;
    k.load_row(static_cast<const std::byte*>(x.data) + at * bytes_of(x.dtype), x.dtype, count, out);
    for (int l = 0; l < level; ++l) k.add_row(count, center[l] + codes[l * rows + i] * x.width + begin, -1.f, out);
  }
  void load(int64_t i, float* out) const noexcept { load(i, 0, x.width, out); }

  __attribute__((always_inline)) void prefetch(int64_t i) const noexcept {
    const int64_t bytes = x.width * bytes_of(x.dtype);
    const std::byte* const row = static_cast<const std::byte*>(x.data) + (i - first) * bytes;
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
    for (int l = 0; l < level; ++l) {
      const float* const c = center[l] + codes[l * rows + i] * x.width;
      for (int64_t d = 0; d < x.width; d += 16) __builtin_prefetch(c + d);
    }
  }
};

/// The first rows, by (key, row), of which no two have one value, out of all that are added in any order; -0 equals 0.
class FirstDistinct {
 public:
  struct Entry {
    uint64_t key;
    int64_t row, place;  // place: of its values
    bool operator<(const Entry& o) const noexcept { return key != o.key ? key < o.key : row < o.row; }
  };

  void carve(Arena& arena, int64_t most, int64_t width) noexcept {
    most_ = most;
    width_ = width;
    for (slots_ = 16; slots_ < 4 * most;) slots_ *= 2;
    entry_ = arena.take<Entry>(2 * most);
    values_ = arena.take<float>(2 * most, width);
    table_ = arena.take<int64_t>(slots_);
  }

  void start(int64_t wanted) noexcept {
    wanted_ = std::min(wanted, most_);
    count_ = 0;
    full_ = wanted_ == 0;
    last_ = {};
    for (int64_t i = 0; i < 2 * most_; ++i) entry_[i].place = i;
  }

  /// Whether a row may be among the first.
  bool wants(uint64_t key, int64_t row) const noexcept { return !full_ || (wanted_ > 0 && Entry{key, row, 0} < last_); }

  /// Adds a row that is wanted; returns where its values [D] have to go at once.
  float* add(uint64_t key, int64_t row) noexcept {
    if (count_ == 2 * most_) settle();
    entry_[count_].key = key;
    entry_[count_].row = row;
    return values_ + entry_[count_++].place * width_;
  }

  /// Sorts the entries and drops all but the first distinct ones; returns how many there are.
  int64_t settle() noexcept {
    std::sort(entry_, entry_ + count_);
    std::fill(table_, table_ + slots_, int64_t{-1});
    int64_t found = 0;
    for (int64_t i = 0; i < count_ && found < wanted_; ++i) {
      const float* const row = values_ + entry_[i].place * width_;
      int64_t slot = static_cast<int64_t>(hash(row) & static_cast<uint64_t>(slots_ - 1));
      while (table_[slot] >= 0 && !std::equal(row, row + width_, values_ + table_[slot] * width_))
        slot = (slot + 1) & (slots_ - 1);
      if (table_[slot] >= 0) continue;
      table_[slot] = entry_[i].place;
      std::swap(entry_[found++], entry_[i]);
    }
    count_ = found;
    full_ = found == wanted_;
    if (found > 0) last_ = entry_[found - 1];
    return found;
  }

  /// What `tell` writes, of so many rows at most.
  static int64_t told_words(int64_t rows, int64_t width) noexcept { return 1 + rows * (2 + (width + 1) / 2); }

  /// Writes how many rows there are, then key, row and values of each.
  void tell(int64_t* words) noexcept {
    *words = settle();
    ++words;
    for (int64_t i = 0; i < count_; ++i, words += told_words(1, width_) - 1) {
      std::memcpy(words, &entry_[i].key, 8);
      words[1] = entry_[i].row;
      std::memcpy(words + 2, values(i), static_cast<size_t>(width_) * sizeof(float));
    }
  }

  /// Adds what another one told.
  void hear(const int64_t* words) noexcept {
    const int64_t* at = words + 1;
    for (int64_t i = 0; i < words[0]; ++i, at += told_words(1, width_) - 1) {
      uint64_t key;
      std::memcpy(&key, at, 8);
      if (wants(key, at[1])) std::memcpy(add(key, at[1]), at + 2, static_cast<size_t>(width_) * sizeof(float));
    }
  }

  const float* values(int64_t i) const noexcept { return values_ + entry_[i].place * width_; }

 private:
  uint64_t hash(const float* row) const noexcept {
    uint64_t found = 0;
    for (int64_t d = 0; d < width_; ++d) {
      const float x = row[d] + 0.f;  // -0 equals 0
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      found = (found ^ bits) * kGolden;
      found ^= found >> 29;
    }
    return found;
  }

  int64_t most_ = 0, width_ = 0, slots_ = 0, wanted_ = 0, count_ = 0;
  bool full_ = false;  // whether a row after `last_` comes too late
  Entry last_ = {};
  Entry* entry_ = nullptr;    // [2 most]
  float* values_ = nullptr;   // [2 most, D]
  int64_t* table_ = nullptr;  // of places, by the hash of their values
};

}  // namespace hisac::cpu
