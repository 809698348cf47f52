// SPDX-License-Identifier: Apache-2.0
// Seats of parents, the nodes above the leaves: from the root down, by fan-out or in proportion.
//
// Top-down equals the definition's bottom-up orders: the order at a node merges its children's orders, so the first s
// leaves at a node are, for each child, its first s_c, where the s_c are the D'Hondt seats of the children, capped by
// how many leaves they have.
#pragma once
#include "base/arena.h"
#include "base/radix_sort.h"
#include "codebook/body.h"
#include "hisac/vote.h"

namespace hisac::cpu {

/// A node above the leaves that has votes; its leaves lie in [begin, begin + leaves), or in a block of counters.
struct Parent {
  uint64_t number;
  int64_t begin, votes, leaves, seats;
};

class Apportionment {
 public:
  void carve(Arena& arena, const Codebook& book, const VoteParams& params, int64_t most_parents) noexcept {
    const int64_t m = hisac::seats(params, book.levels());
    body_ = &book.body();
    params_ = &params;
    levels_ = book.levels();
    children_ = arena.take<Node>(most_parents);
    bids_ = arena.take<Bid>(most_parents);
    rank_ = arena.take<uint64_t>(most_parents);
    spare_rank_ = arena.take<uint64_t>(most_parents);
    nodes_ = arena.take<Node>(m);
    next_ = arena.take<Node>(m);
  }

  /// The seats of every parent, by its votes and leaves.
  void assign(Parent* parents, int64_t n_parents) noexcept {
    Node root{0, n_parents, 0, 0, 0};
    for (int64_t p = 0; p < n_parents; ++p) {
      root.votes += parents[p].votes;
      root.leaves += parents[p].leaves;
      parents[p].seats = 0;
    }
    root.seats = std::min(params_->budget, root.leaves);
    nodes_[0] = root;
    int64_t n = 1;
    for (int l = 0; l + 1 < levels_; ++l) {
      int64_t m = 0;
      for (int64_t i = 0; i < n; ++i) {
        const Node& node = nodes_[i];
        const int64_t found = children_of(parents, node, l);
        Node* const to = next_ + m;
        m += params_->budget ? give_seats(found, node, to) : most_voted(found, params_->fanout[l], to);
      }
      std::swap(nodes_, next_);
      n = m;
    }
    for (int64_t i = 0; i < n; ++i)
      parents[nodes_[i].begin].seats = params_->budget ? nodes_[i].seats : params_->fanout[levels_ - 1];
  }

 private:
  /// A node of the tree: a run of parents, the votes and leaves below it, and the seats it has.
  struct Node {
    int64_t begin, end, votes, leaves, seats;
  };

  /// A child's next seat: (n << 24) / (seats + 1); among equals, the child with more votes, then the lower code, is
  /// first.
  struct Bid {
    uint64_t key;
    int64_t child;
  };

  /// The children of a node that lie at `level`, above the leaves, into `children`.
  int64_t children_of(const Parent* parents, const Node& node, int level) noexcept {
    const uint64_t below = body_->stride[level] / body_->stride[levels_ - 2];  // parents below such a child
    if (below == 1) {
      for (int64_t i = node.begin; i < node.end; ++i)
        children_[i - node.begin] = {i, i + 1, parents[i].votes, parents[i].leaves, 0};
      return node.end - node.begin;
    }
    int64_t found = 0;
    for (int64_t i = node.begin; i < node.end;) {
      Node child{i, i, 0, 0, 0};
      const uint64_t first = parents[i].number / below * below;
      for (; i < node.end && parents[i].number - first < below; ++i) {
        child.votes += parents[i].votes;
        child.leaves += parents[i].leaves;
      }
      child.end = i;
      children_[found++] = child;
    }
    return found;
  }

  /// The k of `children` with most votes, to `out` in this order; returns how many.
  int64_t most_voted(int64_t found, int64_t k, Node* out) noexcept {
    int64_t all = 0;
    for (int64_t j = 0; j < found; ++j) {
      rank_[j] = rank_word(children_[j].votes, j);
      all |= children_[j].votes;
    }
    sort_ranks(found, all, rank_, spare_rank_);
    const int64_t most = std::min(k, found);
    for (int64_t j = 0; j < most; ++j) out[j] = children_[place_of(rank_[j])];
    return most;
  }

  /// D'Hondt among `children`, each capped by its leaves: those with seats go to `out`, returns how many.
  int64_t give_seats(int64_t found, const Node& node, Node* out) noexcept {
    if (node.leaves <= node.seats) {
      for (int64_t j = 0; j < found; ++j) (out[j] = children_[j]).seats = children_[j].leaves;
      return found;
    }
    const int64_t open = node.seats;  // a child has a leaf at least, so only the first `open` can have a seat
    found = most_voted(found, open, out);
    // For any n / d, the keys of n / d and more are a prefix of the order of seats; n = all votes and d = `open` give
    // no more than there are. A second guess spends most of what rounding and caps left over, then one by one.
    Award a = award(found, node.votes, open, out);
    if (a.given < open && a.live) {
      const Award more = award(found, a.votes, open - a.full + a.live * 3 / 8, out);
      a = more.given <= open ? more : award(found, node.votes, open, out);
    }
    return std::max(a.some, deal(std::min(found, a.some + open - a.given), open - a.given, out));
  }

  /// Children with seats, and seats given; seats of full children; children with seats and room, and their votes.
  struct Award {
    int64_t some, given, full, live, votes;
  };

  /// Each of c[0, found), most votes first, gets as many seats as it has keys of n / d and more.
  static Award award(int64_t found, int64_t n, int64_t d, Node* c) noexcept {
    Award a{0, 0, 0, 0, 0};
    for (; a.some < found && c[a.some].votes * d >= n; ++a.some) {  // the product is below 2^63
      Node& child = c[a.some];
      child.seats = std::min(child.leaves,
                             static_cast<int64_t>(static_cast<uint64_t>(child.votes * d) / static_cast<uint64_t>(n)));
      const bool full = child.seats == child.leaves;
      a.given += child.seats;
      a.full += full ? child.seats : 0;
      a.live += !full;
      a.votes += full ? 0 : child.votes;
    }
    std::for_each(c + a.some, c + found, [](Node& child) { child.seats = 0; });
    return a;
  }

  /// The next `open` seats one by one to c[0, found), most votes first; returns how many of them have seats.
  int64_t deal(int64_t found, int64_t open, Node* c) noexcept {
    const auto bid = [c](int64_t j) {
      return (static_cast<uint64_t>(c[j].votes) << 24) / static_cast<uint64_t>(c[j].seats + 1);
    };
    const auto less = [](const Bid& a, const Bid& b) { return a.key != b.key ? a.key < b.key : a.child > b.child; };
    Bid *const bids = bids_, *last = bids;
    for (int64_t j = 0; j < found && open > 0; ++j)
      if (c[j].seats < c[j].leaves) *last++ = {bid(j), j};
    std::make_heap(bids, last, less);
    int64_t some = 0;
    for (; open > 0 && last > bids; --open) {
      std::pop_heap(bids, last, less);
      const int64_t j = last[-1].child;
      some = std::max(some, j + 1);
      if (++c[j].seats == c[j].leaves) {
        --last;
      } else {
        last[-1].key = bid(j);
        std::push_heap(bids, last, less);
      }
    }
    return some;
  }

  const Codebook::Body* body_ = nullptr;
  const VoteParams* params_ = nullptr;
  int levels_ = 0;
  Node *nodes_ = nullptr, *next_ = nullptr, *children_ = nullptr;
  Bid* bids_ = nullptr;
  uint64_t *rank_ = nullptr, *spare_rank_ = nullptr;
};

}  // namespace hisac::cpu
