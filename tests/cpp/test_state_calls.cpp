// SPDX-License-Identifier: Apache-2.0
// Calls on a user's state: the words of their errors; no allocation and no system call; states that threads hand to one
// another and read at once.
#include <doctest/doctest.h>
#include <linux/seccomp.h>
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
  invalid(state.append(context, served.book, items, {}), "append: ids expected for a state with a ring, got none");
  StateEvents odd = some;
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
  invalid(state.merge(context, served.book, items, state), "merge: another state expected, got the same");
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
          "2^40, got 0, 0, 3 and 0");
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
