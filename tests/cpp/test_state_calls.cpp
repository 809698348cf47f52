// SPDX-License-Identifier: Apache-2.0
// Calls on a user's state: the words of their errors; no allocation and no system call; states that threads hand to one
// another and read at once.
#include <doctest/doctest.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>

#include "counting.h"
#include "right.h"
#include "states.h"

using namespace hisac;
using namespace states;
using test::invalid;
using test::is;

TEST_CASE("errors say what was expected, and change nothing") {
  Served served({8, 2, 3, 0, true, 7});
  served.fill(30);
  UserState& state = served.held.state;
  state.seal();
  const std::vector<std::byte> before(state.data(), state.data() + state.size());
  Workspace workspace(state.workspace());
  Context context{workspace.array(), nullptr};
  const StateEvents some = served.events(0, 4);
  StateItems items = served.tables;
  const auto append = [&] { return state.append(context, served.book, items, some); };
  items.model_tag = 8;
  invalid(append(), "append: model_tag expected 7, got 8");
  items = served.tables;
  items.x = {};
  invalid(append(), "append: x expected, since the state has mean x, got none");
  items = served.tables;
  items.v.width = 2;
  items.v.rows = 300;
  invalid(append(), "append: v expected [items, 3], got [300, 2]");
  items = served.tables;
  StateEvents odd = some;
  odd.ids.data = nullptr;
  invalid(state.append(context, served.book, items, odd), "append: ids expected [4], got none");
  odd = some;
  odd.times.shape[0] = 3;
  invalid(state.append(context, served.book, items, odd), "append: times expected [4], got [3]");
  const Codebook other = test::codebook(served.random, {2, 2}, 6);
  char expected[96];
  std::snprintf(expected, sizeof expected, "append: codebook expected %016llx, got %016llx",
                static_cast<unsigned long long>(served.book.fingerprint()),
                static_cast<unsigned long long>(other.fingerprint()));
  invalid(state.append(context, other, items, some), expected);
  Context on_cuda = context;
  on_cuda.device = Device::cuda;
  is(state.append(on_cuda, served.book, items, some), Code::not_implemented,
     "append: expected a context on the CPU, got one on CUDA");
  Made made(served.book, 3, 3);
  is(state.compress(on_cuda, served.book, made.params, made.out), Code::not_implemented,
     "compress: expected a context on the CPU, got one on CUDA");
  invalid(state.append({}, served.book, items, some),
          "append: workspace expected at least " + std::to_string(state.workspace()) + " bytes, got 0");
  invalid(state.forget(context, served.book, items, some.ids, {}),
          "forget: kept expected, rows or a function, since the table has their leaves, got none");
  StateKept kept;
  kept.whole = true;
  invalid(state.forget(context, served.book, items, some.ids, kept),
          "forget: kept expected, rows, of which the whole table is made again, got none");
  invalid(state.merge(context, served.book, items, state), "merge: another state expected, got the same");
  const Array<std::byte, 1> own{state.data() + 64, {state.size()}};
  invalid(state.serialise(DType::float32, 8, own),
          "serialise: memory expected beside the state's, got memory that overlaps with it");
  Workspace moving(state.migrate_workspace({}, served.book));
  UserState moved;
  invalid(state.migrate({moving.array()}, served.book, served.book, own, &moved, nullptr),
          "migrate: memory expected beside the state's, got memory that overlaps with it");
  Held tagged, weighed, slim;
  tagged.make(served.book, {8, 2, 3, 0, true, 6});
  weighed.make(served.book, {8, 2, 3, 0, true, 7, 1});
  invalid(state.merge(context, served.book, items, tagged.state), "merge: model_tag expected 7, got 6");
  std::snprintf(expected, sizeof expected, "merge: options expected %016llx, got %016llx",
                static_cast<unsigned long long>(state.options()),
                static_cast<unsigned long long>(weighed.state.options()));
  invalid(state.merge(context, served.book, items, weighed.state), expected);
  slim.make(served.book, {8, 2, 2, 0, true, 7});
  invalid(state.merge(context, served.book, items, slim.state), "merge: width expected 3, got 2");
  CHECK(std::equal(before.begin(), before.end(), state.data()));

  Served fresh({8, 0, 3});
  fresh.fill(3);
  Held reading = copy(fresh.held.state, DType::int8, 3), tight = copy(fresh.held.state, DType::float32, 3);
  is(reading.state.append(context, fresh.book, fresh.tables, some), Code::not_implemented,
     "append: a state of float32 expected, got int8, which is for reading");
  is(tight.state.append(context, fresh.book, fresh.tables, some), Code::out_of_memory,
     "append: room for 7 leaves expected, got 3; serialise with more room");
  UserState none;
  invalid(UserState::create(served.book, {0, 0, 3}, {}, &none),
          "state: expected leaves of 1 to 2^24, a ring of 0 to 2^24, a width of 1 to 2^20 and a half-life of 0 to "
          "107374182 units of time, got 0, 0, 3 and 0");
  CHECK(UserState::bytes(served.book, {1, 0, (1 << 20) + 1}) == 0);
  const StateParams params{8, 2, 3};
  const size_t bytes = UserState::bytes(served.book, params);
  Workspace small(bytes - 1);
  invalid(UserState::create(served.book, params, small.array(), &none),
          "state: memory expected of at least " + std::to_string(bytes) + " bytes, got " + std::to_string(bytes - 1));
  CHECK(small.untouched());
  invalid(state.serialise(DType::float32, 9, small.array()),
          "serialise: room expected " + std::to_string(state.leaves()) + " to 8, got 9");
  const Codebook wide = test::codebook(served.random, {2, 2}, 5);
  invalid(state.migrate(context, served.book, wide, small.array(), &none, nullptr),
          "migrate: codebook expected of D = 6, got 5");
}

TEST_CASE("no state is empty") {
  Served served({8, 2, 3});
  const UserState none;
  CHECK(!none);
  CHECK(none.size() + none.leaves() + none.room() + none.ring() + none.epoch() + none.position() == 0);
  CHECK(none.fingerprint() + none.revision() + none.serialised_bytes(DType::float32, 0) == 0);
  CHECK(none.params().leaves == 0);
  none.seal();
  Workspace workspace(1 << 12);
  const Context context{workspace.array()};
  StateStats stats;
  UserState made;
  invalid(UserState().append(context, served.book, served.tables, served.events(0, 1)),
          "append: expected a state, got none");
  invalid(none.stats(served.book, nullptr, nullptr, &stats), "stats: expected a state, got none");
  invalid(none.recent({}, nullptr), "recent: expected a state, got none");
  invalid(none.serialise(DType::float32, 0, workspace.array()), "serialise: expected a state, got none");
  invalid(none.migrate(context, served.book, served.book, workspace.array(), &made, nullptr),
          "migrate: expected a state, got none");
  CHECK(UserState::parse({}, &made).code() == Code::corrupt_file);
}

TEST_CASE("no events and no rows are none") {  // data of an empty vector is null, which once meant all items
  Served served({60, 0, 3});
  served.fill(40);
  UserState& state = served.held.state;
  const std::vector<int64_t> empty;
  const uint64_t revision = state.revision();
  StateStats before, after;
  CHECK(state.stats(served.book, nullptr, nullptr, &before).ok());
  const StateEvents none{ids(empty.data(), 0)};
  change(state.workspace(), [&](const Context& c) { return state.append(c, served.book, served.tables, none); });
  CHECK(state.revision() == revision);
  const StateKept nothing{nullptr, [](void*, const int32_t*, StateEvents*) { return Status(); }};
  const Ids gone = served.events(0, 1).ids;
  for (const StateKept& kept : {nothing, StateKept{&none}}) {
    served.fill(40);
    change(state.workspace(),
           [&](const Context& c) { return state.forget(c, served.book, served.tables, gone, kept); });
    CHECK(state.stats(served.book, nullptr, nullptr, &after).ok());
    CHECK(after.leaves == before.leaves - 1);
  }
}

TEST_CASE("a forget that fails midway is seen by the revision") {
  Served served({60, 2, 3});
  served.fill(40);
  UserState& state = served.held.state;
  const uint64_t revision = state.revision();
  StateKept failing;
  failing.of_leaf = [](void*, const int32_t*, StateEvents*) {
    return Status::error(Code::io_error, "the store is away");
  };
  Workspace workspace(state.workspace());
  is(state.forget({workspace.array()}, served.book, served.tables, served.events(0, 1).ids, failing), Code::io_error,
     "the store is away");
  CHECK(state.revision() == revision + 1);
}

TEST_CASE("bytes that may only be read are parsed and served, by several threads at once") {
  Served served({60, 4, 3, 500});
  served.fill(200);
  const UserState& state = served.held.state;
  const int64_t room = state.params().leaves;
  const size_t size = state.serialised_bytes(DType::float32, room), pages = (size + 4095) / 4096 * 4096;
  void* const memory = mmap(nullptr, pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(memory != MAP_FAILED);
  const Array<std::byte, 1> bytes{static_cast<std::byte*>(memory), {static_cast<int64_t>(size)}};
  REQUIRE(state.serialise(DType::float32, room, bytes).ok());
  REQUIRE(mprotect(memory, pages, PROT_READ) == 0);
  Made expected(served.book, 10, 3);
  change(state.compress_workspace({}, served.book, expected.params, expected.out),
         [&](const Context& c) { return state.compress(c, served.book, expected.params, expected.out); });
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&] {
      for (int turn = 0; turn < 50; ++turn) {
        UserState read;
        if (!UserState::parse(bytes, &read).ok()) std::abort();
        Made mine(served.book, 10, 3);
        Workspace workspace(read.compress_workspace({}, served.book, mine.params, mine.out));
        if (!read.compress({workspace.array()}, served.book, mine.params, mine.out).ok()) std::abort();
        if (mine.votes != expected.votes) std::abort();
      }
    });
  for (std::thread& t : threads) t.join();
  munmap(memory, pages);
}

TEST_CASE("no call allocates, or enters the system") {
  Served served({100, 5, 4, 300});
  served.fill(200);
  UserState& state = served.held.state;
  Made made(served.book, 10, 4);
  const Array<const int32_t, 2> asked{served.codes.data(), {50, 2}};
  std::vector<float> v(100 * 4), lse(100), share(5);
  std::vector<int64_t> rows(5), times(5);
  const size_t bytes =
      std::max({state.workspace(), state.compress_workspace({}, served.book, made.params, made.out),
                state.match_workspace({}, served.book, asked, {}), state.migrate_workspace({}, served.book)});
  Workspace workspace(bytes);
  const Context context{workspace.array(), nullptr};
  Guarded<std::byte> stored(static_cast<int64_t>(state.serialised_bytes(DType::float32, 100)));
  Held other, moved;
  other.make(served.book, {100, 5, 4, 300});
  const auto memory = moved.lend(UserState::bytes(served.book, state.params()));
  int64_t at = 200;
  const auto all = [&] {
    UserState back;
    StateStats stats;
    float table;
    const StateEvents kept = served.events(0, at);
    const auto mutable_stored = Array<std::byte, 1>{stored.data(), {stored.count()}};
    bool ok =
        served.append(context, at, 10).ok() && state.serialise(DType::float32, 100, mutable_stored).ok() &&
        UserState::parse(mutable_stored, &back).ok() &&
        back.append(context, served.book, served.tables, served.events(at + 10, 10)).ok() &&
        state.compress(context, served.book, made.params, made.out).ok() &&
        state.match(context, served.book, asked, {}, {hisac::rows(v.data(), 100, 4), {lse.data(), {50, 2}}}).ok() &&
        state.recent({{rows.data(), {5}}, {times.data(), {5}}, {share.data(), {5}}}, &table).ok() &&
        state.stats(served.book, &made.out.agents, nullptr, &stats).ok() &&
        other.state.append(context, served.book, served.tables, served.events(at, 30)).ok() &&
        state.merge(context, served.book, served.tables, other.state).ok() &&
        state.forget(context, served.book, served.tables, served.events(at, 2).ids, {&kept}).ok() &&
        state.expire(context, served.book, served.tables, served.times[0], 10, 1).ok() &&
        state.migrate(context, served.book, served.book, memory, &moved.state, nullptr).ok();
    state.seal();
    at += 20;
    return ok;
  };
  REQUIRE(all());  // the first call chooses the instruction set
  const counting::Scope scope;
  CHECK(all());
  CHECK(scope.count() == 0);
#ifndef HISAC_TEST_HOOKED
  const pid_t child = fork();
  if (child == 0) {  // from here on the kernel kills whoever asks for more than to exit
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT) != 0) _exit(77);
    const bool ok = all();
    syscall(SYS_exit, ok ? 0 : 1);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  REQUIRE(WIFEXITED(status));
  if (WEXITSTATUS(status) == 77)
    MESSAGE("system calls are not watched here");
  else
    CHECK(WEXITSTATUS(status) == 0);
#endif
}

TEST_CASE("threads hand a state on, and read it at once") {
  Served alone({60, 4, 3, 500}), shared({60, 4, 3, 500});
  constexpr int64_t kTurns = 40;
  for (int64_t turn = 0; turn < kTurns; ++turn)
    change(alone.held.state.workspace(), [&](const Context& c) { return alone.append(c, 10 * turn, 10); });
  std::mutex turns;
  int64_t next = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&] {
      Workspace workspace(shared.held.state.workspace());
      for (;;) {
        const std::lock_guard<std::mutex> lock(turns);
        if (next == kTurns) return;
        if (!shared.append({workspace.array(), nullptr}, 10 * next++, 10).ok()) std::abort();
      }
    });
  for (std::thread& t : threads) t.join();
  alone.held.state.seal();
  shared.held.state.seal();
  const UserState &a = alone.held.state, &b = shared.held.state;
  CHECK(std::equal(a.data(), a.data() + a.size(), b.data()));
  std::vector<Made> made;
  for (int t = 0; t < 3; ++t) made.emplace_back(shared.book, 10, 3);
  threads.clear();
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      Made mine(shared.book, 10, 3);
      Workspace workspace(b.compress_workspace({}, shared.book, mine.params, mine.out));
      if (!b.compress({workspace.array(), nullptr}, shared.book, mine.params, mine.out).ok()) std::abort();
      made[test::size(t)].tokens = mine.tokens;
    });
  for (std::thread& t : threads) t.join();
  CHECK(made[0].tokens == made[1].tokens);
  CHECK(made[0].tokens == made[2].tokens);
}
