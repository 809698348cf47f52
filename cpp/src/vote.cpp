// SPDX-License-Identifier: Apache-2.0
// One user at a time, in three steps: votes of parents (the nodes above the leaves), seats of parents, leaves of the
// seated ones. Two ways to count, both without a branch that depends on a row:
//   dense   long histories in trees of few parents: a histogram of parents (a first reading of the rows), seats by it,
//           then counters only for leaves of parents that may be seated (a second reading). What caps a parent, how
//           many leaves it has, is known only after that, so before it stands in min(votes, C_L), an upper bound;
//           should the true caps seat others, they are counted in their turn. Once every seated parent is counted, the
//           seats are those of the true caps: keys of leaves that do not exist were never among the chosen.
//   sorted  everything else: leaf numbers, radix-sorted.
// Then the leaves of seated parents are radix-sorted by votes, most first, lower codes first among equals, and taken
// while their parent has a seat: choice and output order in one.
//
// Top-down equals the definition's bottom-up orders: the order at a node merges its children's orders, so the first s
// leaves at a node are, for each child, its first s_c, where the s_c are the D'Hondt seats of the children, capped by
// how many leaves they have.
#include "hisac/vote.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "checks.h"
#include "codebook_body.h"
#include "parallel.h"

namespace hisac {
namespace {

constexpr int kPlaceBits = 24;  // of a place among a user's rows
constexpr int64_t kMostVoters = (int64_t{1} << kPlaceBits) - 1;
constexpr uint64_t kMostVotes = (uint64_t{1} << (64 - kPlaceBits)) - 1;  // 16 * 2^12 a row stay below
constexpr int64_t kMostParents = int64_t{1} << 16;                       // to be counted densely,
constexpr int64_t kDenseRows = 2048;                                     // with at least so many rows,
constexpr int64_t kCells = 4;                                            // and at most so many counters a row
constexpr int64_t kBlock = 256;                                          // rows located at a time
constexpr int kLanes = 4;                // histograms side by side: equal codes in a row would wait for
constexpr int64_t kLanesParents = 4096;  // each other's store; up to so many parents
constexpr int kMostDigit = 11;

/// A node above the leaves that has votes; its leaves are places from `begin` on, or a block of counters.
struct Parent {
  uint64_t number;
  int64_t begin, votes, leaves, seats;
  bool counted;
};

/// A node of the tree: a run of parents, the votes and leaves below it, and the seats it has.
struct Node {
  int64_t begin, end, votes, leaves, seats;
};

/// A child's next seat: n / (seats + 1). More of it, then more votes, then the lower code first; a heap's "less".
struct Bid {
  uint64_t key;
  int64_t child;
};

/// A leaf that may be an agent: its last code and the place of its parent.
struct Candidate {
  uint32_t last, parent;
};

/// More votes first, then the lower place, as a number to be sorted upwards.
uint64_t rank_word(int64_t votes, int64_t place) noexcept {
  return (kMostVotes - static_cast<uint64_t>(votes)) << kPlaceBits | static_cast<uint64_t>(place);
}
int64_t place_of(uint64_t word) noexcept { return static_cast<int64_t>(word & kMostVoters); }

int bits_of(uint64_t n) noexcept { return n ? 64 - __builtin_clzll(n) : 0; }

/// Sorts key[0, n), and `weight` beside it if there is one, by bits [low, high), stably; swaps with the spares.
template <bool weighted>
void radix_sort(int64_t n, int low, int high, uint64_t*& key, uint64_t*& spare, uint32_t*& weight,
                uint32_t*& spare_weight) noexcept {
  if (n < 2 || high <= low) return;
  const int most = std::clamp(bits_of(static_cast<uint64_t>(n)) - 1, 6, kMostDigit);
  const int passes = (high - low + most - 1) / most, digit = (high - low + passes - 1) / passes;
  const uint64_t mask = (uint64_t{1} << digit) - 1;
  uint32_t at[1 << kMostDigit];
  for (; low < high; low += digit) {
    std::fill(at, at + mask + 1, 0u);
    for (int64_t i = 0; i < n; ++i) ++at[key[i] >> low & mask];
    uint32_t total = 0;
    for (uint64_t d = 0; d <= mask; ++d) total += std::exchange(at[d], total);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t to = at[key[i] >> low & mask]++;
      spare[to] = key[i];
      if (weighted) spare_weight[to] = weight[i];
    }
    std::swap(key, spare);
    if (weighted) std::swap(weight, spare_weight);
  }
}

struct Scratch {
  bool dense = false;
  int64_t parents_possible = 0, last = 0, cells_possible = 0;
  // dense
  uint64_t* histogram = nullptr;  // [kLanes][parents + 1], the last one for rows that do not vote
  uint32_t* block = nullptr;      // [parents + 1] first counter of a parent
  uint64_t* cells = nullptr;      // [cells + C_L], the last C_L for parents that are not counted
  // sorted
  uint64_t* key = nullptr;  // [rows + 1] leaf numbers; later candidates' ranks
  uint32_t *weight = nullptr, *spare_weight = nullptr;
  int64_t* sum = nullptr;  // [1 + leaves] votes up to and with a leaf
  // both
  uint64_t* spare = nullptr;  // [rows + 1]
  Candidate* candidates = nullptr;
  Parent* parents = nullptr;
  Bid* bids = nullptr;
  uint64_t *rank = nullptr, *spare_rank = nullptr;  // [parents]
  Node *nodes = nullptr, *next = nullptr, *children = nullptr;

  void carve(Arena& arena, const Codebook& book, const VoteParams& params, int64_t longest) noexcept {
    const Codebook::Body& body = book.body();
    const int64_t rows = std::min(longest, kMostVoters), m = seats(params, book.levels());
    last = body.size[book.levels() - 1];
    parents_possible = 1;
    for (int l = 0; l + 1 < book.levels() && parents_possible <= kMostParents; ++l) parents_possible *= body.size[l];
    dense = parents_possible <= std::min(kMostParents, rows) && rows >= kDenseRows && last <= kCells * rows;
    const int64_t most_parents = std::min(rows, parents_possible > kMostParents ? rows : parents_possible);
    cells_possible = std::min(kCells * rows, most_parents * last);
    histogram = arena.take<uint64_t>(dense ? (parents_possible + 1) * lanes() : 0);
    block = arena.take<uint32_t>(dense ? parents_possible + 1 : 0);
    cells = arena.take<uint64_t>(dense ? cells_possible + last : 0);
    key = arena.take<uint64_t>(rows + 1);
    spare = arena.take<uint64_t>(rows + 1);
    weight = arena.take<uint32_t>(rows);
    spare_weight = arena.take<uint32_t>(rows);
    sum = arena.take<int64_t>(rows + 1);
    candidates = arena.take<Candidate>(rows + 1);
    parents = arena.take<Parent>(most_parents + 1);
    bids = arena.take<Bid>(most_parents);
    rank = arena.take<uint64_t>(most_parents);
    spare_rank = arena.take<uint64_t>(most_parents);
    children = arena.take<Node>(most_parents);
    nodes = arena.take<Node>(m);
    next = arena.take<Node>(m);
  }

  int64_t lanes() const noexcept { return parents_possible <= kLanesParents ? kLanes : 1; }
};

uint32_t quantise(float w) noexcept {
  if (!(w > 0)) return 0;
  return static_cast<uint32_t>(std::llrint(double(std::min(w, 16.f)) * 4096));
}

class Voter {
 public:
  Voter(const Codebook& book, const VoteParams& params, Scratch& scratch) noexcept
      : body_(book.body()), params_(params), s_(scratch), levels_(book.levels()), last_(s_.last) {
    const uint64_t below = body_.stride[0];
    leaves_bits_ = body_.size[0] - 1 > static_cast<int64_t>(~uint64_t{0} / below)  // 2^64 leaves
                       ? 64
                       : bits_of(below - 1 + below * static_cast<uint64_t>(body_.size[0] - 1));
    reciprocal_ = leaves_bits_ <= 32 && last_ > 1 ? ~uint64_t{0} / static_cast<uint64_t>(last_) + 1 : 0;
  }

  /// One user: writes the kept leaves, by votes and code; returns how many.
  int64_t run(const int32_t* codes, const float* weights, int64_t rows, int32_t* out_codes,
              int64_t* out_votes) noexcept {
    rows = std::min(rows, kMostVoters);
    candidates_ = parents_ = all_votes_ = 0;
    const bool dense = s_.dense && rows >= kDenseRows && s_.parents_possible <= rows && last_ <= kCells * rows;
    if (!dense || !(weights ? count_dense<int64_t>(codes, weights, rows) : count_dense<int32_t>(codes, weights, rows)))
      weights ? count_sorted<true>(codes, weights, rows) : count_sorted<false>(codes, weights, rows);
    return write(out_codes, out_votes);
  }

 private:
  // ---- counting

  template <bool weighted>
  void count_sorted(const int32_t* codes, const float* weights, int64_t rows) noexcept {
    int64_t n = 0;
    for (int64_t i = 0; i < rows; ++i, codes += levels_) {
      bool ok = true;
      uint64_t number = 0;
      for (int l = 0; l < levels_; ++l) {
        ok &= static_cast<uint32_t>(codes[l]) < static_cast<uint32_t>(body_.size[l]);
        number = number * static_cast<uint64_t>(body_.size[l]) + static_cast<uint32_t>(codes[l]);
      }
      s_.key[n] = number;
      if (weighted) ok &= (s_.weight[n] = quantise(weights[i])) != 0;
      n += ok;
    }
    if (n == 0) return;
    radix_sort<weighted>(n, 0, leaves_bits_, s_.key, s_.spare, s_.weight, s_.spare_weight);
    uint64_t* const key = s_.key;
    key[n] = ~key[n - 1];
    int64_t leaves = 0, sum = 0;
    s_.sum[0] = 0;
    for (int64_t i = 0; i < n; ++i) {
      sum += weighted ? s_.weight[i] : 1;
      const uint64_t leaf = key[i];
      key[leaves] = leaf;
      s_.sum[leaves + 1] = sum;
      leaves += key[i + 1] != leaf;
    }
    uint64_t number = parent_of(key[0]);
    for (int64_t i = 0, begin = 0; i < leaves; ++i) {
      const uint64_t following = i + 1 < leaves ? parent_of(key[i + 1]) : ~number;
      s_.parents[parents_] = {number, begin, s_.sum[i + 1] - s_.sum[begin], i + 1 - begin, 0, true};
      parents_ += following != number;
      begin = following != number ? i + 1 : begin;
      number = following;
    }
    assign_seats();
    for (int64_t p = 0; p < parents_; ++p) {
      const Parent& parent = s_.parents[p];
      if (!parent.seats) continue;
      const int64_t* const at = s_.sum + parent.begin;
      const uint64_t* const leaf = key + parent.begin;
      const uint64_t first = parent.number * static_cast<uint64_t>(last_);
      gather(
          p, parent.leaves, [at](int64_t i) { return at[i + 1] - at[i]; },
          [leaf, first](int64_t i) { return static_cast<uint32_t>(leaf[i] - first); });
    }
  }

  uint64_t parent_of(uint64_t leaf) const noexcept {
    if (reciprocal_) return static_cast<uint64_t>(static_cast<unsigned __int128>(reciprocal_) * leaf >> 64);
    return leaf / static_cast<uint64_t>(last_);
  }

  /// False, with nothing done, where too many parents would have to be counted.
  template <class Count>
  bool count_dense(const int32_t* codes, const float* weights, int64_t rows) noexcept {
    constexpr bool weighted = sizeof(Count) == 8;
    const int64_t none = s_.parents_possible, stride = s_.lanes() > 1 ? none + 1 : 0;
    Count* const lane = reinterpret_cast<Count*>(s_.histogram);
    std::fill(lane, lane + (none + 1) * s_.lanes(), Count{0});
    each_block(codes, rows, [&](int64_t at, int64_t n, const uint32_t* parent, const uint32_t*) {
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j)
          lane[j * stride + parent[i + j]] += weighted ? quantise(weights[at + i + j]) : 1;
      for (; i < n; ++i) lane[parent[i]] += weighted ? quantise(weights[at + i]) : 1;
    });
    for (int64_t p = 0; p < none; ++p) {
      int64_t votes = lane[p];
      for (int64_t j = 1; j < s_.lanes(); ++j) votes += lane[j * stride + p];
      s_.parents[parents_] = {static_cast<uint64_t>(p), 0, votes, weighted ? last_ : std::min(votes, last_), 0, false};
      parents_ += votes != 0;
    }
    Count* const cells = reinterpret_cast<Count*>(s_.cells);
    const int64_t room = std::min(s_.cells_possible, kCells * rows);
    int64_t used = 0;
    for (int round = 0; parents_; ++round) {
      assign_seats();
      const int64_t before = used;
      std::fill(s_.block, s_.block + none + 1, static_cast<uint32_t>(s_.cells_possible));
      for (int64_t p = 0; p < parents_; ++p) {
        Parent& parent = s_.parents[p];
        if (!parent.seats || parent.counted) continue;
        if (used + last_ > room || round == 2) return (parents_ = 0);
        s_.block[parent.number] = static_cast<uint32_t>(parent.begin = used);
        used += last_;
      }
      if (used == before) break;
      std::fill(cells + before, cells + used, Count{0});
      each_block(codes, rows, [&](int64_t at, int64_t n, const uint32_t* parent, const uint32_t* last) {
        for (int64_t i = 0; i < n; ++i)
          cells[s_.block[parent[i]] + last[i]] += weighted ? quantise(weights[at + i]) : 1;
      });
      if (!params_.budget) break;
      for (int64_t p = 0; p < parents_; ++p) {
        Parent& parent = s_.parents[p];
        if (!parent.seats || parent.counted) continue;
        parent.counted = true;
        parent.leaves = last_ - std::count(cells + parent.begin, cells + parent.begin + last_, Count{0});
      }
    }
    for (int64_t p = 0; p < parents_; ++p) {
      const Parent& parent = s_.parents[p];
      const Count* const cell = cells + parent.begin;
      if (parent.seats)
        gather(p, last_, [cell](int64_t i) { return cell[i]; }, [](int64_t i) { return static_cast<uint32_t>(i); });
    }
    return true;
  }

  /// work(first row, rows, their parents, their last codes) for up to kBlock rows at a time; a row with a code out of
  /// range has the parent `parents_possible` and the last code 0.
  template <class Work>
  void each_block(const int32_t* codes, int64_t rows, Work work) const noexcept {
    uint32_t parent[kBlock], last[kBlock];
    const uint32_t none = static_cast<uint32_t>(s_.parents_possible);
    for (int64_t at = 0; at < rows; at += kBlock) {
      const int64_t n = std::min(kBlock, rows - at);
      const int32_t* c = codes + at * levels_;
      if (levels_ == 2) {
        for (int64_t i = 0; i < n; ++i) {
          const uint32_t first = static_cast<uint32_t>(c[2 * i]), second = static_cast<uint32_t>(c[2 * i + 1]);
          const bool ok = (first < none) & (second < static_cast<uint32_t>(last_));
          parent[i] = ok ? first : none;
          last[i] = ok ? second : 0;
        }
      } else {
        for (int64_t i = 0; i < n; ++i, c += levels_) {
          bool ok = static_cast<uint32_t>(c[levels_ - 1]) < static_cast<uint32_t>(last_);
          uint32_t number = 0;
          for (int l = 0; l + 1 < levels_; ++l) {
            ok &= static_cast<uint32_t>(c[l]) < static_cast<uint32_t>(body_.size[l]);
            number = number * static_cast<uint32_t>(body_.size[l]) + static_cast<uint32_t>(c[l]);
          }
          parent[i] = ok ? number : none;
          last[i] = ok ? static_cast<uint32_t>(c[levels_ - 1]) : 0;
        }
      }
      work(at, n, parent, last);
    }
  }

  // ---- seats

  /// The seats of every parent, by its votes and leaves.
  void assign_seats() noexcept {
    Node root{0, parents_, 0, 0, 0};
    for (int64_t p = 0; p < parents_; ++p) {
      root.votes += s_.parents[p].votes;
      root.leaves += s_.parents[p].leaves;
      s_.parents[p].seats = 0;
    }
    root.seats = std::min(params_.budget, root.leaves);
    s_.nodes[0] = root;
    int64_t n = 1;
    for (int l = 0; l + 1 < levels_; ++l) {
      int64_t m = 0;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t found = children_of(s_.nodes[i], l);
        m += params_.budget ? give_seats(found, s_.nodes[i], s_.next + m) : keep(found, params_.fanout[l], s_.next + m);
      }
      std::swap(s_.nodes, s_.next);
      n = m;
    }
    for (int64_t i = 0; i < n; ++i)
      s_.parents[s_.nodes[i].begin].seats = params_.budget ? s_.nodes[i].seats : params_.fanout[levels_ - 1];
  }

  /// The children of a node that lie at `level`, above the leaves, into scratch.children.
  int64_t children_of(const Node& node, int level) noexcept {
    const uint64_t below = body_.stride[level] / static_cast<uint64_t>(last_);  // parents below such a child
    if (below == 1) {
      for (int64_t i = node.begin; i < node.end; ++i)
        s_.children[i - node.begin] = {i, i + 1, s_.parents[i].votes, s_.parents[i].leaves, 0};
      return node.end - node.begin;
    }
    int64_t found = 0;
    for (int64_t i = node.begin; i < node.end;) {
      Node child{i, i, 0, 0, 0};
      const uint64_t first = s_.parents[i].number / below * below;
      for (; i < node.end && s_.parents[i].number - first < below; ++i) {
        child.votes += s_.parents[i].votes;
        child.leaves += s_.parents[i].leaves;
      }
      child.end = i;
      s_.children[found++] = child;
    }
    return found;
  }

  /// The k children with most votes, to `out`; returns how many.
  int64_t keep(int64_t found, int64_t k, Node* out) noexcept {
    if (k >= found) return std::copy(s_.children, s_.children + found, out) - out;
    int64_t all = 0;
    for (int64_t j = 0; j < found; ++j) {
      s_.rank[j] = rank_word(s_.children[j].votes, j);
      all |= s_.children[j].votes;
    }
    sort_ranks(found, all, s_.rank, s_.spare_rank);
    for (int64_t j = 0; j < k; ++j) out[j] = s_.children[place_of(s_.rank[j])];
    return k;
  }

  static void sort_ranks(int64_t n, int64_t all_votes, uint64_t*& rank, uint64_t*& spare) noexcept {
    uint32_t* no_weight = nullptr;
    radix_sort<false>(n, kPlaceBits, kPlaceBits + bits_of(static_cast<uint64_t>(all_votes)), rank, spare, no_weight,
                      no_weight);
  }

  /// D'Hondt among scratch.children, each capped by its leaves: those with seats go to `out`, returns how many.
  int64_t give_seats(int64_t found, const Node& node, Node* out) noexcept {
    Node* const c = s_.children;
    if (node.leaves <= node.seats) {
      for (int64_t j = 0; j < found; ++j) c[j].seats = c[j].leaves;
    } else {
      // For any n / d, the keys of n / d and more are a prefix of the order of seats; d = node.seats and all votes give
      // no more than there are. The second guess spends what rounding and caps left over; the rest is dealt one by one.
      const Award first = award(found, node.votes, node.seats);
      Award now = first;
      if (first.given < node.seats && first.live)
        now = award(found, first.votes, node.seats - first.full + first.live * 3 / 8);
      if (now.given > node.seats) now = award(found, node.votes, node.seats);
      if (now.given < node.seats) deal(found, node.seats - now.given);
    }
    int64_t some = 0;
    for (int64_t j = 0; j < found; ++j)
      if (c[j].seats) out[some++] = c[j];
    return some;
  }

  /// Seats given; those of full children; children with seats and room for more, and their votes.
  struct Award {
    int64_t given, full, live, votes;
  };

  /// Every child gets as many seats as it has keys of n / d and more.
  Award award(int64_t found, int64_t n, int64_t d) noexcept {
    Award a{0, 0, 0, 0};
    for (int64_t j = 0; j < found; ++j) {
      Node& c = s_.children[j];
      c.seats = std::min(c.leaves, static_cast<int64_t>(static_cast<uint64_t>(c.votes * d) / static_cast<uint64_t>(n)));
      const bool full = c.seats == c.leaves, live = c.seats > 0 && !full;
      a.given += c.seats;
      a.full += full ? c.seats : 0;
      a.live += live;
      a.votes += live ? c.votes : 0;
    }
    return a;
  }

  /// The next `open` seats, one by one.
  void deal(int64_t found, int64_t open) noexcept {
    Node* const c = s_.children;
    Bid* const bids = s_.bids;
    Bid* last = bids;
    const auto next = [c](int64_t j) {
      return Bid{(static_cast<uint64_t>(c[j].votes) << 24) / static_cast<uint64_t>(c[j].seats + 1), j};
    };
    const auto less = [c](const Bid& a, const Bid& b) {
      if (a.key != b.key) return a.key < b.key;
      return c[a.child].votes != c[b.child].votes ? c[a.child].votes < c[b.child].votes : a.child > b.child;
    };
    for (int64_t j = 0; j < found; ++j)
      if (c[j].seats < c[j].leaves) *last++ = next(j);
    std::make_heap(bids, last, less);
    for (; open > 0 && last > bids; --open) {
      std::pop_heap(bids, last, less);
      const int64_t j = last[-1].child;
      if (++c[j].seats == c[j].leaves) {
        --last;
      } else {
        last[-1] = next(j);
        std::push_heap(bids, last, less);
      }
    }
  }

  // ---- leaves

  /// Candidates from the `n` leaves of parent p: all that may be among its most voted ones. votes(i) may be 0.
  template <class Votes, class Last>
  void gather(int64_t p, int64_t n, Votes votes, Last last) noexcept {
    using Count = decltype(votes(0));
    Count least = 1;
    if (s_.parents[p].seats < n)
      for (int64_t enough = 0;; least *= 2, enough = 0) {
        for (int64_t i = 0; i < n; ++i) enough += votes(i) >= 2 * least;
        if (enough < s_.parents[p].seats) break;
      }
    int64_t at = candidates_;
    for (int64_t i = 0; i < n; ++i) {
      const Count v = votes(i);
      s_.candidates[at] = {last(i), static_cast<uint32_t>(p)};
      s_.spare[at] = rank_word(v, at);
      all_votes_ |= v;
      at += v >= least;
    }
    candidates_ = at;
  }

  /// The candidates, by votes and code, as long as their parents have seats; returns how many.
  int64_t write(int32_t* codes, int64_t* votes) noexcept {
    sort_ranks(candidates_, all_votes_, s_.spare, s_.key);
    int64_t kept = 0;
    for (int64_t i = 0; i < candidates_; ++i) {
      const uint64_t word = s_.spare[i];
      const Candidate& leaf = s_.candidates[place_of(word)];
      Parent& parent = s_.parents[leaf.parent];
      if (parent.seats == 0) continue;
      --parent.seats;
      votes[kept] = static_cast<int64_t>(kMostVotes - (word >> kPlaceBits));
      int32_t* const c = codes + kept++ * levels_;
      c[levels_ - 1] = static_cast<int32_t>(leaf.last);
      uint64_t number = parent.number;
      for (int l = levels_ - 2; l > 0; --l) {
        c[l] = static_cast<int32_t>(number % static_cast<uint64_t>(body_.size[l]));
        number /= static_cast<uint64_t>(body_.size[l]);
      }
      if (levels_ > 1) c[0] = static_cast<int32_t>(number);
    }
    return kept;
  }

  const Codebook::Body& body_;
  const VoteParams& params_;
  Scratch& s_;
  int levels_, leaves_bits_;
  int64_t last_;
  uint64_t reciprocal_;
  int64_t candidates_ = 0, parents_ = 0, all_votes_ = 0;
};

Status check_params(const Codebook& book, const VoteParams& params) noexcept {
  bool fanout = false;
  for (int64_t k : params.fanout) fanout |= k != 0;
  if ((params.budget != 0) == fanout)
    return Status::error(Code::invalid_argument, "vote: expected either budget or fanout, got %s",
                         fanout ? "both" : "neither");
  if (fanout) {
    int64_t product = 1;
    for (int l = 0; l < kMaxLevels; ++l) {
      const int64_t k = params.fanout[l];
      if ((l < book.levels()) != (k != 0) || k < 0)
        return Status::error(Code::invalid_argument, "vote: fanout expected one number >= 1 for each of %d levels",
                             book.levels());
      if (l < book.levels()) product = k > kMaxSeats ? kMaxSeats + 1 : std::min(product * k, kMaxSeats + 1);
    }
    if (product > kMaxSeats)
      return Status::error(Code::invalid_argument, "vote: fanout expected a product of at most %" PRId64 ", got more",
                           kMaxSeats);
  } else if (params.budget < 1 || params.budget > kMaxSeats) {
    return Status::error(Code::invalid_argument, "vote: budget expected 1 to %" PRId64 ", got %" PRId64, kMaxSeats,
                         params.budget);
  }
  return {};
}

Status check_fingerprint(const char* verb, const Codebook& book, const Agents& agents) noexcept {
  if (agents.fingerprint == book.fingerprint()) return {};
  return Status::error(Code::invalid_argument, "%s: agents expected of codebook %016" PRIx64 ", got %016" PRIx64, verb,
                       book.fingerprint(), agents.fingerprint);
}

}  // namespace

int64_t seats(const VoteParams& params, int levels) noexcept {
  int64_t product = 1;
  for (int l = 0; l < levels && !params.budget; ++l) product *= params.fanout[l];
  return params.budget ? params.budget : product;
}

size_t vote_workspace(const Codebook& book, const VoteParams& params, int64_t longest, int workers) noexcept {
  if (book.empty() || !check_params(book, params).ok()) return 0;
  Arena arena;
  for (int w = 0; w < workers; ++w) Scratch().carve(arena, book, params, longest);
  return arena.used();
}

Status vote(const Context& context, const Codebook& book, const VoteParams& params, Array<const int32_t, 2> codes,
            Histories histories, Array<const float, 1> weights, Agents out) noexcept {
  HISAC_TRY(check_book("vote", &book));
  HISAC_TRY(check_params(book, params));
  HISAC_TRY(check_codes("vote", book, codes.shape, codes.shape[0]));
  HISAC_TRY(check_histories("vote", histories, codes.shape[0]));
  if (weights) HISAC_TRY(check_length("vote", "weights", codes.shape[0], weights.shape[0]));
  const int64_t m = seats(params, book.levels()), users = histories.users;
  const int levels = book.levels();
  if (out.codes.shape[0] != users || out.codes.shape[1] != m || out.codes.shape[2] != levels ||
      out.votes.shape[0] != users || out.votes.shape[1] != m || out.count.shape[0] != users)
    return Status::error(Code::invalid_argument,
                         "vote: out expected codes [%" PRId64 ", %" PRId64 ", %d], votes [%" PRId64 ", %" PRId64
                         "] and count [%" PRId64 "]",
                         users, m, levels, users, m, users);
  if (out.fingerprint) HISAC_TRY(check_fingerprint("vote", book, out));
  const int64_t longest = longest_of(histories);
  Arena arena(context.workspace);
  for (int w = 0; w < workers_of(context); ++w) Scratch().carve(arena, book, params, longest);
  HISAC_TRY(arena.check("vote"));
  parallel_for(context, users, [&](int64_t begin, int64_t end, int worker) {
    Arena mine(context.workspace);
    Scratch scratch;
    for (int w = 0; w <= worker; ++w) scratch.carve(mine, book, params, longest);
    Voter voter(book, params, scratch);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = histories.start(b), rows = histories.end(b) - first;
      const int64_t kept = voter.run(codes.data + first * levels, weights ? weights.data + first : nullptr, rows,
                                     out.codes.data + b * m * levels, out.votes.data + b * m);
      out.count.data[b] = static_cast<int32_t>(kept);
      std::fill(out.codes.data + (b * m + kept) * levels, out.codes.data + (b + 1) * m * levels, -1);
      std::fill(out.votes.data + b * m + kept, out.votes.data + (b + 1) * m, int64_t{0});
    }
  });
  return {};
}

Status prototypes(const Context& context, const Codebook& book, const Agents& agents, Array<float, 3> out) noexcept {
  HISAC_TRY(check_book("prototypes", &book));
  HISAC_TRY(check_fingerprint("prototypes", book, agents));
  const int64_t *const c = agents.codes.shape, *const o = out.shape;
  if (o[0] != c[0] || o[1] != c[1])
    return Status::error(Code::invalid_argument,
                         "prototypes: out expected [%" PRId64 ", %" PRId64 ", %" PRId64 "], got [%" PRId64 ", %" PRId64
                         ", %" PRId64 "]",
                         c[0], c[1], book.width(), o[0], o[1], o[2]);
  return code_prototypes(context, book, {agents.codes.data, {c[0] * c[1], c[2]}}, {out.data, {o[0] * o[1], o[2]}});
}

}  // namespace hisac
