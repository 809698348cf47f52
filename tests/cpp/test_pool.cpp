// SPDX-License-Identifier: Apache-2.0
// ThreadPool: every index once, few enough at once, after fork, busy, nested, resized; its caller's floating-point
// mode; where its threads may run, and how often that is changed.
#include <doctest/doctest.h>

#include <dlfcn.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include <atomic>
#include <cfenv>
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
namespace {

std::atomic<int> affinity_calls{0};

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

}  // namespace

/// The pool's calls come here first.
extern "C" int pthread_setaffinity_np(pthread_t thread, size_t size, const cpu_set_t* set) noexcept {
  static const auto real = reinterpret_cast<decltype(&pthread_setaffinity_np)>(::dlsym(RTLD_NEXT, __func__));
  ++affinity_calls;
  return real(thread, size, set);
}

TEST_CASE("threads keep off the processor of a caller that is the only one") {
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
      for (int call = 0; call < 20; ++call) covers(pool.executor(), 3);  // the only caller for a while
      std::this_thread::sleep_for(std::chrono::milliseconds(5));         // and the last change is long ago
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

    bool kept_off = false;  // where the scheduler moves the caller, to and fro even, nothing is known: another attempt
    for (int attempt = 0; attempt < 1000 && !kept_off; ++attempt) {
      Allowed(cpu).use();
      CHECK(test::all_come(pool.executor(), 3));  // nothing but this processor to be had: where they were before
      all.use();
      seen = affinities();
      kept_off = seen[0] == all && seen[1] == others && seen[2] == others;
    }
    CHECK(kept_off);
    ++tried;
  }
}

TEST_CASE("threads that a bound caller starts may run where the main thread may") {
  const Allowed all;
  ThreadPool pool;
  REQUIRE(pool.resize(3).ok());
  std::vector<Allowed> seen(3);
  std::thread bound([&] {
    size_t cpu = 0;
    while (!CPU_ISSET(cpu, &all.set)) ++cpu;
    Allowed(cpu).use();
    CHECK(test::all_come(pool.executor(), 3, [&](int worker) { seen[test::size(worker)] = Allowed(); }));
  });
  bound.join();
  CHECK(seen[1] == all);
  CHECK(seen[2] == all);
}

TEST_CASE("callers that alternate move no thread, and get all of them everywhere") {
  const Allowed all;
  ThreadPool pool;
  REQUIRE(pool.resize(4).ok());
  const Executor executor = pool.executor();
  for (int call = 0; call < 40; ++call) covers(executor, 4);  // moved once for the one caller that there was
  std::vector<Allowed> seen(4);
  std::atomic<int> turn{0}, before{0}, after{0};
  constexpr int kCalls = 200;
  std::vector<std::thread> callers;
  for (int t = 0; t < 2; ++t)
    callers.emplace_back([&, t] {
      for (int call = 0; call < kCalls; ++call) {
        while (turn != 2 * call + t) std::this_thread::yield();
        if (2 * call + t == 1) before = affinity_calls.load();
        covers(executor, 4);
        after = affinity_calls.load();
        ++turn;
      }
    });
  for (std::thread& t : callers) t.join();
  CHECK(after == before);
  CHECK(test::all_come(executor, 4, [&](int worker) { seen[test::size(worker)] = Allowed(); }));
  for (const Allowed& each : seen) CHECK(each == all);
}

TEST_CASE("a caller that moves all the time, or many at once, move threads seldom") {
  const Allowed all;
  for (int count : {1, 4}) {
    CAPTURE(count);
    ThreadPool pool;
    constexpr int kThreads = 3;
    REQUIRE(pool.resize(kThreads + 1).ok());
    const Executor executor = pool.executor();
    const auto start = std::chrono::steady_clock::now();
    const int before = affinity_calls;
    std::vector<std::thread> callers;
    for (int t = 0; t < count; ++t)
      callers.emplace_back([&] {
        size_t cpu = 0;
        for (int call = 0; call < 1000; ++call) {
          do cpu = (cpu + 1) % CPU_SETSIZE;
          while (!CPU_ISSET(cpu, &all.set));
          Allowed(cpu).use();
          covers(executor, 4);
        }
      });
    for (std::thread& t : callers) t.join();
    const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    CHECK(affinity_calls - before <= 2 * (ms + kThreads));  // one thread a millisecond, there and back
  }
}
#endif

TEST_CASE("threads compute in their caller's floating-point mode") {
  ThreadPool pool;
  REQUIRE(pool.resize(4).ok());
  const auto results = [&] {
    std::vector<float> out(8);
    CHECK(test::all_come(pool.executor(), 4, [&](int worker) {
      const volatile float one = 1, three = 3, least = 0x1p-126f, half = .5f;
      out[test::size(worker * 2)] = one / three;
      out[test::size(worker * 2 + 1)] = least * half;
    }));
    return out;
  };
  const auto all_are = [&](float third, float subnormal) {
    const std::vector<float> out = results();
    for (size_t i = 0; i < out.size(); i += 2) {
      CHECK(out[i] == third);
      CHECK(std::memcmp(&out[i + 1], &subnormal, 4) == 0);
    }
  };
  const float down = 0x1.555554p-2f, nearest = 0x1.555556p-2f;
  const auto in_mode = [&](auto set, float third, float subnormal) {
    std::thread caller([&] {  // a thread's own: the next caller's is its own again
      set();
      all_are(third, subnormal);
    });
    caller.join();
    all_are(nearest, 0x1p-127f);
  };
  in_mode([] { std::fesetround(FE_TOWARDZERO); }, down, 0x1p-127f);
#ifdef __SSE__
  in_mode([] { _mm_setcsr(_mm_getcsr() | 0x8040); }, nearest, 0);
#elif defined(__aarch64__)
  in_mode([] { __asm__ volatile("msr fpcr, %0" ::"r"(uint64_t{1} << 24)); }, nearest, 0);
#endif
}

TEST_CASE("a verb's bits do not depend on the number of threads where subnormals count as zero") {
  constexpr int64_t kCodes = 400000, kWidth = 8;
  const std::vector<float> tiny(4 * kWidth, 0x1p-130f);
  const Array<const float, 2> centers[] = {test::matrix(tiny, 4, kWidth), test::matrix(tiny, 4, kWidth)};
  Codebook book;
  REQUIRE(Codebook::build(centers, 2, &book).ok());
  std::vector<int32_t> codes(kCodes * 2, 3);
  ThreadPool pools[2];
  for (int i : {0, 1}) REQUIRE(pools[i].resize(2 + 2 * i).ok());
  for (ThreadPool& pool : pools) pool.executor();  // a thread begins in the mode of the one that starts it
  const auto sums = [&](const Executor* executor) {
    std::vector<float> out(kCodes * kWidth, 1);
    const Array<float, 2> all{out.data(), {kCodes, kWidth}};
    REQUIRE(code_prototypes({{}, executor}, book, {codes.data(), {kCodes, 2}}, all).ok());
    return out;
  };
  std::thread flushing([&] {
#ifdef __SSE__
    _mm_setcsr(_mm_getcsr() | 0x8040);
    CHECK(sums(nullptr)[0] == 0);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" ::"r"(uint64_t{1} << 24));
    CHECK(sums(nullptr)[0] == 0);
#endif
    const std::vector<float> serial = sums(nullptr);
    for (ThreadPool& pool : pools) {
      const Executor executor = pool.executor();
      REQUIRE(test::all_come(executor, executor.workers));  // awake, or nearly
      const std::vector<float> out = sums(&executor);
      CHECK(std::memcmp(serial.data(), out.data(), out.size() * sizeof(float)) == 0);
    }
  });
  flushing.join();
}

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

TEST_CASE("an executor from before a resize stays within its own workers, and has them") {
  ThreadPool pool;
  REQUIRE(pool.resize(2).ok());
  const Executor two = pool.executor();
  REQUIRE(pool.resize(7).ok());
  const Executor seven = pool.executor();
  CHECK(covers(seven, 500));
  for (int round = 0; round < 50; ++round) CHECK(covers(two, 500));
  CHECK(test::all_come(two, 2));
  REQUIRE(pool.resize(3).ok());
  for (int round = 0; round < 50; ++round) CHECK(covers(seven, 500));
  CHECK(test::all_come(seven, 3));
  REQUIRE(pool.resize(1).ok());
  for (const Executor& executor : {two, seven, pool.executor()}) CHECK(covers(executor, 500));
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
