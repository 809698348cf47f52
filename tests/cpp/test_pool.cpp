// SPDX-License-Identifier: Apache-2.0
// ThreadPool: every index once, few enough at once, after fork, busy, nested, resized.
#include <doctest/doctest.h>

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <set>
#include <string>

#include "support.h"

using namespace hisac;

namespace {

/// Counts the visits to every index, and calls that share a worker id at the same time.
struct Tally {
  explicit Tally(int64_t n, int workers) : visits(test::size(n)), inside(test::size(workers)) {}
  std::vector<std::atomic<int>> visits, inside;
  std::atomic<int> clashes{0}, strangers{0}, seats{0};

  static void visit(void* arg, int64_t begin, int64_t end, int worker) {
    Tally& t = *static_cast<Tally*>(arg);
    if (worker < 0 || test::size(worker) >= t.inside.size()) {
      ++t.strangers;
      return;
    }
    if (t.inside[test::size(worker)]++) ++t.clashes;
    for (int64_t i = begin; i < end; ++i) ++t.visits[test::size(i)];
    --t.inside[test::size(worker)];
  }
  bool right() const {
    for (const auto& v : visits)
      if (v != 1) return false;
    return clashes == 0 && strangers == 0;
  }
};

bool covers(const Executor& executor, int64_t n) {
  Tally tally(n, executor.workers);
  executor.parallel_for(executor.ctx, n, Tally::visit, &tally);
  return tally.right();
}

/// The exit status of a child that runs `work`, or -1 where it does not end in ten seconds.
template <class Work>
int in_child(Work work) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(10);
    ::_exit(work() ? 0 : 1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace

TEST_CASE("every index once, for any number of workers, call after call") {
  for (int workers : {1, 2, 3, 16}) {
    ThreadPool pool;
    REQUIRE(pool.resize(workers).ok());
    CHECK(pool.workers() == workers);
    const Executor executor = pool.executor();
    CHECK(executor.workers == workers);
    for (int64_t n : {1, 2, 15, 16, 17, 1000})
      for (int round = 0; round < 20; ++round) CHECK(covers(executor, n));
  }
}

TEST_CASE("every worker that a call has a range for comes") {
  ThreadPool pool;
  REQUIRE(pool.resize(4).ok());
  const Executor executor = pool.executor();
  for (int64_t n : {2, 4, 3, 4, 2})
    for (int round = 0; round < 20; ++round) REQUIRE(test::all_come(executor, n));
}

#ifdef __linux__
TEST_CASE("threads keep off the processor that the caller is on") {
  struct Allowed {
    cpu_set_t set;
    Allowed() { REQUIRE(::sched_getaffinity(0, sizeof set, &set) == 0); }
    explicit Allowed(size_t cpu) {
      CPU_ZERO(&set);
      CPU_SET(cpu, &set);
    }
    void use() const { REQUIRE(::sched_setaffinity(0, sizeof set, &set) == 0); }
    bool operator==(const Allowed& o) const { return CPU_EQUAL(&set, &o.set); }
  };
  const Allowed all;
  if (CPU_COUNT(&all.set) < 2) {
    MESSAGE("one processor: not tried");
    return;
  }
  ThreadPool pool;
  REQUIRE(pool.resize(3).ok());
  int tried = 0;
  for (size_t cpu = 0; cpu < CPU_SETSIZE && tried < 4; ++cpu) {
    if (!CPU_ISSET(cpu, &all.set)) continue;
    Allowed others = all;
    CPU_CLR(cpu, &others.set);
    const auto affinities = [&] {
      std::vector<Allowed> seen(3);
      CHECK(test::all_come(pool.executor(), 3, [&](int worker) { seen[test::size(worker)] = Allowed(); }));
      return seen;
    };
    std::vector<Allowed> seen;
    std::thread bound([&] {
      Allowed(cpu).use();
      seen = affinities();
    });
    bound.join();
    CHECK(seen[0] == Allowed(cpu));
    CHECK(seen[1] == others);
    CHECK(seen[2] == others);

    bool stayed = false;
    for (int attempt = 0; attempt < 1000 && !stayed; ++attempt) {
      Allowed(cpu).use();
      CHECK(test::all_come(pool.executor(), 3));  // nothing but this processor to be had: where they were before
      all.use();
      const auto on_it = [&] { return ::sched_getcpu() == static_cast<int>(cpu); };
      stayed = on_it();
      seen = affinities();
      stayed = stayed && on_it();  // else the scheduler has moved it, and nothing is known
      if (stayed) CHECK(seen[0] == all);
      if (stayed) CHECK(seen[1] == others);
      if (stayed) CHECK(seen[2] == others);
    }
    CHECK(stayed);
    ++tried;
  }
}
#endif

TEST_CASE("the number of workers is 1 to 256") {
  ThreadPool pool;
  for (int workers : {0, -3, 257}) {
    const Status status = pool.resize(workers);
    CHECK(status.code() == Code::invalid_argument);
    CHECK(std::string(status.what()) == "threads: expected 1 to 256, got " + std::to_string(workers));
    CHECK(pool.workers() == 1);
  }
  REQUIRE(pool.resize(256).ok());
  CHECK(covers(pool.executor(), 1000));
}

TEST_CASE("resize up, down and to the same") {
  ThreadPool pool;
  for (int workers : {2, 5, 5, 3, 1, 4}) {
    REQUIRE(pool.resize(workers).ok());
    CHECK(covers(pool.executor(), 300));
  }
}

TEST_CASE("an executor from before a resize stays within its own workers") {
  ThreadPool pool;
  REQUIRE(pool.resize(2).ok());
  const Executor before = pool.executor();
  REQUIRE(pool.resize(7).ok());
  const Executor after = pool.executor();
  CHECK(covers(after, 500));
  for (int round = 0; round < 50; ++round) CHECK(covers(before, 500));
}

TEST_CASE("a resize waits for the calls of other threads") {
  ThreadPool pool;
  REQUIRE(pool.resize(3).ok());
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0}, calls{0};
  std::vector<std::thread> callers;
  for (int t = 0; t < 2; ++t)
    callers.emplace_back([&] {
      while (!stop) {
        if (!covers(pool.executor(), 40)) ++wrong;
        ++calls;
      }
    });
  for (int round = 0; round < 60; ++round) {
    CHECK(pool.resize(2 + round % 3).ok());
    for (const int before = calls; calls < before + 3;) std::this_thread::yield();
  }
  stop = true;
  for (std::thread& t : callers) t.join();
  CHECK(wrong.load() == 0);
}

TEST_CASE("a nested call runs in its own thread") {
  ThreadPool pool;
  REQUIRE(pool.resize(3).ok());
  struct Outer {
    Executor executor;
    std::atomic<int> wrong{0};
  } outer{pool.executor()};
  outer.executor.parallel_for(
      outer.executor.ctx, 20,
      [](void* arg, int64_t begin, int64_t end, int) {
        Outer& o = *static_cast<Outer*>(arg);
        for (int64_t i = begin; i < end; ++i)
          if (!covers(o.executor, 10)) ++o.wrong;
      },
      &outer);
  CHECK(outer.wrong.load() == 0);
}

TEST_CASE("threads that call at once do not disturb one another") {
  ThreadPool pool;
  REQUIRE(pool.resize(3).ok());
  const Executor executor = pool.executor();
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t)
    callers.emplace_back([&] {
      for (int round = 0; round < 100; ++round)
        if (!covers(executor, 50)) ++wrong;
    });
  for (std::thread& t : callers) t.join();
  CHECK(wrong.load() == 0);
}

TEST_CASE("threads that ask for the first executor at once get one crew") {
  for (int round = 0; round < 20; ++round) {
    ThreadPool pool;
    REQUIRE(pool.resize(3).ok());
    std::atomic<int> wrong{0}, ready{0};
    std::vector<std::thread> callers;
    for (int t = 0; t < 3; ++t)
      callers.emplace_back([&] {
        for (++ready; ready < 3;) std::this_thread::yield();
        if (!covers(pool.executor(), 50)) ++wrong;
      });
    for (std::thread& t : callers) t.join();
    CHECK(wrong.load() == 0);
  }
}

#if !defined(__SANITIZE_THREAD__)  // TSan supports no new threads after a fork of many
TEST_CASE("after fork the child has threads of its own") {
  ThreadPool pool;
  REQUIRE(pool.resize(3).ok());
  CHECK(covers(pool.executor(), 100));
  CHECK(in_child([&] { return covers(pool.executor(), 100) && pool.executor().workers == 3; }) == 0);
  CHECK(covers(pool.executor(), 100));
}

TEST_CASE("after fork an executor taken before it still works in the child") {
  ThreadPool pool;
  REQUIRE(pool.resize(3).ok());
  const Executor executor = pool.executor();
  CHECK(covers(executor, 100));
  CHECK(in_child([&] { return covers(executor, 100) && covers(executor, 7); }) == 0);
  CHECK(covers(executor, 100));
}

TEST_CASE("after fork the child may resize and end the pool") {
  CHECK(in_child([] {
          ThreadPool pool;
          if (!pool.resize(4).ok() || !covers(pool.executor(), 100)) return false;
          return in_child([&] {
                   const bool ok = pool.resize(2).ok() && covers(pool.executor(), 100);
                   pool.~ThreadPool();
                   return ok;
                 }) == 0;
        }) == 0);
}
#endif

TEST_CASE("the pool's verbs equal the serial ones while many threads serve requests") {
  test::Random random(14);
  const Codebook book = test::codebook(random, {20, 20}, 8);
  const auto x = test::uniform(random, 2000 * 8);
  ThreadPool pool;
  REQUIRE(pool.resize(3).ok());
  const Executor executor = pool.executor();
  const auto codes_by = [&](const Executor* e) {
    std::vector<int32_t> codes(4000);
    const bool ok = test::exactly(encode_workspace({{}, e}, book), e, [&](const Context& c) {
      return encode(c, book, test::rows(x, 8), {codes.data(), {2000, 2}});
    });
    return ok ? codes : std::vector<int32_t>{};
  };
  const std::vector<int32_t> serial = codes_by(nullptr);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int t = 0; t < 3; ++t)
    callers.emplace_back([&] {
      for (int round = 0; round < 5; ++round)
        if (codes_by(&executor) != serial) ++wrong;
    });
  for (std::thread& t : callers) t.join();
  CHECK(wrong.load() == 0);
}
