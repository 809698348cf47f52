// SPDX-License-Identifier: Apache-2.0
// What the kernels of `vote` are told, where a block keeps its things, and a few verbs of whole blocks.
//
// A block takes one user after another. Its slice of the workspace holds a user of `SlicePlan::capacity` rows; what is
// touched for every row or at random lies in shared memory where a user is small enough. Where the workspace cannot
// hold the longest user of every block, the longer users wait for a second pass of fewer blocks.
#pragma once
#include <type_traits>

#include "cuda/row_votes.h"
#include "hisac/vote.h"

namespace hisac::cuda {

constexpr int kMostShared = 256;    // nodes kept in shared memory
constexpr uint16_t kLevelBits = 7;  // of a mark
// In front of shared memory: totals of scan, flags of halve, the next user, its slice, its scale, users found.
constexpr int kNextAt = 312, kSliceAt = 320, kScaleAt = 400, kFoundAt = 448;

/// One of two passes over the users: those of more rows than `above`, and at most `capacity`.
struct SlicePlan {
  int64_t above, capacity, slice_bytes;
  int32_t slices, next;  // next: the user to take
};

/// A node of the tree: leaves [begin, end) of the user's, the seats to give below it; its first child.
struct Node {
  uint32_t begin, end, seats, first;
};
/// order: its place among children with as many votes. seats: with kTied where it may get one more.
struct Child {
  uint32_t begin, end, order;
  uint16_t node, seats;
};
constexpr uint16_t kTied = 0x8000;
/// The search of a node: `high` is the least known key with fewer than `seats` keys at or above it, or exactly so many;
/// `key` the one in question, 0 if none, and `scale` 2^shift / key.
struct Search {
  uint64_t low, high, key;
  uint32_t seats;
  float scale;
};

/// A block's part of the workspace. [rows]: with a bitmap no more than there are leaves.
struct Slice {
  void* number = nullptr;                               // [rows] of the leaves: 32 bits with a bitmap, else 64
  uint64_t* key = nullptr;                              // [rows]
  uint64_t *weight = nullptr, *spare_weight = nullptr;  // [rows] votes
  void* before = nullptr;                               // [rows + 1]
  uint16_t* mark = nullptr;                             // [rows]
  Child* child = nullptr;                               // [rows]
  Node* node = nullptr;                                 // [nodes]
  Search* search = nullptr;                             // [nodes]
};

struct VoteTask : ClampedSpans {
  const int32_t* codes = nullptr;  // [rows], or with ids [items]
  Ids ids;
  int64_t items = 0;
  Weights weights;
  int levels = 0, bits = 0;          // of a leaf's number
  uint32_t size[kMaxLevels] = {};    // C_l
  uint64_t stride[kMaxLevels] = {};  // leaves below a node of the level
  uint32_t kept[kMaxLevels] = {};    // children of a node that fan-out keeps, of a level that beam keeps
  bool budget = false, beam = false;
  int seats = 0;  // M
  int nodes = 0;  // most of a level above the leaves, and at least M
  int shift = 0;  // keys (n << shift) / j: j <= M, so 2^shift >= M (M - 1) tells any two fractions apart
  int pairs = 0;  // 64-bit words of the leaves' bitmap and one more; 0: leaves are sorted
  int blocks = 0, threads = 0;
  int shared_rows = 0;  // of a user whose counters and marks lie in shared memory
  struct Offsets {      // in shared memory
    int sums, nodes, searches, area, prefix, before, mark;
  } offset = {};
  bool cells = false;                             // by fan-out, in cells of shared memory
  int cells_before[kMaxLevels] = {};              // of the levels above
  int64_t shared_bytes = 0, workspace_bytes = 0;  // of the slices
  SlicePlan* plan = nullptr;                      // [2]
  int pass = 0;
  std::byte* slices = nullptr;
  Agents out;

  SIMT_DEVICE int64_t voters(int64_t b) const {
    const int64_t n = length(b);
    return n < kMostVoters ? n : kMostVoters;
  }

  /// Carves, or only counts, a slice for so many rows; returns its bytes.
  SIMT_BOTH int64_t slice(int64_t capacity, std::byte* base, Slice* s) const {
    int64_t used = 0;
    const auto take = [&](auto*& p, int64_t bytes) {
      p = reinterpret_cast<std::decay_t<decltype(p)>>(reinterpret_cast<uintptr_t>(base) + static_cast<size_t>(used));
      used += (bytes + 63) / 64 * 64;
    };
    const int64_t leaves = pairs && capacity > int64_t{64} * pairs ? int64_t{64} * pairs : capacity;
    take(s->number, leaves * (pairs ? 4 : 8));
    take(s->key, pairs ? 0 : capacity * 8);
    take(s->weight, pairs ? 0 : capacity * 8);
    take(s->spare_weight, pairs ? 0 : capacity * 8);
    take(s->before, (leaves + 1) * 8);
    take(s->mark, leaves * 2);
    take(s->child, leaves * int64_t{sizeof(Child)});
    take(s->node, nodes > kMostShared ? nodes * int64_t{sizeof(Node)} : 0);
    take(s->search, nodes > kMostShared ? nodes * int64_t{sizeof(Search)} : 0);
    return used;
  }
  SIMT_BOTH int64_t slice_bytes(int64_t capacity) const {
    Slice unused;
    return slice(capacity, nullptr, &unused);
  }
};

/// Of a user's votes.
template <bool kWeighted>
using VoteSum = std::conditional_t<kWeighted, uint64_t, uint32_t>;

/// By a block: what turns user b's weights into votes, in shared memory. A sync must follow.
SIMT_DEVICE void find_scale(const VoteTask& t, int64_t b, int rows) {
  const VoteScale scale = scale_of_votes(t.weights, t.start(b), rows, [&](int64_t row) {
    const int64_t item = row_in_table(t.ids, row, t.items);
    bool here = item >= 0;
    SIMT_ROLLED for (int l = 0; here && l < t.levels; ++l) here =
        static_cast<uint32_t>(t.codes[item * t.levels + l]) < t.size[l];
    return here;
  });
  if (simt::thread() == 0) *shared<VoteScale>(kScaleAt) = scale;
}

template <bool kWeighted, class State, bool kIds, class Step, class Use>
SIMT_DEVICE void each_row_of(const VoteTask& t, int64_t b, int rows, Step step, Use use) {
  constexpr int kTogether = kIds || kWeighted ? 2 : 4;  // more would not fit the registers
  const int64_t first_row = t.start(b);
  const auto row = [&](int first, int k) { return first + simt::thread() + k * simt::threads(); };
  for (int first = 0; first < rows; first += kTogether * simt::threads()) {
    State state[kTogether] = {};
    VoteSum<kWeighted> votes[kTogether];  // first whether it may vote
    int64_t item[kIds ? kTogether : 1];
    SIMT_EACH (k, kTogether) {
      votes[k] = row(first, k) < rows;
      if (kIds && votes[k]) {
        item[k] = row_in_table(t.ids, first_row + row(first, k), t.items);
        votes[k] = item[k] >= 0;
      }
    }
    SIMT_ROLLED for (int l = 0; l < t.levels; ++l) {
      const int32_t* const c = t.codes + (kIds ? 0 : first_row) * t.levels + l;
      uint32_t code[kTogether];
      SIMT_EACH (k, kTogether) {
        const int64_t at = kIds ? item[k] : row(first, k);
        code[k] = votes[k] ? static_cast<uint32_t>(c[at * t.levels]) : ~0u;
      }
      SIMT_EACH (k, kTogether) {
        votes[k] = code[k] < t.size[l];
        if (votes[k]) step(state[k], l, code[k]);
      }
    }
    SIMT_EACH (k, kTogether)
      if (kWeighted && votes[k])
        votes[k] = static_cast<VoteSum<kWeighted>>(
            votes_of(t.weights, *shared<VoteScale>(kScaleAt), first_row + row(first, k)));
    SIMT_EACH (k, kTogether) use(state[k], votes[k]);
  }
}

/// step(state, level, code) down the path of each of user b's first rows, then use(state, votes), by whole warps; 0
/// votes: the row does not vote, or is past the last, and its path was cut. Loads of several rows a thread are under
/// way together.
template <bool kWeighted, class State, class Step, class Use>
SIMT_DEVICE void each_row(const VoteTask& t, int64_t b, int rows, Step step, Use use) {
  if (t.ids.data)
    each_row_of<kWeighted, State, true>(t, b, rows, step, use);
  else
    each_row_of<kWeighted, State, false>(t, b, rows, step, use);
}

/// By a warp: take(i, taken) for [begin, end), for 32 at a time; taken are the `seats` with most votes, then the first;
/// never one without votes. all: the sum of votes.
template <class Sum, class Votes, class Take>
SIMT_DEVICE void pick(int begin, int end, uint32_t seats, Sum all, Votes votes, Take take) {
  const auto from = [&](Sum least) {
    int found = 0;
    for (int first = begin; first < end; first += 32)
      found += simt::count_bits(simt::ballot(first + simt::lane() < end && votes(first + simt::lane()) >= least));
    return static_cast<uint32_t>(found);
  };
  Sum low = 1, high = all / seats + 1;  // fewer than `seats` have `high`
  while (high - low > 1) {
    const Sum middle = low + (high - low) / 2;
    const uint32_t found = from(middle);
    if (found >= seats) low = middle;
    if (found <= seats) high = middle;
  }
  const uint32_t sure = from(high);
  int left = static_cast<int>(seats - sure);
  for (int first = begin; first < end; first += 32) {
    const int i = first + simt::lane();
    const Sum count = i < end ? votes(i) : 0;
    const bool last = sure < seats && count >= low && count < high;
    const uint32_t tied = simt::ballot(last);
    take(i, count >= high || (last && simt::count_bits(tied & ((1u << simt::lane()) - 1)) < left));
    left -= simt::count_bits(tied);
  }
}

/// By a warp: a place for each lane that wants one, from *cursor on.
SIMT_DEVICE uint32_t take_place(uint32_t* cursor, bool wanted) {
  const uint32_t all = simt::ballot(wanted);
  uint32_t first = 0;
  if (all && simt::lane() == 0) first = simt::atomic_add(cursor, static_cast<uint32_t>(simt::count_bits(all)));
  return simt::shuffle(first, 0) + static_cast<uint32_t>(simt::count_bits(all & ((1u << simt::lane()) - 1)));
}

/// By a warp: to[..] = sort keys of the agents of those lanes that are taken. `cursor`: how many keys there are.
SIMT_DEVICE void append(uint64_t* to, uint32_t* cursor, bool taken, uint64_t votes, int place) {
  const uint32_t slot = take_place(cursor, taken);
  if (taken) to[slot] = (kMostVotes - votes) << 24 | static_cast<uint32_t>(place);  // upwards: most votes first
}

/// key[0, n) upwards; n a power of two. Steps up to 32 stay within the 64 keys of a warp.
SIMT_DEVICE void sort_in_place(uint64_t* key, int n) {
  for (int run = 2; run <= n; run *= 2)
    for (int step = run / 2; step; step /= 2) {
      for (int i = simt::thread(); i < n / 2; i += simt::threads()) {
        const int a = 2 * i - (i & (step - 1)), b = a + step;
        const uint64_t x = key[a], y = key[b];
        if ((x > y) == ((a & run) == 0)) {
          key[a] = y;
          key[b] = x;
        }
      }
      if (step > 32 || (step == 1 && (run > 32 || run == n)))
        simt::sync();
      else
        simt::sync_warp();
    }
}

/// Sorts the keys of a user's agents and writes the agents. path(place): the number of a leaf.
template <class Path>
SIMT_DEVICE void write_agents(const VoteTask& t, int64_t b, uint64_t* agent_keys, int kept, Path path) {
  int padded = 1;
  while (padded < kept) padded *= 2;
  for (int i = kept + simt::thread(); i < padded; i += simt::threads()) agent_keys[i] = ~uint64_t{0};
  simt::sync();
  sort_in_place(agent_keys, padded);
  for (int i = simt::thread(); i < t.seats; i += simt::threads()) {
    const bool present = i < kept;
    auto number = path(present ? static_cast<int>(agent_keys[i] & kMostVoters) : 0);
    t.out.votes.data[b * t.seats + i] = present ? static_cast<int64_t>(kMostVotes - (agent_keys[i] >> 24)) : 0;
    int32_t* const c = t.out.codes.data + (b * t.seats + i) * t.levels;
    SIMT_ROLLED for (int l = t.levels - 1; l >= 0; --l) {
      const decltype(number) size = t.size[l], up = number / size;
      c[l] = present ? static_cast<int32_t>(number - up * size) : -1;
      number = up;
    }
  }
  if (simt::thread() == 0) t.out.count.data[b] = kept;
  simt::sync();
}

}  // namespace hisac::cuda
