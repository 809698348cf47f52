// SPDX-License-Identifier: Apache-2.0
// `vote` of cuda/vote.cu, run by the emulator, beside the CPU's: the same agents, votes and counts for any input, order
// of threads, machine and workspace.
#include "base/arena.h"
#include "simt_test.h"

namespace {

using namespace hisac;
using test::Random;

struct Problem {
  std::vector<int64_t> starts, ends;
  int64_t rows = 0;
  std::vector<int64_t> sizes;
  VoteParams params;
  Codebook book;
  std::vector<int32_t> codes;
  std::vector<int64_t> ids;  // of codes
  test::VoteWeights weights;
  bool narrow = false;  // int32 offsets and ids
};

struct Result {
  std::vector<int32_t> codes, count;
  std::vector<int64_t> votes;
  bool operator==(const Result& o) const { return codes == o.codes && count == o.count && votes == o.votes; }
};

int64_t users(const Problem& p) { return static_cast<int64_t>(p.starts.size()); }

/// Codes that many rows share, or few, or hardly any; invalid ones among them. Now and then they are a table.
void draw_rows(Random& r, Problem& p) {
  const int64_t levels = static_cast<int64_t>(p.sizes.size()), manner = r.below(4), items = r.below(p.rows + 1);
  const bool by_id = r.below(3) == 0;
  for (int64_t i = 0; by_id && i < p.rows; ++i) {
    const int64_t none[] = {-1, items, p.narrow ? 0x7fffffff : INT64_MAX, p.narrow ? -0x80000000ll : int64_t{5} << 32};
    p.ids.push_back(r.below(9) && items ? r.below(items) : none[r.below(4)]);
  }
  for (int64_t i = 0; i < (by_id ? items : p.rows); ++i)
    for (int64_t l = 0; l < levels; ++l) {
      const int64_t size = p.sizes[test::size(l)];
      int64_t c = r.below(size);
      if (manner == 0) c = std::min(c, r.below(size));  // many parents, uneven
      if (manner == 1) c = std::min<int64_t>(size - 1, r.below(4) ? c % 3 : c % 17);
      if (manner == 2) c = size - 1 - (r.below(5) ? 0 : c % 5);
      if (r.below(40 * levels) == 0) c = r.below(2) ? -1 - r.below(2) * 0x7fffffff : size;
      p.codes.push_back(static_cast<int32_t>(c));
    }
  p.weights = test::random_weights(r, p.rows);
}

Problem random_problem(uint64_t seed) {
  Random r(seed);
  Problem p;
  const std::vector<std::vector<int64_t>> trees = {{16, 16},
                                                   {512, 512},
                                                   {7, 5},
                                                   {300},
                                                   {1},
                                                   {3, 2, 4},
                                                   {40, 1, 30},
                                                   {64, 64, 64},
                                                   {2, 2, 2, 2, 2, 2, 2, 2},  //
                                                   {1 << 18},
                                                   {1 << 20},
                                                   {256, 256, 256},
                                                   {1000, 1 << 20},
                                                   {2, 1, 1 << 20, 1 << 20, 5},
                                                   {65536, 65536, 65536, 65536},
                                                   {256, 256, 256, 256, 256, 256, 256, 256},
                                                   {1 << 20, 3, 1, 4}};
  p.sizes =
      trees[seed < 2 * trees.size() ? seed % trees.size() : test::size(r.below(static_cast<int64_t>(trees.size())))];
  const bool one = r.below(6) == 0;  // a long history: a block of more threads
  const int64_t levels = static_cast<int64_t>(p.sizes.size()), b = one ? 1 : 1 + r.below(6);
  const int64_t longest = r.below(4) ? 150 : 900;
  for (int64_t i = 0; i < b; ++i) {
    p.starts.push_back(p.rows);
    p.rows += one ? 1500 + r.below(1000) : r.below(5) == 0 ? 0 : 1 + r.below(longest);
    p.ends.push_back(p.rows);
  }
  if (r.below(3) == 0)  // histories that overlap, and offsets that lie outside
    for (int64_t i = 0; i < b; ++i) {
      p.starts[test::size(i)] = r.below(6) == 0 ? -5 : r.below(p.rows + 1);
      p.ends[test::size(i)] = r.below(6) == 0 ? p.rows + 5 : r.below(p.rows + 1);
    }
  p.narrow = r.below(2);
  draw_rows(r, p);
  const int64_t rule = r.below(3);
  if (rule == 0) {
    p.params.budget = r.below(4) == 0 ? 1 + r.below(kMaxSeats) : 1 + r.below(60);
  } else if (rule == 1) {
    for (int64_t l = 0; l < levels; ++l)
      p.params.beam[l] = 1 + r.below(r.below(4) == 0 ? kMaxSeats : std::min<int64_t>(60, 2 * p.sizes[test::size(l)]));
  } else {
    int64_t left = r.below(4) == 0 ? kMaxSeats : 64;
    for (int64_t l = 0; l < levels; ++l) {
      p.params.fanout[l] = 1 + r.below(l + 1 == levels ? left : std::min<int64_t>(left, 9));
      left /= p.params.fanout[l];
    }
  }
  p.book = test::codebook(r, p.sizes, 1);
  return p;
}

/// More rows than may vote, the last of them for a code of their own.
Problem too_many_rows() {
  Random r(0);
  Problem p;
  p.rows = (1 << 24) + 2;
  p.starts = {0};
  p.ends = {p.rows};
  p.sizes = {5};
  p.params.budget = 4;
  p.codes.assign(test::size(p.rows), 2);
  p.codes[0] = 4;
  p.codes[test::size(p.rows - 4)] = 3;
  p.codes[test::size(p.rows - 3)] = p.codes[test::size(p.rows - 2)] = p.codes[test::size(p.rows - 1)] = 1;
  p.weights.floats.assign(test::size(p.rows), 16.f);
  p.book = test::codebook(r, p.sizes, 1);
  return p;
}

/// verb(histories, out); every array of its exact size.
template <class Verb>
Result run(const Problem& p, bool clamp, Verb verb) {
  const int64_t b = users(p), levels = p.book.levels(), m = seats(p.params, p.book.levels());
  std::vector<int64_t> starts = p.starts, ends = p.ends;
  for (size_t i = 0; clamp && i < starts.size(); ++i) {
    starts[i] = std::max<int64_t>(starts[i], 0);
    ends[i] = std::min(std::max(starts[i], ends[i]), p.rows);
  }
  test::Guarded<int64_t> wide_starts(starts), wide_ends(ends);
  test::Guarded<int32_t> narrow_starts(std::vector<int32_t>(starts.begin(), starts.end())),
      narrow_ends(std::vector<int32_t>(ends.begin(), ends.end()));
  test::Guarded<int64_t> wide_ids(p.ids);
  test::Guarded<int32_t> narrow_ids(std::vector<int32_t>(p.ids.begin(), p.ids.end()));
  test::Guarded<int32_t> codes(p.codes), out_codes(b * m * levels), count(b);
  test::Guarded<int64_t> votes(b * m);
  Histories histories;
  histories.offsets = {p.narrow ? (void*)narrow_starts.data() : (void*)wide_starts.data(),
                       p.narrow ? (void*)narrow_ends.data() : (void*)wide_ends.data(),
                       p.narrow ? DType::int32 : DType::int64, b};
  histories.codes = {codes.data(), {static_cast<int64_t>(p.codes.size()) / levels, levels}};
  if (!p.ids.empty())
    histories.x_ids = {p.narrow ? (void*)narrow_ids.data() : (void*)wide_ids.data(),
                       p.narrow ? DType::int32 : DType::int64, p.rows};
  test::Guarded<float> floats(p.weights.floats);
  test::Guarded<int64_t> integers(p.weights.integers);
  histories.weights = p.weights.array();
  if (histories.weights.dtype == DType::int64)
    histories.weights.data = integers.data();
  else if (histories.weights)
    histories.weights.data = floats.data();
  const Status status =
      verb(histories, Agents{{out_codes.data(), {b, m, levels}}, {votes.data(), {b, m}}, {count.data(), {b}}});
  if (!status.ok()) test::fail("%s", status.what());
  if (!out_codes.intact() || !votes.intact() || !count.intact()) test::fail("a result's end was overwritten");
  return {out_codes.values(), count.values(), votes.values()};
}

Result on_cpu(const Problem& p) {
  return run(p, true, [&](const Histories& histories, const Agents& out) {
    test::Workspace workspace(vote_workspace(test::sizing(1), p.book, p.params, histories));
    return hisac::vote({workspace.array()}, p.book, p.params, histories, out);
  });
}

int64_t longest(const Problem& p) {
  int64_t most = 0;
  for (size_t i = 0; i < p.starts.size(); ++i)
    most = std::max(most, std::min(p.ends[i], p.rows) - std::max<int64_t>(p.starts[i], 0));
  return most;
}

/// In the workspace that is made for histories of `longest`; or in the least of them, for one user at a time.
Result on_cuda(const Problem& p, int64_t longest, bool least = false) {
  return run(p, false, [&](const Histories& given, const Agents& out) {
    const Histories histories = test::stated(given, longest);
    size_t bytes = cuda::vote_workspace({}, p.book, p.params, histories), refused = 0;
    if (least) {
      const size_t besides = 128 + 2 * kGap;  // what is no slice
      bytes = std::min(bytes, besides + bytes / static_cast<size_t>(4 * simt::options.machine.processors));
      const Status status = cuda::vote({}, p.book, p.params, histories, out);
      std::sscanf(status.what(), "vote: workspace expected at least %zu bytes", &refused);
      if (!refused) test::fail("no workspace: %s", status.what());
      bytes = std::max(bytes, refused);
    }
    test::Workspace workspace(bytes);
    const Status status = cuda::vote({workspace.array()}, p.book, p.params, histories, out);
    if (!workspace.intact()) test::fail("the workspace's end was overwritten");
    return status;
  });
}

/// In a workspace for shorter histories: trees of few leaves need no more; of others, a user who does not fit has no
/// agents, and the others have theirs.
void check_short(const Problem& p, const Result& whole, int64_t leaves) {
  const Result got = on_cuda(p, longest(p) / 2, true);
  if (leaves <= 1 << 18) return got == whole ? void() : test::fail("other agents in a workspace for shorter histories");
  const size_t m = test::size(seats(p.params, p.book.levels())), width = m * p.sizes.size();
  for (size_t b = 0; b < whole.count.size(); ++b) {
    const bool none = got.count[b] == 0;
    for (size_t i = b * m; i < (b + 1) * m; ++i)
      if (got.votes[i] != (none ? 0 : whole.votes[i])) test::fail("user %zu: votes of some of its rows", b);
    for (size_t i = b * width; i < (b + 1) * width; ++i)
      if (got.codes[i] != (none ? -1 : whole.codes[i])) test::fail("user %zu: agents of some of its rows", b);
  }
}

void check(const Problem& p) {
  const Result cpu = on_cpu(p), cuda = on_cuda(p, p.rows);
  for (size_t i = 0; i < cpu.count.size(); ++i)
    if (cpu.count[i] != cuda.count[i]) test::fail("user %zu: %d agents, expected %d", i, cuda.count[i], cpu.count[i]);
  const size_t levels = p.sizes.size();
  for (size_t i = 0, said = 0; i < cpu.votes.size() && said < 3; ++i)
    if (cpu.votes[i] != cuda.votes[i] ||
        !std::equal(&cpu.codes[i * levels], &cpu.codes[i * levels] + levels, &cuda.codes[i * levels])) {
      test::fail("agent %zu: %lld votes for %d .., expected %lld for %d ..", i, static_cast<long long>(cuda.votes[i]),
                 cuda.codes[i * levels], static_cast<long long>(cpu.votes[i]), cpu.codes[i * levels]);
      ++said;
    }
  const simt::Options kept = simt::options;
  simt::options.order = simt::Order::random;
  simt::options.seed += 17;
  int64_t leaves = 1;
  for (int64_t c : p.sizes) leaves = std::min<int64_t>(leaves * c, 1 << 19);
  const int64_t wide = *std::max_element(p.params.beam, p.params.beam + kMaxLevels);
  const bool small = leaves <= 4096 && std::max(seats(p.params, p.book.levels()), wide) <= 64;
  simt::options.machine = {3, size_t(small ? 9 : 80) << 10};  // less in shared memory
  if (!(on_cuda(p, longest(p)) == cpu)) test::fail("other agents for another order of threads and another machine");
  if (!(on_cuda(p, longest(p), true) == cpu)) test::fail("other agents in the least workspace");
  check_short(p, cpu, leaves);
  simt::options = kept;
}

}  // namespace

int main(int argc, char** argv) {
  test::options(argc, argv);
  if (test::first == 0 && !simt::planted) {
    test::name("vote of too many rows");
    simt::options.machine.processors = 1;
    const Problem p = too_many_rows();
    if (!(on_cuda(p, p.rows) == on_cpu(p))) test::fail("a row too many, or too few");
  }
  for (uint64_t seed = test::first; seed < test::last; ++seed) {
    test::name("vote %llu", static_cast<unsigned long long>(seed));
    simt::options.machine = {seed % 3 ? 1 : 2, size_t{227} << 10};
    check(random_problem(seed));
  }
  return test::done();
}
