// SPDX-License-Identifier: Apache-2.0
// `vote`: how the workspace is cut, then a block a user at a time, in one pass or two. Codes are read twice, by a level
// or for places and then counts, the second time from the cache: 4 L bytes a row, which for 512 users of 10,000 rows of
// two levels take 14 us on an H100; the rest is shared memory's and the barriers'.
#include <algorithm>

#include "base/arena.h"
#include "cuda/device/launcher.h"
#include "cuda/verbs.h"
#include "cuda/vote_fanout.h"
#include "cuda/vote_user.h"

namespace hisac::cuda {
namespace {

constexpr int kMostThreads = 512, kBlocksLong = 2;      // a processor's, where histories are long on the average,
constexpr int kShortRows = 1024, kBlocksShort = 4;      // and where they are short: of 128 threads
constexpr int kMostBits = 18;                           // of a bitmap of leaves
constexpr int64_t kMostWorkspace = int64_t{256} << 20;  // more only where one user needs it
constexpr int64_t kFixed = kFoundAt + 2 * kMostThreads;

static_assert(kSliceAt + sizeof(Slice) <= kScaleAt && kScaleAt + sizeof(VoteScale) <= kFoundAt);

/// One block: the longest history, and from it how many users the workspace can hold at a time.
SIMT_KERNEL(1024) plan_slices(SIMT_CONSTANT VoteTask t) {
  if (t.cells) {
    if (simt::thread() == 0) t.plan->next = 0;
    return;
  }
  int64_t longest = 0, most = 0;
  for (int64_t b = simt::thread(); b < t.users; b += simt::threads()) longest = Larger{}(longest, t.voters(b));
  scan_threads(longest, &most, Larger{});
  if (simt::thread() != 0) return;
  const auto fitting =
      [&](int64_t bytes) {  // the most rows, up to `most`, of a slice of so many bytes; 0 where none fit
        if (t.slice_bytes(most) <= bytes) return most;
        int64_t rows = 0;
        for (int64_t step = int64_t{1} << 23; step; step /= 2)
          if (rows + step < most && t.slice_bytes(rows + step) <= bytes) rows += step;
        return rows;
      };
  int64_t above = -1;
  for (int pass = 0; pass < 2; ++pass) {
    const int64_t rows = fitting(pass ? t.workspace_bytes : t.workspace_bytes / t.blocks), each = t.slice_bytes(rows);
    const int64_t slices = above < most ? t.workspace_bytes / each : 0;
    t.plan[pass] = {above, rows, each, static_cast<int32_t>(slices < t.blocks ? slices : t.blocks), 0};
    above = rows;
  }
}

/// vote(user) for the users of the pass as they come, by the whole block.
template <class Wanted, class Vote>
SIMT_DEVICE void each_user(const VoteTask& t, Wanted wanted, Vote vote) {
  auto* const next = shared<int32_t>(kNextAt);
  auto* const found = shared<uint16_t>(kFoundAt);  // [chunk]
  const int chunk = t.pass ? simt::threads() : 1;  // few of them are for the second pass
  for (;;) {
    if (simt::thread() == 0) *next = simt::atomic_add(&t.plan[t.pass].next, chunk);
    simt::sync();
    const int64_t first = *next;
    if (first >= t.users) return;
    const int n = gather(
        chunk, [&](int i) { return first + i < t.users && wanted(first + i); },
        [&](int i, int place) { found[place] = static_cast<uint16_t>(i); });
    for (int k = 0; k < n; ++k) vote(first + found[k]);
  }
}

/// Two blocks of kMostThreads share a processor's registers.
template <bool kWeighted, bool kBitmap>
SIMT_KERNEL(2 * kMostThreads)
vote_users(SIMT_CONSTANT VoteTask t) {
  const SlicePlan& plan = t.plan[t.pass];
  if (simt::block() >= plan.slices) return;
  Slice& slice = *shared<Slice>(kSliceAt);
  if (simt::thread() == 0) t.slice(plan.capacity, t.slices + simt::block() * plan.slice_bytes, &slice);
  // Against the contract a user may have more rows than any slice can sort. The last pass gives it no agents.
  const auto wanted = [&](int64_t user) {
    const int64_t rows = t.voters(user);
    return rows > plan.above && (t.pass || rows <= plan.capacity);
  };
  each_user(t, wanted, [&](int64_t user) {
    const int64_t voters = t.voters(user);
    int rows = least(voters, plan.capacity);
    SIMT_UNLESS_PLANTED(39, rows = rows < voters ? 0 : rows);
    if (kBitmap && !kWeighted && rows <= t.shared_rows)
      UserVote<uint32_t, kWeighted, true>(t, slice, user, rows).run();
    else
      UserVote<uint64_t, kWeighted, kBitmap>(t, slice, user, rows).run();
  });
}

template <bool kWeighted>
SIMT_KERNEL(2 * kMostThreads)
vote_in_cells(SIMT_CONSTANT VoteTask t) {
  each_user(t, [](int64_t) { return true; }, [&](int64_t user) { FanoutVote<kWeighted>(t, user).run(); });
}

/// Offsets for a vote by fan-out in cells; false where the vote is not by fan-out, or its counters are too many for two
/// blocks a processor.
bool lay_out_cells(VoteTask& t, const simt::Machine& machine, int64_t sum) {
  if (t.budget || t.beam) return false;
  const int64_t available = static_cast<int64_t>(machine.shared) / 2 - 1024;
  int64_t padded_seats = 1, kept = 1, cells = 0;
  while (padded_seats < t.seats) padded_seats *= 2;
  for (int l = 0; l < t.levels; ++l) {
    t.cells_before[l] = static_cast<int>(cells);
    cells += kept * t.size[l];
    if (cells * sum > available) return false;
    kept *= t.kept[l];
  }
  t.offset.sums = static_cast<int>(kFixed);
  t.offset.nodes = t.offset.sums + 16;
  t.offset.area = t.offset.nodes + 16 * t.seats;
  t.offset.before = t.offset.area + static_cast<int>(8 * padded_seats);
  t.shared_bytes = t.offset.before + cells * sum;
  return t.shared_bytes <= available;
}

/// Offsets in shared memory: for two blocks of many threads a processor where users are long, for four of few where
/// they are short.
void lay_out(VoteTask& t, const simt::Machine& machine) {
  t.threads = t.rows > t.users * kShortRows ? kMostThreads : 128;
  const int blocks = t.threads == kMostThreads ? kBlocksLong : kBlocksShort;
  t.blocks = machine.processors * blocks;
  t.cells = lay_out_cells(t, machine, t.weights.data ? sizeof(uint64_t) : sizeof(uint32_t));
  if (t.cells) return;
  SharedLayout shared(kFixed);
  int64_t padded_seats = 1;
  while (padded_seats < t.seats) padded_seats *= 2;
  const int64_t few = t.nodes > kMostShared ? 0 : t.nodes;
  t.offset.sums = shared.take(t.nodes * 4);
  t.offset.nodes = shared.take(few * int64_t{sizeof(Node)});
  t.offset.searches = shared.take(few * int64_t{sizeof(Search)});
  t.offset.area = shared.take(
      std::max({int64_t{8} * t.pairs, padded_seats * 8, t.pairs ? 0 : (t.threads / 32) * (int64_t{4} << kDigit)}));
  t.offset.prefix = static_cast<int>(shared.bytes());
  const int64_t least = shared.bytes() + int64_t{4} * t.pairs;  // of a user who is not in shared memory
  const int64_t available = std::max<int64_t>(static_cast<int64_t>(machine.shared) / blocks - 1024, least);
  shared.take(int64_t{2} * t.pairs);
  const int64_t fit = t.pairs && !t.weights.data ? (available - shared.bytes() - 64) / 6 : 0;
  t.shared_rows = static_cast<int>(std::clamp<int64_t>(fit, 0, 0xffff));
  t.offset.before = shared.take((t.shared_rows + 1) * 4);
  t.offset.mark = shared.take(t.shared_rows * 2);
  t.shared_bytes = std::max(shared.bytes(), least);
}

VoteTask describe(const Codebook& book, const VoteParams& params) {
  VoteTask t;
  t.levels = book.levels();
  t.budget = params.budget != 0;
  t.beam = params.beam[0] != 0;
  t.seats = static_cast<int>(hisac::seats(params, t.levels));
  t.nodes = std::max(t.seats, static_cast<int>(*std::max_element(params.beam, params.beam + t.levels)));
  while (int64_t{1} << t.shift < int64_t{t.seats} * (t.seats - 1)) ++t.shift;
  uint64_t stride = 1;
  for (int l = t.levels - 1; l >= 0; --l) {
    t.size[l] = static_cast<uint32_t>(book.size(l));
    t.stride[l] = stride;
    t.kept[l] = static_cast<uint32_t>((t.beam ? params.beam : params.fanout)[l]);
    stride *= t.size[l];  // 2^64 becomes 0
  }
  t.bits = bits_of(stride - 1);
  if (t.bits <= kMostBits) t.pairs = static_cast<int>(stride / 64 + 1);
  return t;
}

}  // namespace

size_t vote_workspace(const Context&, const Codebook& book, const VoteParams& params,
                      const Histories& histories) noexcept {
  simt::Machine machine;
  if (const auto e = simt::machine(&machine); e != decltype(e){}) return 0;
  VoteTask t = describe(book, params);
  Arena arena;
  arena.take<SlicePlan>(2);
  int64_t slices = 0;
  if (!lay_out_cells(t, machine, sizeof(uint64_t))) {
    const int64_t each = t.slice_bytes(std::min<int64_t>(histories.longest, kMostVoters));
    const int64_t least = t.pairs ? t.slice_bytes(kMostVoters) : each;  // a bitmap: enough for any history
    slices = std::max(least, std::min(each * machine.processors * kBlocksShort, kMostWorkspace));
  }
  arena.take<std::byte>(slices);
  return arena.used();
}

Status vote(const Context& context, const Codebook& book, const VoteParams& params, const Histories& histories,
            Agents out) noexcept {
  const int64_t users = histories.offsets.users;
  if (users > 1 << 30)
    return Status::error(Code::not_implemented, "vote: expected B up to 2^30 on CUDA, got %" PRId64, users);
  Launcher launch("vote", context);
  HISAC_TRY(launch.status());
  VoteTask t = describe(book, params);
  t.codes = histories.codes.data;
  t.weights = histories.weights;
  static_cast<Spans&>(t) = histories.offsets;
  t.rows = histories.behaviours();
  t.ids = histories.x_ids;
  t.items = histories.items();
  lay_out(t, launch.machine);
  Arena arena(context.workspace);
  t.plan = arena.take<SlicePlan>(2);
  const int64_t least = t.cells ? 0 : t.slice_bytes(t.pairs ? std::min<int64_t>(t.rows, kMostVoters) : 0);
  t.slices = arena.take_rest(least, &t.workspace_bytes);
  HISAC_TRY(arena.check("vote"));
  t.out = out;
  if (t.users == 0) return {};
  t.blocks = static_cast<int>(std::min<int64_t>(t.blocks, t.users));
  const auto kernel_of = [&](auto weighted) {
    constexpr bool kWeighted = weighted;
    return t.cells ? vote_in_cells<kWeighted> : t.pairs ? vote_users<kWeighted, true> : vote_users<kWeighted, false>;
  };
  const auto kernel = t.weights.data ? kernel_of(std::true_type{}) : kernel_of(std::false_type{});
  const int threads = t.users > 32 ? 1024 : 32;
  launch(plan_slices, 1, threads, kFront, t);
  for (; t.pass < (t.cells ? 1 : 2); ++t.pass)
    launch(kernel, t.blocks, t.threads, static_cast<size_t>(t.shared_bytes), t);
  return launch.status();
}

}  // namespace hisac::cuda
