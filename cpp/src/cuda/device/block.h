// SPDX-License-Identifier: Apache-2.0
// Shared memory by offsets, and what the threads of a block do together: sums over what is before each, a pass of a
// radix sort.
#pragma once
#include "cuda/device/elements.h"

namespace hisac::cuda {

constexpr int kFront = 256;  // bytes of shared memory, from its begin, that belong to the scans
constexpr int kDigit = 8;    // bits of a radix sort's digit

/// A place in shared memory.
template <class T>
SIMT_DEVICE T* shared(int offset) {
  return reinterpret_cast<T*>(simt::shared() + offset);
}

template <class T>
SIMT_DEVICE void swap(T& x, T& y) {
  const T kept = x;
  x = y;
  y = kept;
}

struct Add {
  template <class T>
  SIMT_DEVICE T operator()(T x, T y) const {
    return x + y;
  }
};
struct Larger {
  template <class T>
  SIMT_DEVICE T operator()(T x, T y) const {
    return x < y ? y : x;
  }
};

/// `op` over x of this lane and of the lanes before it.
template <class T, class Op>
SIMT_DEVICE T so_far(T x, Op op) {
  for (int m = 1; m < 32; m *= 2) {
    const T left = simt::shuffle(x, simt::lane() - m);
    if (simt::lane() >= m) x = op(left, x);
  }
  return x;
}
template <class T>
SIMT_DEVICE T sum_so_far(T x) {
  return so_far(x, Add{});
}
SIMT_DEVICE int sum_so_far(bool flag) { return simt::count_bits(simt::ballot(flag) & ((2u << simt::lane()) - 1)); }

/// By a warp: the last i of [0, n) with before(i), or 0; after it, none has that. One of 32 parts at a time.
template <class Before>
SIMT_DEVICE int64_t last_of(int64_t n, Before before) {
  int64_t first = 0;
  while (n > 1) {
    const int64_t step = (n + 31) / 32, probe = simt::lane() * step;
    const bool found = probe == 0 || (probe < n && before(first + probe));
    const int64_t skip = (simt::count_bits(simt::ballot(found)) - 1) * step;
    first += skip;
    n = n - skip < step ? n - skip : step;
  }
  return first;
}

/// A thread each: `op` over *total and what earlier threads of the block give. *total, the same in all threads, becomes
/// that over all of them. The order of operations is fixed.
template <class T, class Op>
SIMT_DEVICE T scan_threads(T x, T* total, Op op) {
  T* const sums = shared<T>(0);  // of each warp
  const int lane = simt::lane();
  x = so_far(x, op);
  SIMT_UNLESS_PLANTED(57, simt::sync());
  if (lane == 31) sums[simt::warp()] = x;
  SIMT_UNLESS_PLANTED(8, simt::sync());
  T before = *total;
  for (int w = 0; w < simt::threads() / 32; ++w) {
    if (w < simt::warp()) before = op(before, sums[w]);
    *total = op(*total, sums[w]);
  }
  const T left = simt::shuffle(x, lane - 1);
  return lane ? op(before, left) : before;
}

/// `op` over the numbers of all lanes of a warp, or of all kWarps of the block.
template <int kWarps, class T, class Op>
SIMT_DEVICE T over_warps(T value, Op op) {
  for (int m = 16; m; m /= 2) value = op(value, simt::shuffle_xor(value, m));
  if (kWarps == 1) return value;
  T* const all = shared<T>(0);
  simt::sync();
  if (simt::lane() == 0) all[simt::warp()] = value;
  SIMT_UNLESS_PLANTED(14, simt::sync());
  value = all[0];
  for (int w = 1; w < kWarps; ++w) value = op(value, all[w]);
  return value;
}

/// By all kWarps of a block, if they are several: each lane's N numbers become the sums of those that this lane of
/// every warp has.
template <int kWarps, int N>
SIMT_DEVICE void add_warps(double (&sum)[N]) {
  if (kWarps == 1) return;
  double* const all = shared<double>(0);  // [kWarps, N, 32]
  simt::sync();
  SIMT_EACH (i, N) all[(simt::warp() * N + i) * 32 + simt::lane()] = sum[i];
  SIMT_UNLESS_PLANTED(77, simt::sync());
  SIMT_EACH (i, N) {
    sum[i] = all[i * 32 + simt::lane()];
    for (int w = 1; w < kWarps; ++w) sum[i] += all[(w * N + i) * 32 + simt::lane()];
  }
}

/// A warp's run of [0, n): whole groups of 32, the same number for each warp.
template <class Index>
struct Run {
  Index begin, end;
  SIMT_DEVICE explicit Run(Index n) {
    const Index each = (n + simt::threads() - 1) / simt::threads() * 32;
    begin = simt::warp() * each;
    end = n < begin + each ? n : begin + each;
  }
};

/// The block's sum of value(i) over [0, n); emit(i, the sum before i, value(i)) in between. All of a block's threads;
/// what was written before is seen by value after a sync, what emit writes is seen on return. Flags are counted.
template <class T, class Index, class Value, class Emit>
SIMT_DEVICE T scan(Index n, Value value, Emit emit) {
  T* const totals = shared<T>(0);  // [32]
  const Run<Index> run(n);
  T sum = 0;
  for (Index i = run.begin + simt::lane(); i < run.end; i += 32) sum += static_cast<T>(value(i));
  for (int m = 16; m; m /= 2) sum += simt::shuffle_xor(sum, m);
  if (simt::lane() == 0) totals[simt::warp()] = sum;
  SIMT_UNLESS_PLANTED(31, simt::sync());
  T before = 0, total = 0;
  for (int w = 0; w < simt::threads() / 32; ++w) {
    if (w == simt::warp()) before = total;
    total += totals[w];
  }
  for (Index first = run.begin; first < run.end; first += 32) {
    const Index i = first + simt::lane();
    const auto number = i < run.end ? value(i) : decltype(value(i)){};
    const T up_to = static_cast<T>(sum_so_far(number));
    if (i < run.end) emit(i, static_cast<T>(before + up_to - static_cast<T>(number)), number);
    before += simt::shuffle(up_to, 31);
  }
  simt::sync();
  return total;
}

/// emit(i, how many before it) for those of [0, n) with flag(i); returns how many. As `scan`.
template <class Index, class Flag, class Emit>
SIMT_DEVICE int gather(Index n, Flag flag, Emit emit) {
  return scan<int>(n, flag, [&](Index i, int place, bool set) {
    if (set) emit(i, place);
  });
}

/// What a pass of a radix sort moves; it leaves out what has a negative digit.
template <class T>
struct Keyed {
  int digit = -1;
  T value = 0;
};
SIMT_DEVICE int digit_of(uint64_t key, int low) { return static_cast<int>(key >> low & ((1 << kDigit) - 1)); }

/// visit(i, item(i)) for a warp's run, by all lanes; past its end they visit what has no digit.
template <class T, class Index, class Item, class Visit>
SIMT_DEVICE void each_item(const Run<Index>& run, Item item, Visit visit) {
  const auto at = [&](Index i) { return i < run.end ? item(i) : Keyed<T>{}; };
  Keyed<T> next = at(run.begin + simt::lane());
  SIMT_ROLLED for (Index first = run.begin; first < run.end; first += 32) {
    const Keyed<T> now = next;
    next = at(first + 32 + simt::lane());  // its loads are under way together with what is done for this one
    visit(first + simt::lane(), now);
  }
}

/// One stable pass of a radix sort: put(i, value, place) for the i of [0, n) whose item(i), a Keyed<T>, has a digit;
/// returns how many. places [warps, 2^kDigit]: in shared memory. A warp owns a run of items, so places within a digit
/// follow the warps, then the lanes.
template <class T, class Index, class Item, class Put>
SIMT_DEVICE uint32_t radix_pass(Index n, uint32_t* places, Item item, Put put) {
  const int warps = simt::threads() / 32;
  uint32_t* const own = places + (simt::warp() << kDigit);
  const Run<Index> run(n);
  for (int d = simt::lane(); d < 1 << kDigit; d += 32) own[d] = 0;
  simt::sync_warp();
  each_item<T>(run, item, [&](Index, const Keyed<T>& now) {
    if (now.digit >= 0) simt::atomic_add(&own[now.digit], 1u);
  });
  SIMT_UNLESS_PLANTED(12, simt::sync());
  const uint32_t all = scan<uint32_t>(
      1 << kDigit,
      [&](int d) {
        uint32_t sum = 0;
        SIMT_ROLLED for (int w = 0; w < warps; ++w) sum += places[w << kDigit | d];
        return sum;
      },
      [&](int d, uint32_t before, uint32_t) {
        SIMT_ROLLED for (int w = 0; w < warps; ++w) {
          const uint32_t count = places[w << kDigit | d];
          places[w << kDigit | d] = before;
          before += count;
        }
      });
  each_item<T>(run, item, [&](Index i, const Keyed<T>& now) {
    const bool present = now.digit >= 0;
    uint32_t alike = simt::ballot(present);
    for (int b = 0; b < kDigit; ++b) {
      const bool set = now.digit >> b & 1;
      const uint32_t with = simt::ballot(set);
      alike &= set ? with : ~with;
    }
    const int place = simt::count_bits(alike & ((1u << simt::lane()) - 1));
    if (present) put(i, now.value, own[now.digit] + static_cast<uint32_t>(place));
    SIMT_UNLESS_PLANTED(33, simt::sync_warp());
    if (present && place == 0) own[now.digit] += static_cast<uint32_t>(simt::count_bits(alike));
    simt::sync_warp();
  });
  simt::sync();
  return all;
}

}  // namespace hisac::cuda
