// SPDX-License-Identifier: Apache-2.0
// The allocation of seats to parents, the nodes above the leaves: from the root down, by D'Hondt's method, by fan-out
// or by beam. Fan-out and beam keep the most voted of a group of children: of one node's, or of a whole level's.
//
// Going down gives the seats of the definition, whose orders go up: the order at a node merges its children's orders.
// So the first s leaves at a node are, for each child, its first s_c, where the s_c are the D'Hondt seats of the
// children, capped by how many leaves they have.
#pragma once
#include "base/arena.h"
#include "base/radix_sort.h"
#include "codebook/body.h"
#include "hisac/vote.h"

namespace hisac::cpu {

/// A node above the leaves that has votes. Its leaves are [begin, begin + leaves), or its counters start at begin.
struct Parent {
  uint64_t number;
  int64_t begin, votes, leaves, seats;
};

class SeatAllocation {
 public:
  void carve(Arena& arena, const Codebook& book, const VoteParams& params, int64_t most_parents) noexcept {
    const int64_t m = hisac::seats(params, book.levels());
    body_ = &book.body();
    beam_ = params.beam[0] != 0;
    kept_ = beam_ ? params.beam : params.fanout;
    params_ = &params;
    levels_ = book.levels();
    arena.take_into(most_parents, children_, heap_, key_, spare_key_);
    arena.take_into(std::max(m, *std::max_element(params.beam, params.beam + kMaxLevels)), nodes_, next_);
  }

  /// Sets the seats of every parent from its votes and leaves. By beam all kept parents share their seats.
  void allocate(Parent* parents, int64_t n_parents) noexcept {
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
      for (int64_t i = 0; i < n;) {
        const Node& node = nodes_[i];
        int64_t found = 0;
        do {
          found = children_of(parents, nodes_[i], l, found);
        } while (++i < n && beam_);
        Node* const out = next_ + m;
        m += params_->budget ? allocate_children(found, node, out) : most_voted(found, kept_[l], out);
      }
      if (beam_)  // their children in the order of codes, which decides ties
        std::sort(next_, next_ + m, [](const Node& a, const Node& b) { return a.begin < b.begin; });
      std::swap(nodes_, next_);
      n = m;
    }
    for (int64_t i = 0; i < n; ++i)
      parents[nodes_[i].begin].seats = params_->budget ? nodes_[i].seats : kept_[levels_ - 1];
  }

 private:
  /// A node of the tree: the parents [begin, end) below it, their votes and leaves, and its seats.
  struct Node {
    int64_t begin, end, votes, leaves, seats;
  };

  /// A child's D'Hondt quotient for its next seat: (votes << 24) / (seats + 1). Among equals the child with more votes,
  /// then the one with the lower code, is first.
  struct Quotient {
    uint64_t key;
    int64_t child;
  };

  /// Writes the children of a node, which are at `level` above the leaves, to children_, behind the `found` of other
  /// nodes; returns how many there are.
  int64_t children_of(const Parent* parents, const Node& node, int level, int64_t found) noexcept {
    const uint64_t below = body_->stride[level] / body_->stride[levels_ - 2];  // parents below such a child
    if (below == 1) {
      for (int64_t i = node.begin; i < node.end; ++i)
        children_[found++] = {i, i + 1, parents[i].votes, parents[i].leaves, 0};
      return found;
    }
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

  /// Writes the k of children_ with most votes to `out`, most votes first; returns how many.
  int64_t most_voted(int64_t found, int64_t k, Node* out) noexcept {
    int64_t all_votes = 0;
    for (int64_t j = 0; j < found; ++j) {
      key_[j] = sort_key(children_[j].votes, j);
      all_votes |= children_[j].votes;
    }
    sort_by_votes(found, all_votes, key_, spare_key_);
    const int64_t voted = std::min(k, found);
    for (int64_t j = 0; j < voted; ++j) out[j] = children_[index_of(key_[j])];
    return voted;
  }

  /// Allocates a node's seats to children_ by D'Hondt, each capped by its leaves. Writes the children with seats to
  /// `out`; returns how many.
  int64_t allocate_children(int64_t found, const Node& node, Node* out) noexcept {
    if (node.leaves <= node.seats) {
      for (int64_t j = 0; j < found; ++j) (out[j] = children_[j]).seats = children_[j].leaves;
      return found;
    }
    const int64_t seats = node.seats;  // a child has at least one leaf, so only the first `seats` can have a seat
    found = most_voted(found, seats, out);
    // For any n / d, the seats of quotients n / d and more are a prefix of the D'Hondt order. n = all votes and d =
    // seats allocate no more than there are. A second n / d allocates most of what rounding and caps left over; the
    // rest goes one by one.
    Allocated a = allocate_by_quotient(found, node.votes, seats, out);
    if (a.seats < seats && a.open_children) {
      const Allocated second =
          allocate_by_quotient(found, a.open_votes, seats - a.full_seats + a.open_children * 3 / 8, out);
      a = second.seats <= seats ? second : allocate_by_quotient(found, node.votes, seats, out);
    }
    return std::max(a.seated, allocate_one_by_one(std::min(found, a.seated + seats - a.seats), seats - a.seats, out));
  }

  /// Children with seats and all their seats; the seats of full children, which have one for each leaf; the other
  /// children with seats and their votes.
  struct Allocated {
    int64_t seated, seats, full_seats, open_children, open_votes;
  };

  /// Each of c[0, found), most votes first, gets as many seats as it has quotients of n / d and more.
  static Allocated allocate_by_quotient(int64_t found, int64_t n, int64_t d, Node* c) noexcept {
    Allocated a{0, 0, 0, 0, 0};
    for (; a.seated < found && c[a.seated].votes * d >= n; ++a.seated) {  // the product is below 2^63
      Node& child = c[a.seated];
      child.seats = std::min(child.leaves,
                             static_cast<int64_t>(static_cast<uint64_t>(child.votes * d) / static_cast<uint64_t>(n)));
      const bool full = child.seats == child.leaves;
      a.seats += child.seats;
      a.full_seats += full ? child.seats : 0;
      a.open_children += !full;
      a.open_votes += full ? 0 : child.votes;
    }
    std::for_each(c + a.seated, c + found, [](Node& child) { child.seats = 0; });
    return a;
  }

  /// Allocates the next `seats` seats one by one to c[0, found), most votes first; returns how many of these have
  /// seats.
  int64_t allocate_one_by_one(int64_t found, int64_t seats, Node* c) noexcept {
    const auto quotient = [c](int64_t j) {
      return (static_cast<uint64_t>(c[j].votes) << 24) / static_cast<uint64_t>(c[j].seats + 1);
    };
    const auto less = [](const Quotient& a, const Quotient& b) {
      return a.key != b.key ? a.key < b.key : a.child > b.child;
    };
    Quotient *const heap = heap_, *last = heap;
    for (int64_t j = 0; j < found && seats > 0; ++j)
      if (c[j].seats < c[j].leaves) *last++ = {quotient(j), j};
    std::make_heap(heap, last, less);
    int64_t seated = 0;
    for (; seats > 0 && last > heap; --seats) {
      std::pop_heap(heap, last, less);
      const int64_t j = last[-1].child;
      seated = std::max(seated, j + 1);
      if (++c[j].seats == c[j].leaves) {
        --last;
      } else {
        last[-1].key = quotient(j);
        std::push_heap(heap, last, less);
      }
    }
    return seated;
  }

  const Codebook::Body* body_ = nullptr;
  const VoteParams* params_ = nullptr;
  const int64_t* kept_ = nullptr;  // how many children a node or, by beam, a level keeps
  bool beam_ = false;
  int levels_ = 0;
  Node *nodes_ = nullptr, *next_ = nullptr, *children_ = nullptr;
  Quotient* heap_ = nullptr;
  uint64_t *key_ = nullptr, *spare_key_ = nullptr;
};

}  // namespace hisac::cpu
