// SPDX-License-Identifier: Apache-2.0
// Problems of sparse routing, and which agents a behaviour is routed to, by the definition.
#pragma once
#include "route_problem.h"

namespace test {

/// Few agents a behaviour: with codes of agents, some of which are in one place; and lists that say anything, or none.
template <class P>
void make_sparse(uint64_t seed, P& p) {
  Random r(seed + 5000);
  const int64_t sizes[] = {7, 5};
  const auto random_codes = [&](int64_t n) {
    std::vector<int32_t> codes;
    for (int64_t i = 0; i < n; ++i)
      for (const int64_t c : sizes)
        codes.push_back(static_cast<int32_t>(r.below(12) ? r.below(c) : r.below(2) ? -1 : c));
    return codes;
  };
  if (!p.book) {
    p.book = std::make_shared<Codebook>(codebook(r, {7, 5}, p.width));
    p.codes = random_codes(items(p));
  }
  p.params.sparse = 1 + r.below(std::max<int64_t>(1, p.agents / 6));
  p.own = random_codes(users(p) * p.agents);
  for (int64_t a = 0; a < users(p) * p.agents; ++a)
    if (const int64_t other = a - 1 - r.below(40); r.below(2) && other >= a / p.agents * p.agents)
      std::copy_n(p.prototypes.begin() + other * p.width, p.width, p.prototypes.begin() + a * p.width);
  p.lists.clear();
  if (r.below(2)) return;
  const int64_t n = users(p) * 7 * (std::min(p.params.sparse, p.agents) + r.below(3));
  for (int64_t i = 0; i < n; ++i)
    p.lists.push_back(static_cast<int32_t>(r.below(12)  ? r.below(p.agents + 2) - 1
                                           : r.below(2) ? INT32_MAX
                                                        : INT32_MIN));
}

/// The user's present agents by their distance from a codeword of level 1.
inline std::vector<int64_t> sorted_agents(const Problem& p, int64_t user, int64_t node) {
  std::vector<std::pair<double, int64_t>> found;
  const int64_t count = p.count.empty() ? p.agents : std::min<int64_t>(p.count[size(user)], p.agents);
  for (int64_t a = 0; a < count; ++a) {
    const float* const q = &p.prototypes[size((user * p.agents + a) * p.width)];
    double sum = 0;
    for (int64_t d = 0; d < p.width; ++d) {
      const double step = double(p.book->centers(0)[node * p.width + d]) - double(q[d]);
      sum += step * step;
    }
    if (norm_of(q, p.width) < 0x1p100) found.push_back({sum, a});
  }
  std::sort(found.begin(), found.end());
  std::vector<int64_t> agents;
  for (const auto& pair : found) agents.push_back(pair.second);
  return agents;
}

/// [C_1, M] whether rows of a code are routed to an agent of the user; of a problem whose rows are where their
/// behaviours are.
inline std::vector<char> routed(const Problem& p, int64_t user) {
  const int64_t nodes = p.book ? p.book->size(0) : 1, m = p.agents, k = p.params.sparse;
  std::vector<char> to(size(nodes * m), 1);
  if (k == 0) return to;
  const int64_t start = p.starts[size(user)], end = std::min(p.rows, p.ends[size(user)]);
  std::vector<char> seen(size(nodes));
  for (int64_t i = start; i < end; ++i)
    if (const int32_t c = p.codes[size(2 * i)]; c >= 0 && c < nodes) seen[size(c)] = 1;
  const int64_t groups = std::count(seen.begin(), seen.end(), 1);
  const auto present = sorted_agents(p, user, 0);
  const int64_t n = static_cast<int64_t>(present.size()), rows = std::max<int64_t>(0, end - start);
  if (!(n > k && rows * (n - k) > groups * (n + 48 * k))) return to;
  to.assign(to.size(), 0);
  const int64_t length = static_cast<int64_t>(p.lists.size()) / (users(p) * nodes);
  for (int64_t c = 0; c < nodes; ++c) {
    const auto near = sorted_agents(p, user, c);
    for (int64_t a = 0; a < m; ++a) to[size(c * m + a)] = p.own[size((user * m + a) * 2)] == c;
    for (int64_t q = 0; q < k; ++q) {
      const int64_t a = p.lists.empty() ? near[size(q)] : p.lists[size((user * nodes + c) * length + q)];
      if (a >= 0 && a < m) to[size(c * m + a)] = 1;
    }
  }
  return to;
}

/// `agent_lists` on the CPU and on CUDA, exactly, of lists as long as k and of all agents; some codes for each warp.
inline void check_lists(Problem p) {
  Random r(6);
  p.book = std::make_shared<Codebook>(codebook(r, {100}, p.width));
  p.own.clear();
  p.lists.clear();
  for (const int64_t k : {std::min(p.params.sparse, p.agents), p.agents}) {
    const auto lists = [&](auto verb) {
      const Held h(p, false);
      Guarded<int32_t> out(users(p) * p.book->size(0) * k);
      const Status status = verb(h, Array<int32_t, 3>{out.data(), {users(p), p.book->size(0), k}});
      if (!status.ok()) fail("%s", status.what());
      if (!out.intact()) fail("a list's end was overwritten");
      return out.values();
    };
    const auto cpu = lists([](const Held& h, const Array<int32_t, 3>& out) {
      Workspace workspace(agent_lists_workspace(sizing(1), *h.book, h.agents));
      return agent_lists({workspace.array(), nullptr}, *h.book, h.agents, out);
    });
    const auto cuda = lists([&](const Held& h, const Array<int32_t, 3>& out) {
      Workspace workspace(cuda::agent_lists_workspace({}, *h.book, h.agents)), image(image_bytes(p));
      const Status status = cuda::agent_lists(context_of(p, workspace, image), *h.book, h.agents, out);
      if (!workspace.intact()) fail("the workspace's end was overwritten");
      return status;
    });
    if (cpu != cuda) fail("other lists of %d agents", static_cast<int>(k));
  }
}

}  // namespace test
