// SPDX-License-Identifier: Apache-2.0
// Sorting without branches on what is sorted: least significant digit first, digits as wide as the numbers are many.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>

namespace hisac {

constexpr int kPlaceBits = 24;  // of a place among a user's rows
constexpr int64_t kMostVoters = (int64_t{1} << kPlaceBits) - 1;
constexpr uint64_t kMostVotes = (uint64_t{1} << (64 - kPlaceBits)) - 1;  // 16 * 2^12 a row stay below
constexpr int kMostDigit = 11;

/// More votes first, then the lower place, as a number to be sorted upwards.
inline uint64_t rank_word(int64_t votes, int64_t place) noexcept {
  return (kMostVotes - static_cast<uint64_t>(votes)) << kPlaceBits | static_cast<uint64_t>(place);
}
inline int64_t place_of(uint64_t word) noexcept { return static_cast<int64_t>(word & kMostVoters); }

inline int bits_of(uint64_t n) noexcept { return n ? 64 - __builtin_clzll(n) : 0; }

/// Sorts key[0, n), and `load` beside it if there is one, by G digits from bit `low` on, stably; swaps with the spares.
/// T counts to n.
template <bool loaded, int G, class T>
void radix_passes(int64_t n, int low, int digit, uint64_t*& key, uint64_t*& spare, T*& load, T*& spare_load) noexcept {
  const uint64_t mask = (uint64_t{1} << digit) - 1;
  T at[G][1 << kMostDigit];
  for (int g = 0; g < G; ++g) std::fill(at[g], at[g] + mask + 1, T{0});
  for (int64_t i = 0; i < n; ++i)
    for (int g = 0; g < G; ++g) ++at[g][key[i] >> (low + g * digit) & mask];
  T total[G] = {};
  for (uint64_t d = 0; d <= mask; ++d)
    for (int g = 0; g < G; ++g) total[g] += std::exchange(at[g][d], total[g]);
  for (int g = 0; g < G; ++g, low += digit) {
    for (int64_t i = 0; i < n; ++i) {
      const T to = at[g][key[i] >> low & mask]++;
      spare[to] = key[i];
      if (loaded) spare_load[to] = load[i];
    }
    std::swap(key, spare);
    if (loaded) std::swap(load, spare_load);
  }
}

/// The same by bits [low, high).
template <bool loaded, class T>
void radix_sort(int64_t n, int low, int high, uint64_t*& key, uint64_t*& spare, T*& load, T*& spare_load) noexcept {
  if (n < 2 || high <= low) return;
  const int most = std::clamp(bits_of(static_cast<uint64_t>(n)), 6, kMostDigit);
  const int passes = (high - low + most - 1) / most, digit = (high - low + passes - 1) / passes;
  for (int left = passes; left > 0;) {
    const int now = std::min(left, 3);
    const auto step = now == 3   ? radix_passes<loaded, 3, T>
                      : now == 2 ? radix_passes<loaded, 2, T>
                                 : radix_passes<loaded, 1, T>;
    step(n, low, digit, key, spare, load, spare_load);
    left -= now;
    low += now * digit;
  }
}

/// Sorts rank words; all_votes: the bits that their votes have, at least.
inline void sort_ranks(int64_t n, int64_t all_votes, uint64_t*& rank, uint64_t*& spare) noexcept {
  uint32_t* nothing = nullptr;
  if (n <= 16)
    std::sort(rank, rank + n);
  else
    radix_sort<false>(n, kPlaceBits, kPlaceBits + bits_of(static_cast<uint64_t>(all_votes)), rank, spare, nothing,
                      nothing);
}

}  // namespace hisac
