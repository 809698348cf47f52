// SPDX-License-Identifier: Apache-2.0
// What encode, vote, agent_lists, leaf_sums and missing promise of any input, in a form that is not how they compute
// it.
#pragma once
#include <algorithm>
#include <cfloat>
#include <map>
#include <set>
#include <tuple>

#include "fuzz.h"

namespace laws {

/// One row's codes: level by level no codeword is nearer to what is left of it, and none of a lower code as near.
inline void nearest(const hisac::Codebook& book, const float* x, const int32_t* codes) {
  std::vector<float> left(x, x + book.width());
  const bool finite = std::all_of(left.begin(), left.end(), [](float f) { return std::isfinite(f); });
  for (int l = 0; l < book.levels(); ++l) {
    const auto distance = [&](int64_t c) {  // in index order
      double out = 0;
      for (size_t d = 0; d < left.size(); ++d) {
        const double step = double(left[d]) - double(book.centers(l)[test::size(c * book.width()) + d]);
        out += step * step;
      }
      return out;
    };
    if (!finite) {
      CHECK(codes[l] == -1);
      continue;
    }
    CHECK(codes[l] >= 0 && codes[l] < book.size(l));
    const double least = distance(codes[l]);
    for (int64_t c = 0; c < book.size(l); ++c) CHECK(c < codes[l] ? !(distance(c) <= least) : !(distance(c) < least));
    for (size_t d = 0; d < left.size(); ++d) left[d] -= book.centers(l)[test::size(codes[l] * book.width()) + d];
  }
}

/// The list of user b for code c of level 1: by a sort of all present agents.
inline std::vector<int32_t> nearest_agents(const hisac::Codebook& book, const hisac::RouteAgents& agents, int64_t b,
                                           int64_t c, int64_t k) {
  const int64_t m = agents.prototypes.shape[1], width = book.width();
  std::vector<std::pair<double, int32_t>> found;
  for (int64_t a = 0; a < m && (!agents.count || a < agents.count.data[b]); ++a) {
    const float* const p = agents.prototypes.data + (b * m + a) * width;
    double square = 0, distance = 0;
    for (int64_t d = 0; d < width; ++d) {
      const double step = double(book.centers(0)[c * width + d]) - double(p[d]);
      square += double(p[d]) * double(p[d]);
      distance += step * step;
    }
    if (square < 0x1p100) found.emplace_back(distance, static_cast<int32_t>(a));
  }
  std::sort(found.begin(), found.end());
  std::vector<int32_t> out(test::size(k), -1);
  for (size_t i = 0; i < out.size() && i < found.size(); ++i) out[i] = found[i].second;
  return out;
}

/// Whether behaviour i is missing: absent in route, though it has a row of v without a NaN or an infinity. x, v: the
/// rows of the tables, as floats.
inline bool missing(const hisac::Histories& in, const hisac::Codebook* book, const std::vector<float>& x,
                    const std::vector<float>& v, int64_t i) {
  const auto inside = [](int64_t id, int64_t rows) { return id >= 0 && id < rows; };
  const int64_t item = in.x_ids ? in.x_ids[i] : i, row = in.v_ids ? in.v_ids[i] : i;
  if (!in.v.data || !inside(row, in.v.rows)) return false;
  for (int64_t d = 0; d < in.v.width; ++d)
    if (!std::isfinite(v[test::size(row * in.v.width + d)])) return false;
  if (!inside(item, in.items()) || (in.bias && !std::isfinite(in.bias.data[i]))) return true;
  if (in.spread && !(in.spread.data[i] >= 0 && std::isfinite(in.spread.data[i]))) return true;
  const int32_t* const codes = in.codes.data + item * in.codes.shape[1];
  if (book && !book->valid(codes)) return true;
  std::vector<float> own;
  if (in.x.data)
    own.assign(x.begin() + item * in.x.width, x.begin() + (item + 1) * in.x.width);
  else
    own.resize(test::size(book->width())), book->prototype(codes, own.data());
  double square = 0;
  for (float f : own) {
    if (in.x_scale) f *= in.x_scale.data[in.x_scale.shape[0] == 1 ? 0 : item];
    square += double(f) * double(f);
  }
  return !(square < 0x1p100);
}

/// The codes of each behaviour, -1 where its id is outside the table.
inline std::vector<int32_t> codes_of(const hisac::Histories& in) {
  const int64_t levels = in.codes.shape[1];
  std::vector<int32_t> out(test::size(in.behaviours() * levels), -1);
  for (int64_t i = 0; i < in.behaviours(); ++i) {
    const int64_t item = in.x_ids ? in.x_ids[i] : i;
    if (item >= 0 && item < in.codes.shape[0])
      std::copy_n(in.codes.data + item * levels, levels, &out[test::size(i * levels)]);
  }
  return out;
}

/// The votes of the behaviours [first, last) of a user. codes: of all behaviours.
inline std::vector<int64_t> votes(const hisac::Codebook& book, const std::vector<int32_t>& codes,
                                  const hisac::Weights& weights, int64_t first, int64_t last) {
  constexpr int64_t kMostOfUser = int64_t{1} << 40, kMostOfRow = kMostOfUser - 1;
  const auto floats = static_cast<const float*>(weights.data);
  const auto integers = static_cast<const int64_t*>(weights.data);
  std::vector<int64_t> voters, out(test::size(last - first));
  for (int64_t i = first; i < last; ++i) {
    const bool some = !weights || (weights.dtype == hisac::DType::int64 ? integers[i] > 0 : floats[i] > 0);  // not NaN
    if (some && book.valid(codes.data() + i * book.levels())) voters.push_back(i);
  }
  if (!weights) {
    for (int64_t i : voters) out[test::size(i - first)] = 1;
  } else if (weights.dtype == hisac::DType::int64) {
    uint64_t total = 0;
    int64_t unit = 1;  // of one vote
    for (int64_t i : voters) total += static_cast<uint64_t>(std::min(integers[i], kMostOfRow));
    while (total / static_cast<uint64_t>(unit) >= uint64_t{kMostOfUser}) unit *= 2;
    for (int64_t i : voters) out[test::size(i - first)] = std::min(integers[i], kMostOfRow) / unit;
  } else {
    float largest = 0;
    for (int64_t i : voters) largest = std::max(largest, std::min(floats[i], FLT_MAX));
    double most = 1 << 24;  // of a row
    for (uint64_t n = voters.size(); n >= 1 << 16; n /= 2) most /= 2;
    for (int64_t i : voters)
      out[test::size(i - first)] = std::llrint(most * double(std::min(floats[i], FLT_MAX) / largest));
  }
  return out;
}

/// One user's votes in the code tree, and the leaves that got a seat.
class Tree {
 public:
  using Prefix = std::vector<int32_t>;

  /// codes: of all behaviours; the user has [first, last).
  Tree(const hisac::Codebook& book, const std::vector<int32_t>& codes, const hisac::Weights& weights, int64_t first,
       int64_t last)
      : levels_(test::size(book.levels())) {
    const std::vector<int64_t> of_rows = votes(book, codes, weights, first, last);
    for (int64_t i = first; i < last; ++i) {
      const int32_t* const row = codes.data() + i * book.levels();
      if (const int64_t n = of_rows[test::size(i - first)]) add({row, row + levels_}, n, 0);
    }
    CHECK(nodes_.empty() || nodes_.at({}).votes < int64_t{1} << 40);
  }

  /// Leaf sums have each leaf's votes, and none is missing.
  void summed(const int32_t* codes, const int64_t* votes, int64_t count) const {
    int64_t total = 0;
    for (int64_t g = 0; g < count; ++g) {
      const auto leaf = nodes_.find(
          Prefix(codes + g * static_cast<int64_t>(levels_), codes + (g + 1) * static_cast<int64_t>(levels_)));
      CHECK(votes[g] == (leaf == nodes_.end() ? 0 : leaf->second.votes));
      total += votes[g];
    }
    CHECK(total == (nodes_.empty() ? 0 : nodes_.at({}).votes));
  }

  /// Counts the agents: leaves with their votes, each once, in order.
  void seat(const int32_t* agents, const int64_t* votes, int64_t count) {
    for (int64_t a = 0; a < count; ++a) {
      const Prefix leaf(agents + a * static_cast<int64_t>(levels_), agents + (a + 1) * static_cast<int64_t>(levels_));
      CHECK(nodes_.count(leaf) && nodes_[leaf].votes == votes[a] && !nodes_[leaf].seats);
      CHECK(a == 0 || std::tie(votes[a], before_) < std::tie(votes[a - 1], leaf));
      before_ = leaf;
      add(leaf, 0, 1);
    }
  }

  /// By budget: all that there is room for, and at no node would a seat be better with another child (D'Hondt).
  void fair(int64_t budget) const {
    siblings([](const Node& a, int32_t a_code, const Node& b, int32_t b_code) {
      if (!a.seats || b.seats == b.leaves) return;
      const uint64_t last = key(a.votes, a.seats), next = key(b.votes, b.seats + 1);  // of a's last seat and b's next
      CHECK(std::tie(next, b.votes, a_code) <= std::tie(last, a.votes, b_code));
    });
    if (!nodes_.empty()) CHECK(nodes_.at({}).seats == std::min(budget, nodes_.at({}).leaves));
  }

  /// By fan-out: of a node with seats the fullest children have some, as many as its level says.
  void fullest(const int64_t* fanout) const {
    std::map<Prefix, int64_t> children, seated;
    for (const auto& [prefix, node] : nodes_) {
      if (prefix.empty()) continue;
      const Prefix parent(prefix.begin(), prefix.end() - 1);
      ++children[parent];
      seated[parent] += node.seats > 0;
    }
    for (const auto& [parent, n] : children)
      if (nodes_.at(parent).seats) CHECK(seated[parent] == std::min(n, fanout[parent.size()]));
    if (!nodes_.empty()) CHECK(nodes_.at({}).seats > 0);
    siblings([](const Node& a, int32_t a_code, const Node& b, int32_t b_code) {
      if (a.seats && !b.seats) CHECK(std::tie(b.votes, a_code) < std::tie(a.votes, b_code));
    });
  }

  /// By beam: the leaves that have seats are those whose nodes are, at each level, among the first k of their level, of
  /// nodes below such nodes.
  void foremost(const int64_t* beam) const {
    std::set<Prefix> kept{{}};
    for (size_t l = 0; l < levels_; ++l) {
      std::vector<std::pair<int64_t, Prefix>> order;
      for (const auto& [prefix, node] : nodes_)
        if (prefix.size() == l + 1 && kept.count({prefix.begin(), prefix.end() - 1}))
          order.emplace_back(-node.votes, prefix);
      std::sort(order.begin(), order.end());
      kept.clear();
      for (size_t i = 0; i < order.size() && i < static_cast<size_t>(beam[l]); ++i) kept.insert(order[i].second);
    }
    for (const auto& [prefix, node] : nodes_)
      if (prefix.size() == levels_) CHECK(node.seats == static_cast<int64_t>(kept.count(prefix)));
  }

 private:
  struct Node {
    int64_t votes = 0, leaves = 0, seats = 0;
  };
  static uint64_t key(int64_t votes, int64_t seats) {
    return (static_cast<uint64_t>(votes) << 24) / static_cast<uint64_t>(seats);
  }
  void add(const Prefix& leaf, int64_t votes, int64_t seats) {
    const bool is_new = !nodes_.count(leaf);
    for (size_t l = 0; l <= levels_; ++l) {
      Node& node = nodes_[Prefix(leaf.begin(), leaf.begin() + static_cast<std::ptrdiff_t>(l))];
      node.votes += votes;
      node.leaves += is_new;
      node.seats += seats;
    }
  }
  /// Every ordered pair of children of one node, of which the first has a seat.
  template <class Visit>
  void siblings(Visit visit) const {
    std::map<Prefix, std::vector<std::pair<int32_t, const Node*>>> families;
    for (const auto& [prefix, node] : nodes_)
      if (!prefix.empty()) families[Prefix(prefix.begin(), prefix.end() - 1)].emplace_back(prefix.back(), &node);
    for (const auto& [parent, children] : families) {
      if (!nodes_.at(parent).seats) continue;
      for (const auto& [a_code, a] : children)
        for (const auto& [b_code, b] : children)
          if (a != b) visit(*a, a_code, *b, b_code);
    }
  }

  size_t levels_;
  std::map<Prefix, Node> nodes_;
  Prefix before_;
};

}  // namespace laws
