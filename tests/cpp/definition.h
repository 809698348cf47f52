// SPDX-License-Identifier: Apache-2.0
// The verbs as their headers define them, in double and without haste: what the core is compared with.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "support.h"

namespace definition {

using hisac::Codebook;
using Codes = std::vector<int32_t>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// One row; float32 residuals, float64 distances in index order, lower code on a tie.
inline Codes encode(const Codebook& book, const float* x) {
  std::vector<float> r(x, x + book.width());
  for (float f : r)
    if (!std::isfinite(f)) return Codes(test::size(book.levels()), -1);
  Codes out;
  for (int l = 0; l < book.levels(); ++l) {
    const float* best = nullptr;
    double least = 0;
    for (int64_t c = 0; c < book.size(l); ++c) {
      const float* const center = book.centers(l) + c * book.width();
      double distance = 0;
      for (size_t d = 0; d < r.size(); ++d) distance += (double(r[d]) - center[d]) * (double(r[d]) - center[d]);
      if (best && !(distance < least)) continue;
      best = center;
      least = distance;
    }
    out.push_back(static_cast<int32_t>((best - book.centers(l)) / book.width()));
    for (size_t d = 0; d < r.size(); ++d) r[d] -= best[d];
  }
  return out;
}

// ---- vote

struct Leaf {
  Codes codes;
  int64_t votes;
};

/// The order in which a node at `level` seats its leaves.
inline std::vector<Leaf> order(std::vector<Leaf> leaves, size_t level) {
  if (leaves.size() < 2 || level == leaves[0].codes.size()) return leaves;
  struct Candidate {
    uint64_t key;
    int64_t votes;
    int32_t code;
    int64_t place;
    Leaf leaf;
  };
  std::map<int32_t, std::vector<Leaf>> children;
  for (const Leaf& leaf : leaves) children[leaf.codes[level]].push_back(leaf);
  std::vector<Candidate> all;
  for (const auto& [code, below] : children) {
    int64_t votes = 0, place = 0;
    for (const Leaf& leaf : below) votes += leaf.votes;
    for (const Leaf& leaf : order(below, level + 1)) {
      ++place;
      all.push_back({(static_cast<uint64_t>(votes) << 24) / static_cast<uint64_t>(place), votes, code, place, leaf});
    }
  }
  std::sort(all.begin(), all.end(), [](const Candidate& a, const Candidate& b) {
    return std::tie(b.key, b.votes, a.code, a.place) < std::tie(a.key, a.votes, b.code, b.place);
  });
  std::vector<Leaf> out;
  for (const Candidate& c : all) out.push_back(c.leaf);
  return out;
}

/// The leaves under the k_l best children of every kept node.
inline std::vector<Leaf> fan_out(const std::vector<Leaf>& leaves, size_t level, const int64_t* fanout) {
  if (leaves.empty() || level == leaves[0].codes.size()) return leaves;
  std::map<int32_t, std::vector<Leaf>> children;
  for (const Leaf& leaf : leaves) children[leaf.codes[level]].push_back(leaf);
  std::vector<std::pair<int64_t, int32_t>> ranked;
  for (const auto& [code, below] : children) {
    int64_t votes = 0;
    for (const Leaf& leaf : below) votes += leaf.votes;
    ranked.push_back({-votes, code});
  }
  std::sort(ranked.begin(), ranked.end());
  std::vector<Leaf> out;
  for (size_t i = 0; i < ranked.size() && i < test::size(fanout[level]); ++i)
    for (const Leaf& leaf : fan_out(children[ranked[i].second], level + 1, fanout)) out.push_back(leaf);
  return out;
}

/// The agents of one user: codes [rows, L], weights [rows] or null.
inline std::vector<Leaf> vote(const Codebook& book, const hisac::VoteParams& params, const int32_t* codes,
                              const float* weights, int64_t rows) {
  std::map<Codes, int64_t> counts;
  for (int64_t i = 0; i < rows; ++i) {
    const Codes c(codes + i * book.levels(), codes + (i + 1) * book.levels());
    bool valid = true;
    for (int l = 0; l < book.levels(); ++l) valid = valid && c[test::size(l)] >= 0 && c[test::size(l)] < book.size(l);
    int64_t votes = 1;
    if (weights) votes = weights[i] > 0 ? std::llrint(double(std::min(weights[i], 16.f)) * 4096) : 0;
    if (valid && votes) counts[c] += votes;
  }
  std::vector<Leaf> leaves;
  for (const auto& [c, votes] : counts) leaves.push_back({c, votes});
  leaves = params.budget ? order(leaves, 0) : fan_out(leaves, 0, params.fanout);
  if (params.budget && leaves.size() > test::size(params.budget)) leaves.resize(test::size(params.budget));
  std::sort(leaves.begin(), leaves.end(),
            [](const Leaf& a, const Leaf& b) { return std::tie(b.votes, a.codes) < std::tie(a.votes, b.codes); });
  return leaves;
}

// ---- route

/// One user, all in double; rows and agents that are absent are not passed in.
struct User {
  std::vector<std::vector<double>> x, v;  // [rows][D], [rows][V]
  std::vector<double> bias, spread;       // [rows]; spread: a leaf's variance, else 0
  std::vector<std::vector<double>> p;     // [agents][D]
  std::vector<double> tau;                // [agents]
};

/// log u [agents][rows].
inline std::vector<std::vector<double>> log_weights(const User& u, hisac::Normalize normalize) {
  std::vector<std::vector<double>> z(u.p.size(), std::vector<double>(u.x.size()));
  for (size_t i = 0; i < u.x.size(); ++i) {
    double top = -kInfinity, sum = 0;
    for (size_t a = 0; a < u.p.size(); ++a) {
      double distance = u.spread[i];
      for (size_t d = 0; d < u.p[a].size(); ++d) distance += (u.x[i][d] - u.p[a][d]) * (u.x[i][d] - u.p[a][d]);
      z[a][i] = -distance / u.tau[a];
      top = std::max(top, z[a][i]);
    }
    for (size_t a = 0; a < u.p.size(); ++a) sum += std::exp(z[a][i] - top);
    for (size_t a = 0; a < u.p.size(); ++a)
      z[a][i] += u.bias[i] - (normalize == hisac::Normalize::agents ? top + std::log(sum) : 0);
  }
  return z;
}

/// sum u y / sum u and log sum u; an agent without rows: zero and -inf.
inline void aggregate(const std::vector<double>& z, const std::vector<std::vector<double>>& y, std::vector<double>* out,
                      double* lse) {
  double top = -kInfinity, sum = 0;
  for (double t : z) top = std::max(top, t);
  std::fill(out->begin(), out->end(), 0.0);
  *lse = -kInfinity;
  if (z.empty()) return;
  for (size_t i = 0; i < z.size(); ++i) {
    const double w = std::exp(z[i] - top);
    sum += w;
    for (size_t d = 0; d < out->size(); ++d) (*out)[d] += w * y[i][d];
  }
  for (double& t : *out) t /= sum;
  *lse = top + std::log(sum);
}

struct Routed {
  std::vector<std::vector<double>> tokens;  // [agents][V]
  std::vector<double> lse;
};

inline Routed route(User u, hisac::Normalize normalize, int refine, size_t value_width) {
  double lse;
  for (int round = 0; round < refine && !u.x.empty(); ++round) {
    const auto z = log_weights(u, normalize);
    for (size_t a = 0; a < u.p.size(); ++a) aggregate(z[a], u.x, &u.p[a], &lse);
  }
  const auto z = log_weights(u, normalize);
  Routed out;
  for (size_t a = 0; a < u.p.size(); ++a) {
    std::vector<double> token(value_width);
    aggregate(z[a], u.v, &token, &lse);
    out.tokens.push_back(token);
    out.lse.push_back(lse);
  }
  return out;
}

/// Rows of one leaf as one at their mean, with their variance and the log of their weight.
inline User by_leaf(const User& u, const std::vector<uint64_t>& leaf) {
  std::map<uint64_t, std::vector<size_t>> groups;
  for (size_t i = 0; i < leaf.size(); ++i) groups[leaf[i]].push_back(i);
  User out;
  out.p = u.p;
  out.tau = u.tau;
  for (const auto& [number, members] : groups) {
    double weight = 0, spread = 0;
    std::vector<double> x(u.x[0].size()), v(u.v[0].size());
    for (size_t i : members) weight += std::exp(u.bias[i]);
    for (size_t i : members) {
      const double share = std::exp(u.bias[i]) / weight;
      for (size_t d = 0; d < x.size(); ++d) x[d] += share * u.x[i][d];
      for (size_t d = 0; d < v.size(); ++d) v[d] += share * u.v[i][d];
    }
    for (size_t i : members) {
      double square = u.spread[i];
      for (size_t d = 0; d < x.size(); ++d) square += (u.x[i][d] - x[d]) * (u.x[i][d] - x[d]);
      spread += std::exp(u.bias[i]) / weight * square;
    }
    out.x.push_back(x);
    out.v.push_back(v);
    out.bias.push_back(std::log(weight));
    out.spread.push_back(spread);
  }
  return out;
}

}  // namespace definition
