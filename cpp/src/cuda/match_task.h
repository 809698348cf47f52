// SPDX-License-Identifier: Apache-2.0
// What `match` and its backward do alike. A node is a range of a user's sums, which are sorted by code: those below the
// first codes of some candidate. A cell is a candidate on one level. The cells that have one node find each other in a
// hash table of the batch's nodes, and one of them, the node's owner, has the work.
#pragma once
#include <type_traits>

#include "base/arena.h"
#include "cuda/device/block.h"
#include "cuda/device/launcher.h"
#include "cuda/histories.h"
#include "hisac/match.h"

namespace hisac::cuda {

constexpr int kMatchThreads = 256, kMatchWarps = kMatchThreads / 32;
constexpr int kNodeColumns = 64;                         // that a warp sums at once, two a lane
constexpr int kLong = 256;                               // more sums or cells of a node are a block's, not a warp's
constexpr int kLongAt = kMatchWarps * kNodeColumns * 8;  // in shared memory, behind the sums of warps
constexpr int kNodeBytes = kLongAt + kMatchWarps * 4;    // of it

struct Node {
  int32_t first, last;
};

struct MatchTask : Behaviours {     // the sums: v, bias, codes and their users
  ClampedSpans candidates;          // of the same users
  Array<const int32_t, 2> asked{};  // the candidates' codes
  Ids ids;
  int64_t cells = 0;  // N L
  // workspace
  int32_t* ended = nullptr;                     // [B] where the candidates of all users up to one have ended
  uint64_t* key = nullptr;                      // [2 cells] a node's user, level and first sum; 0: free
  int32_t *owner = nullptr, *asking = nullptr;  // [2 cells] the node's; how many cells have it, where that is asked
  int32_t* place = nullptr;                     // [cells] of the node in these three; -1: no sums
  Node* node = nullptr;                         // [cells]

  SIMT_DEVICE float bias_of(int64_t sum) const {
    const float own = bias ? bias[sum] : 0.f;
    return finite(own) && valid(codes + sum * levels) ? own : -kInfinity;
  }
  SIMT_DEVICE int64_t first_candidate(int64_t user) const {
    const int64_t start = candidates.start(user), before = user > 0 ? ended[user - 1] : 0;
    return start < before ? before : start;
  }
  /// -1: none.
  SIMT_DEVICE int64_t user_of(int64_t candidate) const {
    int64_t low = 0, high = users;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (ended[middle] > candidate)
        high = middle;
      else
        low = middle + 1;
    }
    return low < users && candidates.start(low) <= candidate ? low : -1;
  }
  /// The last of the sums [first, sum] whose codes are valid; else `first`.
  SIMT_DEVICE int64_t last_valid(int64_t first, int64_t sum) const {
    SIMT_ROLLED while (sum > first && !valid(codes + sum * levels))-- sum;
    return sum;
  }
  /// The first of the sums [first, last), of one node of the level above, whose code is not below `code`. A sum of
  /// invalid codes counts as the one before it.
  SIMT_DEVICE int64_t find(int64_t first, int64_t last, int level, int32_t code) const {
    SIMT_ROLLED while (first < last) {
      const int64_t middle = first + (last - first) / 2;
      int64_t sum = middle;
      SIMT_UNLESS_PLANTED(78, sum = last_valid(first, sum));
      if (!valid(codes + sum * levels) || codes[sum * levels + level] < code)
        first = middle + 1;
      else
        last = sum;
    }
    return first;
  }

  /// The node of a user and level that begins with a sum; not 0: B is at most 2^30, sums are below 2^31.
  SIMT_DEVICE static uint64_t key_of(int64_t user, int level, int64_t first) {
    return static_cast<uint64_t>(level) << 61 | static_cast<uint64_t>(user) << 31 | static_cast<uint64_t>(first + 1);
  }
  /// Visits the places where a key may be until found(place), and returns that one.
  template <class Found>
  SIMT_DEVICE int64_t probe(uint64_t k, Found found) const {
    int64_t at = static_cast<int64_t>((k * 0x9e3779b97f4a7c15u >> 32) * static_cast<uint64_t>(2 * cells) >> 32);
    SIMT_ROLLED while (!found(at)) at = at + 1 < 2 * cells ? at + 1 : 0;  // half of them are free
    return at;
  }
  /// The owner of a node; -1: nobody asks for it.
  SIMT_DEVICE int64_t owner_of(uint64_t k) const {
    if (cells == 0) return -1;
    const int64_t at = probe(k, [&](int64_t p) { return key[p] == k || key[p] == 0; });
    return key[at] == 0 ? -1 : owner[at];
  }
};

/// Calls work(cell, std::bool_constant<..>) for the owners of nodes and for cells without one: eight at a time, by a
/// warp each, then those of long nodes by all of the block.
template <class Work>
SIMT_DEVICE void each_owner(const MatchTask& t, Work work) {
  int32_t* const longs = shared<int32_t>(kLongAt);
  for (int64_t first = int64_t{simt::block()} * kMatchWarps; first < t.cells;
       first += int64_t{simt::blocks()} * kMatchWarps) {
    const int64_t cell = first + simt::warp(), place = cell < t.cells ? t.place[cell] : -1;
    const bool owns = cell < t.cells && (place < 0 || t.owner[place] == cell);
    bool is_long = false;
    if (owns && place >= 0)
      is_long = t.node[cell].last - t.node[cell].first > kLong || (t.asking && t.asking[place] > kLong);
    if (owns && !is_long) work(cell, std::false_type{});
    if (simt::lane() == 0) longs[simt::warp()] = is_long;
    SIMT_UNLESS_PLANTED(79, simt::sync());
    SIMT_ROLLED for (int w = 0; w < kMatchWarps; ++w) if (longs[w]) work(first + w, std::true_type{});
    SIMT_UNLESS_PLANTED(80, simt::sync());
  }
}

/// By a warp: sum[i] += weight of lane j times element column + 32 i + lane of row first + j step of m, for the lanes j
/// whose weight is not negative.
SIMT_DEVICE void add_rows(const Rows& m, int64_t first, int64_t step, float weight, int64_t column, double (&sum)[2]) {
  constexpr int kTogether = 4;  // whose loads are under way
  uint32_t lanes = simt::ballot(weight >= 0);
  SIMT_ROLLED while (lanes) {
    int j[kTogether];
    uint32_t bits[kTogether][2];
    SIMT_EACH (k, kTogether) {
      j[k] = lanes ? lowest(lanes) : -1;
      lanes &= lanes - 1;
      SIMT_EACH (i, 2) {
        const int64_t c = column + 32 * i + simt::lane(), at = (first + j[k] * step) * m.width + c;
        bits[k][i] = 0;
        if (j[k] < 0 || c >= m.width) continue;
        bits[k][i] = m.dtype == DType::float32 ? static_cast<const uint32_t*>(m.data)[at]
                                               : uint32_t{static_cast<const uint16_t*>(m.data)[at]};
      }
    }
    SIMT_EACH (k, kTogether) {
      const float w = simt::shuffle(weight, j[k] & 31);
      SIMT_EACH (i, 2) {
        const float y = m.dtype == DType::float32 ? simt::float_of(bits[k][i]) : half_of(bits[k][i], 0, m.dtype);
        if (j[k] >= 0) sum[i] += static_cast<double>(w) * static_cast<double>(y);
      }
    }
  }
}

/// The weighted mean of a node's sums: by a warp, or by all warps of a block, each with every eighth 32 sums.
template <bool kBlock>
class NodeMean {
 public:
  static constexpr int kParts = kBlock ? kMatchWarps : 1;

  SIMT_DEVICE NodeMean(const MatchTask& task, Node node) : t_(task), node_(node) {
    each_part(node, [&](int64_t, int64_t sum) {
      if (sum < node_.last) largest = larger(largest, t_.bias_of(sum));
    });
    largest = over_warps<kParts>(largest, Larger{});
    each_part(node, [&](int64_t, int64_t sum) { total += static_cast<double>(larger(weight(sum), 0)); });
    total = over_warps<kParts>(total, Add{});
  }

  /// visit(first of 32, this lane's) of the part's share of a range.
  template <class Visit>
  SIMT_DEVICE static void each_part(Node range, Visit visit) {
    SIMT_ROLLED for (int64_t first = range.first + (kBlock ? 32 * simt::warp() : 0); first < range.last;
                     first += 32 * kParts) visit(first, first + simt::lane());
  }
  /// Whether this warp writes what all have.
  SIMT_DEVICE static bool writes() { return !kBlock || simt::warp() == 0; }

  /// Columns column + 32 i + lane of the mean.
  SIMT_DEVICE void at(int64_t column, double (&mean)[2]) const {
    mean[0] = mean[1] = 0;
    each_part(node_, [&](int64_t first, int64_t sum) { add_rows(t_.v, first, 1, weight(sum), column, mean); });
    add_warps<kParts>(mean);
    SIMT_EACH (i, 2) mean[i] /= total;
  }

  float largest = -kInfinity;  // of the biases; -inf: no sum is present
  double total = 0;            // of the weights, of which the largest is 1

 private:
  /// -1: absent.
  SIMT_DEVICE float weight(int64_t sum) const {
    const float own = sum < node_.last ? t_.bias_of(sum) : -kInfinity;
    return own == -kInfinity ? -1.f : simt::exp2((own - largest) * kLog2e);
  }

  const MatchTask& t_;
  const Node node_;
};

// ---- host

/// What `match` and its backward refuse; fills the task, and takes its part of the workspace.
Status check_match(const char* verb, const MatchInputs& in);
MatchTask match_task(const Codebook& book, const MatchInputs& in, bool gradients, Arena& arena);
/// Finds the nodes of all cells.
void launch_find_nodes(const MatchTask& t, Launcher& launch);

}  // namespace hisac::cuda
