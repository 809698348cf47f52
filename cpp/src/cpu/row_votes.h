// SPDX-License-Identifier: Apache-2.0
// How many votes each row of a user has (the definition is in hisac/vote.h): 32-bit numbers, or where weights are int64
// 64-bit ones. Loops have no branch, so that they are vectorised.
#pragma once
#include <algorithm>
#include <cstring>

#include "base/radix_sort.h"
#include "codebook/body.h"
#include "hisac/histories.h"

namespace hisac::cpu {

/// Calls f(i, mask) for each of a user's rows [first, first + rows), counted from its first one: a mask of ones where
/// the row has a valid code, by its id where there are ids, else of zeros.
template <class F>
void each_row_with_leaf(const Codebook& book, const Histories& in, int64_t first, int64_t rows, F f) noexcept {
  constexpr int64_t kBlock = 256;
  uint32_t mask[kBlock];
  const int64_t levels = book.levels(), items = in.codes.shape[0];
  uint32_t size[kMaxLevels];
  for (int64_t l = 0; l < levels; ++l) size[l] = static_cast<uint32_t>(book.size(static_cast<int>(l)));
  const auto in_range = [&](const int32_t* codes, int64_t l) -> uint32_t {
    return static_cast<uint32_t>(codes[l]) < size[l] ? ~0u : 0;
  };
  for (int64_t begin = 0; begin < rows; begin += kBlock) {
    const int64_t n = std::min(rows - begin, kBlock), row = first + begin;
    const int32_t* const codes = in.codes.data + (in.x_ids ? 0 : row * levels);
    if (in.x_ids) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t item = in.x_ids[row + i];
        const bool inside = static_cast<uint64_t>(item) < static_cast<uint64_t>(items);
        mask[i] = inside && book.valid(codes + item * levels) ? ~0u : 0;
      }
    } else if (levels == 2) {
      for (int64_t i = 0; i < n; ++i) mask[i] = in_range(codes + 2 * i, 0) & in_range(codes + 2 * i, 1);
    } else {
      for (int64_t i = 0; i < n; ++i) {
        mask[i] = ~0u;
        for (int64_t l = 0; l < levels; ++l) mask[i] &= in_range(codes + i * levels, l);
      }
    }
    for (int64_t i = 0; i < n; ++i) f(begin + i, mask[i]);
  }
}

inline int32_t as_bits(float x) noexcept {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float as_float(int32_t bits) noexcept {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

/// votes [rows] of a user's rows [first, first + rows), of which there are at most kMostVoters; without weights, or of
/// float32.
inline void row_votes(const Codebook& book, const Histories& in, int64_t first, int64_t rows,
                      uint32_t* votes) noexcept {
  if (!in.weights) {
    each_row_with_leaf(book, in, first, rows, [=](int64_t i, uint32_t mask) { votes[i] = mask & 1; });
    return;
  }
  // Bits in the place of floats, because comparisons of floats are not vectorised. The order of floats above 0 is that
  // of their bits.
  constexpr int32_t kLargest = 0x7f7fffff, kInfinity = 0x7f800000;  // NaN above it, or below 0
  const float* const weights = static_cast<const float*>(in.weights.data) + first;
  each_row_with_leaf(book, in, first, rows, [=](int64_t i, uint32_t mask) {
    const int32_t w = as_bits(weights[i]), limited = w < kLargest ? w : kLargest;
    const uint32_t some = w > 0 ? mask : 0;
    votes[i] = w <= kInfinity ? static_cast<uint32_t>(limited) & some : 0;
  });
  int32_t largest = 0, n = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t own = static_cast<int32_t>(votes[i]);
    largest = largest < own ? own : largest;
    n += own != 0;
  }
  if (n == 0) return;
  const int bits = std::min(kWeightBits, kVoteBits - bits_of(static_cast<uint64_t>(n)));
  const float all = as_float(largest), most = static_cast<float>(1 << bits);
  const int32_t whole = as_bits(0x1p23f);  // floats from 2^23 on are whole
  for (int64_t i = 0; i < rows; ++i) {
    const float share = as_float(static_cast<int32_t>(votes[i])) / all * most, rounded = share + 0x1p23f - 0x1p23f;
    const int32_t fraction = -static_cast<int32_t>(as_bits(share) < whole);  // a mask of ones or of zeros
    const float near = as_float((as_bits(rounded) & fraction) | (as_bits(share) & ~fraction));
    votes[i] = static_cast<uint32_t>(static_cast<int32_t>(near));
  }
}

/// The same of int64 weights.
inline void row_votes(const Codebook& book, const Histories& in, int64_t first, int64_t rows,
                      uint64_t* votes) noexcept {
  const int64_t* const weights = static_cast<const int64_t*>(in.weights.data) + first;
  constexpr int64_t kMost = kMostVotes;
  each_row_with_leaf(book, in, first, rows, [=](int64_t i, uint32_t mask) {
    votes[i] = mask ? static_cast<uint64_t>(std::clamp<int64_t>(weights[i], 0, kMost)) : 0;
  });
  uint64_t sum = 0;
  for (int64_t i = 0; i < rows; ++i) sum += votes[i];
  const int shift = std::max(bits_of(sum) - kVoteBits, 0);
  for (int64_t i = 0; shift && i < rows; ++i) votes[i] >>= shift;
}

}  // namespace hisac::cpu
