// SPDX-License-Identifier: Apache-2.0
// One user at a time: count the votes of leaves, grouped by their parents; then walk the tree from the root down over
// the sorted parents. Where parents are few, rows are first dealt into a bucket for each parent, so that a bucket's
// counters stay in L1; otherwise leaves are hashed, then sorted by parent.
//
// Top-down equals the definition's bottom-up orders: the order at a node merges its children's orders, so the first s
// leaves at a node are, for each child, its first s_c, where the s_c are the D'Hondt seats of the children, capped by
// how many leaves they have. Leaves of one parent stay unsorted: every choice compares votes, then codes.
#include "hisac/vote.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "checks.h"
#include "codebook_body.h"
#include "parallel.h"

namespace hisac {
namespace {

constexpr int64_t kMostVoters = (int64_t{1} << 24) - 1;
constexpr int64_t kMostBuckets = int64_t{1} << 16;  // parents, and codes of the last level, to be counted in buckets,
constexpr int64_t kBucketRatio = 8;                 // and parents per row, since every user's buckets are cleared

struct Leaf {
  uint64_t key;
  int64_t votes;
};

/// More votes, then the lower code: the order of the agents, and of leaves under one parent.
bool before(const Leaf& a, const Leaf& b) noexcept { return a.votes != b.votes ? a.votes > b.votes : a.key < b.key; }

/// A node above the leaves that has votes: its leaves are [begin, end).
struct Parent {
  uint64_t number;
  int64_t begin, end, votes;
};

/// A node of the tree: a run of parents, the votes and leaves below it, and the seats it has.
struct Node {
  int64_t begin, end, votes, leaves, seats;
};

/// More of the key n / (seats + 1), then more votes, then the lower code first.
struct NextSeat {
  static uint64_t key(const Node& n) noexcept {
    return (static_cast<uint64_t>(n.votes) << 24) / static_cast<uint64_t>(n.seats + 1);
  }
  bool operator()(const Node& a, const Node& b) const noexcept {  // a heap's "less"
    const uint64_t ka = key(a), kb = key(b);
    if (ka != kb) return ka < kb;
    if (a.votes != b.votes) return a.votes < b.votes;
    return a.begin > b.begin;
  }
};

bool more_votes(const Node& a, const Node& b) noexcept {
  return a.votes != b.votes ? a.votes > b.votes : a.begin < b.begin;
}

struct Scratch {
  bool buckets = false;
  int64_t parents_possible = 0, last = 0, slots = 0;
  // in buckets
  uint32_t* fill = nullptr;     // [parents] rows of a bucket, then where it ends
  uint32_t* bucket = nullptr;   // [rows] last codes, by bucket
  uint32_t* weight = nullptr;   // [rows]
  int64_t* counter = nullptr;   // [C_L]; all zero between buckets
  uint32_t* touched = nullptr;  // [C_L]
  // hashed
  uint32_t* table = nullptr;  // [slots] 1 + the leaf's place; all zero between users
  uint32_t* slot = nullptr;   // [leaves] where it stands in the table
  Leaf* spare = nullptr;      // [leaves] for the sort
  // both
  Leaf *leaves = nullptr, *kept = nullptr;
  Parent* parents = nullptr;
  Node *nodes = nullptr, *next = nullptr, *children = nullptr;

  void carve(Arena& arena, const Codebook& book, const VoteParams& params, int64_t longest) noexcept {
    const Codebook::Body& body = book.body();
    const int64_t rows = std::min(longest, kMostVoters), m = seats(params, book.levels());
    last = body.size[book.levels() - 1];
    parents_possible = 1;
    for (int l = 0; l + 1 < book.levels() && parents_possible <= kMostBuckets; ++l) parents_possible *= body.size[l];
    buckets = parents_possible <= std::min(kMostBuckets, kBucketRatio * rows + 1) && last <= kMostBuckets;
    const int64_t most_parents = buckets ? std::min(parents_possible, rows) : rows;
    for (slots = 16; slots < 2 * rows;) slots *= 2;
    fill = arena.take<uint32_t>(buckets ? parents_possible : 0);
    bucket = arena.take<uint32_t>(buckets ? rows : 0);
    weight = arena.take<uint32_t>(buckets ? rows : 0);
    counter = arena.take<int64_t>(buckets ? last : 0);
    touched = arena.take<uint32_t>(buckets ? last : 0);
    table = arena.take<uint32_t>(buckets ? 0 : slots);
    slot = arena.take<uint32_t>(buckets ? 0 : rows);
    spare = arena.take<Leaf>(buckets ? 0 : rows);
    leaves = arena.take<Leaf>(rows);
    parents = arena.take<Parent>(most_parents);
    children = arena.take<Node>(most_parents);
    nodes = arena.take<Node>(m);
    next = arena.take<Node>(m);
    kept = arena.take<Leaf>(m);
  }

  void clear() noexcept {
    if (buckets)
      std::fill(counter, counter + last, int64_t{0});
    else
      std::fill(table, table + slots, 0u);
  }
};

uint32_t quantise(float w) noexcept {
  if (!(w > 0)) return 0;
  return static_cast<uint32_t>(std::llrint(double(std::min(w, 16.f)) * 4096));
}

class Voter {
 public:
  Voter(const Codebook& book, const VoteParams& params, Scratch& scratch) noexcept
      : body_(book.body()), params_(params), s_(scratch), levels_(book.levels()), last_(body_.size[levels_ - 1]) {}

  /// One user: the kept leaves, sorted by votes and code; returns how many.
  int64_t run(const int32_t* codes, const float* weights, int64_t rows) noexcept {
    rows = std::min(rows, kMostVoters);
    leaves_ = parents_ = 0;
    if (!s_.buckets)
      count_hashed(codes, weights, rows);
    else if (levels_ == 2)
      weights ? count_buckets<2, true>(codes, weights, rows) : count_buckets<2, false>(codes, weights, rows);
    else
      weights ? count_buckets<0, true>(codes, weights, rows) : count_buckets<0, false>(codes, weights, rows);
    kept_ = 0;
    if (parents_) select();
    std::sort(s_.kept, s_.kept + kept_, before);
    return kept_;
  }

  void write(int64_t place, int32_t* codes, int64_t* votes) const noexcept {
    uint64_t key = s_.kept[place].key;
    *votes = s_.kept[place].votes;
    for (int l = 0; l < levels_; ++l) {
      codes[l] = static_cast<int32_t>(key / body_.stride[l]);
      key %= body_.stride[l];
    }
  }

 private:
  /// A row's parent and last code; false where a code is out of range. L: the levels, 0: any.
  template <int L>
  bool locate(const int32_t* codes, uint64_t* parent, uint32_t* last) const noexcept {
    const int levels = L ? L : levels_;
    bool ok = true;
    uint64_t number = 0;
    for (int l = 0; l < levels; ++l) {
      ok &= static_cast<uint32_t>(codes[l]) < static_cast<uint32_t>(body_.size[l]);
      if (l + 1 < levels) number = number * static_cast<uint64_t>(body_.size[l]) + static_cast<uint32_t>(codes[l]);
    }
    *parent = number;
    *last = static_cast<uint32_t>(codes[levels - 1]);
    return ok;
  }

  template <int L, bool weighted>
  void count_buckets(const int32_t* codes, const float* weights, int64_t rows) noexcept {
    const int levels = L ? L : levels_;
    std::fill(s_.fill, s_.fill + s_.parents_possible, 0u);
    uint64_t parent;
    uint32_t last;
    for (int64_t i = 0; i < rows; ++i)
      if (locate<L>(codes + i * levels, &parent, &last)) ++s_.fill[parent];
    uint32_t total = 0;
    for (int64_t p = 0; p < s_.parents_possible; ++p) total += std::exchange(s_.fill[p], total);
    for (int64_t i = 0; i < rows; ++i)
      if (locate<L>(codes + i * levels, &parent, &last)) {
        const uint32_t at = s_.fill[parent]++;
        s_.bucket[at] = last;
        if (weighted) s_.weight[at] = quantise(weights[i]);
      }
    for (int64_t p = 0, at = 0; p < s_.parents_possible; ++p) {
      const int64_t end = s_.fill[p];
      if (end > at) count_bucket<weighted>(static_cast<uint64_t>(p), at, end);
      at = end;
    }
  }

  template <bool weighted>
  void count_bucket(uint64_t number, int64_t at, int64_t end) noexcept {
    int64_t found = 0;
    for (; at < end; ++at) {
      const uint32_t c = s_.bucket[at];
      const int64_t votes = weighted ? s_.weight[at] : 1;
      s_.touched[found] = c;
      found += votes != 0 && s_.counter[c] == 0;
      s_.counter[c] += votes;
      if (found == last_) break;  // all are touched, and `touched` is full
    }
    for (++at; at < end; ++at) s_.counter[s_.bucket[at]] += weighted ? s_.weight[at] : 1;
    if (found == 0) return;
    Parent parent{number, leaves_, leaves_ + found, 0};
    for (int64_t j = 0; j < found; ++j) {
      const uint32_t c = s_.touched[j];
      parent.votes += s_.counter[c];
      s_.leaves[leaves_++] = {number * static_cast<uint64_t>(last_) + c, std::exchange(s_.counter[c], 0)};
    }
    s_.parents[parents_++] = parent;
  }

  void count_hashed(const int32_t* codes, const float* weights, int64_t rows) noexcept {
    const uint64_t mask = static_cast<uint64_t>(s_.slots - 1);
    for (int64_t i = 0; i < rows; ++i, codes += levels_) {
      uint64_t parent;
      uint32_t last;
      const int64_t votes = weights ? quantise(weights[i]) : 1;
      if (!votes || !locate<0>(codes, &parent, &last)) continue;
      const uint64_t key = parent * static_cast<uint64_t>(last_) + last;
      uint64_t at = (key * 0x9e3779b97f4a7c15u) >> 20 & mask;
      while (s_.table[at] && s_.leaves[s_.table[at] - 1].key != key) at = (at + 1) & mask;
      if (s_.table[at]) {
        s_.leaves[s_.table[at] - 1].votes += votes;
      } else {
        s_.slot[leaves_] = static_cast<uint32_t>(at);
        s_.leaves[leaves_] = {key, votes};
        s_.table[at] = static_cast<uint32_t>(++leaves_);
      }
    }
    for (int64_t j = 0; j < leaves_; ++j) s_.table[s_.slot[j]] = 0;
    sort_leaves();
    for (int64_t i = 0; i < leaves_;) {
      Parent parent{s_.leaves[i].key / static_cast<uint64_t>(last_), i, i, 0};
      for (; i < leaves_ &&
             s_.leaves[i].key - parent.number * static_cast<uint64_t>(last_) < static_cast<uint64_t>(last_);
           ++i)
        parent.votes += s_.leaves[i].votes;
      parent.end = i;
      s_.parents[parents_++] = parent;
    }
  }

  /// Radix sort by key, a byte a pass, only the bytes in which keys differ.
  void sort_leaves() noexcept {
    uint64_t differ = 0;
    for (int64_t j = 0; j < leaves_; ++j) differ |= s_.leaves[j].key ^ s_.leaves[0].key;
    for (int shift = 0; shift < 64; shift += 8) {
      if ((differ >> shift & 255) == 0) continue;
      int64_t at[256] = {};
      for (int64_t j = 0; j < leaves_; ++j) ++at[s_.leaves[j].key >> shift & 255];
      int64_t total = 0;
      for (int64_t& a : at) total += std::exchange(a, total);
      for (int64_t j = 0; j < leaves_; ++j) s_.spare[at[s_.leaves[j].key >> shift & 255]++] = s_.leaves[j];
      std::swap(s_.leaves, s_.spare);
    }
  }

  void select() noexcept {
    int64_t n = 1;
    s_.nodes[0] = {0, parents_, 0, leaves_, std::min(params_.budget, leaves_)};
    for (int l = 0; l + 1 < levels_; ++l) {
      int64_t m = 0;
      for (int64_t i = 0; i < n; ++i) {
        const Node node = s_.nodes[i];
        if (params_.budget && node.leaves <= node.seats) {
          keep_all(node);
          continue;
        }
        const int64_t found = children_of(node, l);
        const int64_t take = params_.budget ? give_seats(found, node.seats) : most_voted(found, params_.fanout[l]);
        std::copy(s_.children, s_.children + take, s_.next + m);
        m += take;
      }
      std::swap(s_.nodes, s_.next);
      n = m;
    }
    for (int64_t i = 0; i < n; ++i) keep_leaves(s_.parents[s_.nodes[i].begin], s_.nodes[i].seats);
  }

  /// The children of a node that lie at `level`, above the leaves, into scratch.children.
  int64_t children_of(const Node& node, int level) noexcept {
    const uint64_t below = body_.stride[level] / static_cast<uint64_t>(last_);  // parents below such a child
    int64_t found = 0;
    for (int64_t i = node.begin; i < node.end;) {
      Node child{i, i, 0, 0, 0};
      const uint64_t first = s_.parents[i].number / below * below;
      for (; i < node.end && s_.parents[i].number - first < below; ++i) {
        child.votes += s_.parents[i].votes;
        child.leaves += s_.parents[i].end - s_.parents[i].begin;
      }
      child.end = i;
      s_.children[found++] = child;
    }
    return found;
  }

  int64_t most_voted(int64_t found, int64_t k) noexcept {
    if (k >= found) return found;
    std::nth_element(s_.children, s_.children + k, s_.children + found, more_votes);
    return k;
  }

  /// D'Hondt among scratch.children, each capped by its leaves; those with seats come first, returns how many. A child
  /// is owed floor(seats n_c / n) at least (keys of n / seats and more number at most `seats`), so only the rest is
  /// dealt out one by one.
  int64_t give_seats(int64_t found, int64_t seats) noexcept {
    Node* const c = s_.children;
    int64_t votes = 0, open = seats;
    for (int64_t j = 0; j < found; ++j) votes += c[j].votes;
    for (int64_t j = 0; j < found; ++j) {
      c[j].seats = std::min(c[j].leaves, c[j].votes * seats / votes);  // the product is below 2^53
      open -= c[j].seats;
    }
    Node* last = std::partition(c, c + found, [](const Node& n) { return n.seats < n.leaves; });
    std::make_heap(c, last, NextSeat{});
    for (; open > 0 && last > c; --open) {
      std::pop_heap(c, last, NextSeat{});
      if (++last[-1].seats < last[-1].leaves)
        std::push_heap(c, last, NextSeat{});
      else
        --last;
    }
    return std::partition(c, c + found, [](const Node& n) { return n.seats > 0; }) - c;
  }

  void keep_all(const Node& node) noexcept {
    const int64_t begin = s_.parents[node.begin].begin;
    std::copy(s_.leaves + begin, s_.leaves + begin + node.leaves, s_.kept + kept_);
    kept_ += node.leaves;
  }

  void keep_leaves(const Parent& parent, int64_t seats) noexcept {
    const int64_t found = parent.end - parent.begin;
    const int64_t take = std::min(found, params_.budget ? seats : params_.fanout[levels_ - 1]);
    Leaf* const leaf = s_.leaves + parent.begin;
    if (take < found) std::nth_element(leaf, leaf + take, leaf + found, before);
    std::copy(leaf, leaf + take, s_.kept + kept_);
    kept_ += take;
  }

  const Codebook::Body& body_;
  const VoteParams& params_;
  Scratch& s_;
  int levels_;
  int64_t last_;
  int64_t leaves_ = 0, parents_ = 0, kept_ = 0;
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
  for (int w = 0; w < workers_of(context); ++w) {
    Scratch scratch;
    scratch.carve(arena, book, params, longest);
    if (scratch.kept) scratch.clear();
  }
  HISAC_TRY(arena.check("vote"));
  parallel_for(context, users, [&](int64_t begin, int64_t end, int worker) {
    Arena mine(context.workspace);
    Scratch scratch;
    for (int w = 0; w <= worker; ++w) scratch.carve(mine, book, params, longest);
    Voter voter(book, params, scratch);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = histories.start(b), rows = histories.end(b) - first;
      const int64_t kept = voter.run(codes.data + first * levels, weights ? weights.data + first : nullptr, rows);
      out.count.data[b] = static_cast<int32_t>(kept);
      for (int64_t a = 0; a < kept; ++a)
        voter.write(a, out.codes.data + (b * m + a) * levels, out.votes.data + b * m + a);
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
