// SPDX-License-Identifier: Apache-2.0
// Radix sort, least significant digit first, without a branch that depends on a key. Digits are wider for more keys.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>

namespace hisac {

constexpr int kIndexBits = 24;  // of an index among a user's rows
constexpr int64_t kMostVoters = (int64_t{1} << kIndexBits) - 1;
constexpr int kVoteBits = 64 - kIndexBits;
constexpr uint64_t kMostVotes = (uint64_t{1} << kVoteBits) - 1;  // of a user
constexpr int kWeightBits = 24;  // the row of the largest float weight has at most 2^24 votes
constexpr int kMostDigit = 11;

/// A key whose ascending order is: more votes first, then the lower index.
inline uint64_t sort_key(int64_t votes, int64_t index) noexcept {
  return (kMostVotes - static_cast<uint64_t>(votes)) << kIndexBits | static_cast<uint64_t>(index);
}
inline int64_t index_of(uint64_t key) noexcept { return static_cast<int64_t>(key & kMostVoters); }

inline int bits_of(uint64_t n) noexcept { return n ? 64 - __builtin_clzll(n) : 0; }

/// Sorts key[0, n), and the payload beside it where there is one, by G digits from bit `low` on, stably. The results
/// are in key and payload, which may have been swapped with the spares. T counts to n.
template <bool with_payload, int G, class T>
void radix_passes(int64_t n, int low, int digit, uint64_t*& key, uint64_t*& spare, T*& payload,
                  T*& spare_payload) noexcept {
  const uint64_t mask = (uint64_t{1} << digit) - 1;
  T offset[G][1 << kMostDigit];
  for (int g = 0; g < G; ++g) std::fill(offset[g], offset[g] + mask + 1, T{0});
  for (int64_t i = 0; i < n; ++i)
    for (int g = 0; g < G; ++g) ++offset[g][key[i] >> (low + g * digit) & mask];
  T total[G] = {};
  for (uint64_t d = 0; d <= mask; ++d)
    for (int g = 0; g < G; ++g) total[g] += std::exchange(offset[g][d], total[g]);
  for (int g = 0; g < G; ++g, low += digit) {
    for (int64_t i = 0; i < n; ++i) {
      const T target = offset[g][key[i] >> low & mask]++;
      spare[target] = key[i];
      if (with_payload) spare_payload[target] = payload[i];
    }
    std::swap(key, spare);
    if (with_payload) std::swap(payload, spare_payload);
  }
}

/// radix_passes by all of bits [low, high).
template <bool with_payload, class T>
void radix_sort(int64_t n, int low, int high, uint64_t*& key, uint64_t*& spare, T*& payload,
                T*& spare_payload) noexcept {
  if (n < 2 || high <= low) return;
  const int widest = std::clamp(bits_of(static_cast<uint64_t>(n)), 6, kMostDigit);
  const int passes = (high - low + widest - 1) / widest, digit = (high - low + passes - 1) / passes;
  for (int remaining = passes; remaining > 0;) {
    const int digits = std::min(remaining, 3);
    const auto step = digits == 3   ? radix_passes<with_payload, 3, T>
                      : digits == 2 ? radix_passes<with_payload, 2, T>
                                    : radix_passes<with_payload, 1, T>;
    step(n, low, digit, key, spare, payload, spare_payload);
    remaining -= digits;
    low += digits * digit;
  }
}

/// Sorts keys of sort_key; all_votes has every bit that their votes have.
inline void sort_by_votes(int64_t n, int64_t all_votes, uint64_t*& key, uint64_t*& spare) noexcept {
  uint32_t* no_payload = nullptr;
  if (n <= 16)
    std::sort(key, key + n);
  else
    radix_sort<false>(n, kIndexBits, kIndexBits + bits_of(static_cast<uint64_t>(all_votes)), key, spare, no_payload,
                      no_payload);
}

}  // namespace hisac
