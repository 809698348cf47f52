// SPDX-License-Identifier: Apache-2.0
// A block's means of order: running sums, and each user's rows sorted by leaf.
#pragma once
#include "cuda/leaf_sums.h"

namespace hisac::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kDigits = 256;  // of a pass; a thread each

/// store(i, sum of count(j) for j < i) by a block; the sum of all. sums: [kWarps] in shared memory.
template <class Count, class Store>
SIMT_DEVICE int64_t scan(int64_t n, int64_t* sums, Count count, Store store) {
  const int lane = simt::lane(), warp = simt::warp();
  int64_t before = 0;
  for (int64_t first = 0; first < n; first += kThreads) {
    const int64_t i = first + simt::thread(), number = i < n ? count(i) : 0;
    const int64_t sum = sum_so_far(number);
    simt::sync();
    if (lane == 31) sums[warp] = sum;
    simt::sync();
    int64_t place = before + sum - number;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) place += sums[w];
      before += sums[w];
    }
    if (i < n) store(i, place);
  }
  return before;
}

/// A block a user: its present rows by leaf, stably, least significant digit first. A warp has consecutive entries, so
/// places within a digit follow the warps, then the lanes.
class Sorter {
 public:
  static constexpr size_t kShared = kWarps * kDigits * 4 + kWarps * 8 + 8;

  SIMT_DEVICE explicit Sorter(const LeafTask& task) : t(task) {}

  SIMT_DEVICE void run() {
    int64_t* const user = sums() + kWarps;
    for (;;) {
      if (simt::thread() == 0) *user = simt::atomic_add(t.next, 1);
      simt::sync();
      const int64_t b = *user;
      if (b >= t.users) return;
      sort(b);
      simt::sync();
    }
  }

 private:
  SIMT_DEVICE int32_t* counts() const { return reinterpret_cast<int32_t*>(simt::shared()); }  // [kWarps, kDigits]
  SIMT_DEVICE int64_t* sums() const { return reinterpret_cast<int64_t*>(simt::shared() + kWarps * kDigits * 4); }

  SIMT_DEVICE void sort(int64_t b) {
    first = t.first[b];
    start = t.start(b);
    n = t.first[b + 1] - first;
    SIMT_UNLESS_PLANTED(17, n = n < t.length(b) ? 0 : n);  // a history that does not fit whole has no sums
    const int passes = t.bits > 8 ? (t.bits + 7) / 8 : 1;
    for (int p = 0; p < passes; ++p) {
      to = ((passes - p) % 2 ? t.entry : t.spare) + first;
      from = p == 0 ? nullptr : ((passes - p) % 2 ? t.spare : t.entry) + first;
      n = pass(8 * p);
    }
    from = t.entry + first;
    heads(b);
  }

  struct Entry {
    int32_t row;
    uint32_t digit;
    bool present;
  };
  SIMT_DEVICE Entry entry(int64_t e, int64_t end, int shift) const {
    const bool inside = e < end;
    const int64_t row = !inside ? 0 : from ? from[e] : start + e;
    const bool present = inside && (from || t.norm[row] >= 0);
    return {static_cast<int32_t>(row), present ? static_cast<uint32_t>(t.leaf[row] >> shift) & (kDigits - 1) : 0,
            present};
  }

  /// visit(row, same: the lanes that have the digit of this one, digit) for this warp's entries, 32 at a time, the next
  /// on their way; same is 0 where there is none.
  template <class Visit>
  SIMT_DEVICE void each(int shift, Visit visit) const {
    const int64_t run = (n + kThreads - 1) / kThreads * 32, begin = simt::warp() * run;
    const int64_t end = begin + run < n ? begin + run : n;
    Entry next = entry(begin + simt::lane(), end, shift);
    for (int64_t i = begin; i < end; i += 32) {
      const Entry now = next;
      next = entry(i + 32 + simt::lane(), end, shift);
      uint32_t same = simt::ballot(now.present);
      for (int k = 0; k < 8; ++k) {
        const bool set = now.digit >> k & 1;
        const uint32_t lanes = simt::ballot(set);
        same &= set ? lanes : ~lanes;
      }
      visit(now.row, now.present ? same : 0u, static_cast<int>(now.digit));
      simt::sync_warp();
    }
  }

  SIMT_DEVICE int64_t pass(int shift) const {
    int32_t* const warp_counts = counts() + simt::warp() * kDigits;
    const uint32_t lower = (1u << simt::lane()) - 1;
    for (int d = simt::lane(); d < kDigits; d += 32) warp_counts[d] = 0;
    simt::sync_warp();
    each(shift, [&](int32_t, uint32_t same, int digit) {
      if (same && !(same & lower)) warp_counts[digit] += simt::count_bits(same);
    });
    SIMT_UNLESS_PLANTED(12, simt::sync());
    const int64_t all = scan(
        kDigits, sums(),
        [&](int64_t d) {
          int64_t sum = 0;
          for (int w = 0; w < kWarps; ++w) sum += counts()[w * kDigits + d];
          return sum;
        },
        [&](int64_t d, int64_t place) {
          for (int w = 0; w < kWarps; ++w) {
            const int32_t count = counts()[w * kDigits + d];
            counts()[w * kDigits + d] = static_cast<int32_t>(place);
            place += count;
          }
        });
    SIMT_UNLESS_PLANTED(13, simt::sync());
    each(shift, [&](int32_t row, uint32_t same, int digit) {
      const int32_t place = same ? warp_counts[digit] : 0;
      simt::sync_warp();
      if (!same) return;
      to[place + simt::count_bits(same & lower)] = row;
      if (!(same & lower)) warp_counts[digit] = place + simt::count_bits(same);
    });
    simt::sync();
    return all;
  }

  /// Where each leaf's entries begin.
  SIMT_DEVICE void heads(int64_t b) const {
    int32_t* const begin = t.begin + first + b;
    const auto head = [&](int64_t e) -> int64_t { return e == 0 || t.leaf[from[e]] != t.leaf[from[e - 1]]; };
    const int64_t all = scan(n, sums(), head, [&](int64_t e, int64_t place) {
      if (head(e)) begin[place] = static_cast<int32_t>(e);
    });
    if (simt::thread() != 0) return;
    begin[all] = static_cast<int32_t>(n);
    t.leaves[b] = all;
  }

  const LeafTask& t;
  int64_t first = 0, start = 0, n = 0;
  const int32_t* from = nullptr;  // null: the history as it stands
  int32_t* to = nullptr;
};

}  // namespace hisac::cuda
