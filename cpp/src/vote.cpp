// SPDX-License-Identifier: Apache-2.0
// One user at a time: count votes of leaves in a table, sort the leaves by number, walk the tree from the root down
// over runs of the sorted leaves. Reads the codes once; everything else is as large as the user's distinct leaves.
//
// Top-down equals the definition's bottom-up orders: the order at a node merges its children's orders, so the first s
// leaves at a node are, for each child, its first s_c, where the s_c are the D'Hondt seats of the children, capped by
// how many leaves they have.
#include "hisac/vote.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "checks.h"
#include "codebook_body.h"
#include "parallel.h"

namespace hisac {
namespace {

constexpr int64_t kMostVoters = (int64_t{1} << 24) - 1;
constexpr int64_t kDenseLeaves = int64_t{1} << 18;  // at most: a counter for every leaf; hashed beyond,
constexpr int64_t kDenseRatio = 16;                 // and where clearing the counters would cost more than the rows

struct Leaf {
  uint64_t key;
  int64_t votes;
};

/// A node of the tree: a run of the sorted leaves, its votes, and the seats it has.
struct Node {
  int64_t begin, end, votes, seats;
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

int64_t leaf_limit(const Codebook& book, int64_t longest) noexcept {
  const Codebook::Body& body = book.body();
  longest = std::min(longest, kMostVoters);
  return body.wide ? longest : std::min(longest, static_cast<int64_t>(body.stride[0]) * body.size[0]);
}

struct Scratch {
  bool dense = false;
  int64_t slots = 0;
  uint32_t* table = nullptr;  // [slots] 1 + the leaf's place in `leaves`; all zero between users
  uint32_t* slot = nullptr;   // [leaves] where it stands in the table
  Leaf *leaves = nullptr, *sorted = nullptr;
  Node *nodes = nullptr, *next = nullptr, *children = nullptr;
  int64_t* kept = nullptr;  // [seats] places in the sorted leaves

  void carve(Arena& arena, const Codebook& book, const VoteParams& params, int64_t longest) noexcept {
    const int64_t most = leaf_limit(book, longest), m = seats(params, book.levels());
    const Codebook::Body& body = book.body();
    dense = !body.wide &&
            static_cast<int64_t>(body.stride[0]) * body.size[0] <= std::min(kDenseLeaves, longest * kDenseRatio);
    slots = 16;
    while (!dense && slots < 2 * most) slots *= 2;
    if (dense) slots = static_cast<int64_t>(body.stride[0]) * body.size[0];
    table = arena.take<uint32_t>(slots);
    slot = arena.take<uint32_t>(most);
    leaves = arena.take<Leaf>(most);
    sorted = arena.take<Leaf>(most);
    nodes = arena.take<Node>(m);
    next = arena.take<Node>(m);
    children = arena.take<Node>(most);
    kept = arena.take<int64_t>(m);
  }
};

int64_t quantise(float w) noexcept {
  if (!(w > 0)) return 0;
  return std::llrint(double(std::min(w, 16.f)) * 4096);
}

class Voter {
 public:
  Voter(const Codebook& book, const VoteParams& params, Scratch& scratch) noexcept
      : book_(book), body_(book.body()), params_(params), s_(scratch), levels_(book.levels()) {}

  /// One user: the kept leaves, sorted by votes and code; returns how many.
  int64_t run(const int32_t* codes, const float* weights, int64_t rows) noexcept {
    count(codes, weights, std::min(rows, kMostVoters));
    sort_leaves();
    int64_t kept = params_.budget ? select_budget() : select_fanout();
    const Leaf* const leaves = s_.sorted;
    std::sort(s_.kept, s_.kept + kept, [leaves](int64_t a, int64_t b) {
      return leaves[a].votes != leaves[b].votes ? leaves[a].votes > leaves[b].votes : a < b;
    });
    return kept;
  }

  void write(int64_t place, int32_t* codes, int64_t* votes) const noexcept {
    uint64_t key = s_.sorted[s_.kept[place]].key;
    *votes = s_.sorted[s_.kept[place]].votes;
    for (int l = 0; l < levels_; ++l) {
      codes[l] = static_cast<int32_t>(key / body_.stride[l]);
      key %= body_.stride[l];
    }
  }

 private:
  void add(uint64_t key, int64_t votes) noexcept {
    uint64_t at = key;
    if (!s_.dense) {
      const uint64_t mask = static_cast<uint64_t>(s_.slots - 1);
      at = (key * 0x9e3779b97f4a7c15u) >> 20 & mask;
      while (s_.table[at] && s_.leaves[s_.table[at] - 1].key != key) at = (at + 1) & mask;
    }
    if (s_.table[at]) {
      s_.leaves[s_.table[at] - 1].votes += votes;
    } else {
      s_.slot[count_] = static_cast<uint32_t>(at);
      s_.leaves[count_] = {key, votes};
      s_.table[at] = static_cast<uint32_t>(++count_);
    }
  }

  void count(const int32_t* codes, const float* weights, int64_t rows) noexcept {
    count_ = 0;
    for (int64_t i = 0; i < rows; ++i, codes += levels_) {
      const int64_t votes = weights ? quantise(weights[i]) : 1;
      if (votes && book_.valid(codes)) add(book_.leaf(codes), votes);
    }
    for (int64_t j = 0; j < count_; ++j) s_.table[s_.slot[j]] = 0;
  }

  /// Radix sort by key, a byte a pass, only the bytes in which keys differ.
  void sort_leaves() noexcept {
    if (count_ <= 64) {
      std::copy(s_.leaves, s_.leaves + count_, s_.sorted);
      std::sort(s_.sorted, s_.sorted + count_, [](const Leaf& a, const Leaf& b) { return a.key < b.key; });
      return;
    }
    uint64_t differ = 0;
    for (int64_t j = 0; j < count_; ++j) differ |= s_.leaves[j].key ^ s_.leaves[0].key;
    for (int shift = 0; shift < 64; shift += 8) {
      if ((differ >> shift & 255) == 0) continue;
      int64_t at[256] = {};
      for (int64_t j = 0; j < count_; ++j) ++at[s_.leaves[j].key >> shift & 255];
      int64_t total = 0;
      for (int64_t& a : at) total += std::exchange(a, total);
      for (int64_t j = 0; j < count_; ++j) s_.sorted[at[s_.leaves[j].key >> shift & 255]++] = s_.leaves[j];
      std::swap(s_.leaves, s_.sorted);
    }
    std::swap(s_.leaves, s_.sorted);
  }

  /// The children of a node at `level` into scratch.children.
  int64_t children_of(const Node& node, int level) noexcept {
    const uint64_t stride = body_.stride[level];
    int64_t found = 0;
    for (int64_t i = node.begin; i < node.end;) {
      const uint64_t last = s_.sorted[i].key / stride * stride + (stride - 1);
      Node child{i, i, 0, 0};
      for (; i < node.end && s_.sorted[i].key <= last; ++i) child.votes += s_.sorted[i].votes;
      child.end = i;
      s_.children[found++] = child;
    }
    return found;
  }

  int64_t select_fanout() noexcept {
    int64_t n = count_ ? 1 : 0;
    s_.nodes[0] = {0, count_, 0, 0};
    for (int l = 0; l < levels_; ++l) {
      int64_t m = 0;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t found = children_of(s_.nodes[i], l), take = std::min(found, params_.fanout[l]);
        if (take < found) std::nth_element(s_.children, s_.children + take, s_.children + found, more_votes);
        std::copy(s_.children, s_.children + take, s_.next + m);
        m += take;
      }
      std::swap(s_.nodes, s_.next);
      n = m;
    }
    for (int64_t i = 0; i < n; ++i) s_.kept[i] = s_.nodes[i].begin;
    return n;
  }

  int64_t select_budget() noexcept {
    int64_t n = count_ ? 1 : 0, kept = 0;
    s_.nodes[0] = {0, count_, 0, std::min(params_.budget, count_)};
    for (int l = 0; l < levels_ && n; ++l) {
      int64_t m = 0;
      for (int64_t i = 0; i < n; ++i) {
        const Node node = s_.nodes[i];
        if (node.end - node.begin <= node.seats) {  // a seat for every leaf below
          for (int64_t j = node.begin; j < node.end; ++j) s_.kept[kept++] = j;
          continue;
        }
        const int64_t found = children_of(node, l);
        if (l == levels_ - 1) {  // children are leaves: the ones with most votes
          std::nth_element(s_.children, s_.children + node.seats, s_.children + found, more_votes);
          for (int64_t j = 0; j < node.seats; ++j) s_.kept[kept++] = s_.children[j].begin;
          continue;
        }
        give_seats(found, node.seats);
        for (int64_t j = 0; j < found; ++j)
          if (s_.children[j].seats) s_.next[m++] = s_.children[j];
      }
      std::swap(s_.nodes, s_.next);
      n = m;
    }
    return kept;
  }

  /// D'Hondt among scratch.children, each capped by its leaves. A child is owed floor(seats n_c / n) at least (keys of
  /// n / seats and more number at most `seats`), so only the rest is dealt out one by one.
  void give_seats(int64_t found, int64_t seats) noexcept {
    Node* const c = s_.children;
    int64_t votes = 0, open = 0;
    for (int64_t j = 0; j < found; ++j) votes += c[j].votes;
    for (int64_t j = 0; j < found; ++j) {
      c[j].seats = std::min(c[j].end - c[j].begin, c[j].votes * seats / votes);  // the product is below 2^53
      open += c[j].seats;
    }
    open = seats - open;
    Node* heap = c;
    Node* const end = std::partition(c, c + found, [](const Node& n) { return n.seats < n.end - n.begin; });
    std::make_heap(heap, end, NextSeat{});
    for (Node* last = end; open > 0 && last > heap; --open) {
      std::pop_heap(heap, last, NextSeat{});
      Node& winner = last[-1];
      if (++winner.seats < winner.end - winner.begin)
        std::push_heap(heap, last, NextSeat{});
      else
        --last;
    }
  }

  const Codebook& book_;
  const Codebook::Body& body_;
  const VoteParams& params_;
  Scratch& s_;
  int levels_;
  int64_t count_ = 0;
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
  const int64_t longest = longest_of(histories);
  Arena arena(context.workspace);
  for (int w = 0; w < workers_of(context); ++w) {
    Scratch scratch;
    scratch.carve(arena, book, params, longest);
    if (scratch.table && scratch.kept)
      std::memset(scratch.table, 0, sizeof(uint32_t) * static_cast<size_t>(scratch.slots));
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

}  // namespace hisac
