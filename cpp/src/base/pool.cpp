// SPDX-License-Identifier: Apache-2.0
// Condition variables rather than spinning: a service that calls once a millisecond must not burn a core in between. A
// call wakes no more threads than it has ranges for, and does not wait for those that come when all is done: a short
// one ends before the first is awake. For the last ranges it waits awake, since sleep costs as much as a short call.
#include "hisac/pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <new>

#include "base/checks.h"

namespace hisac {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kMostWorkers = 256;
constexpr std::chrono::microseconds kPatience{100};  // for the last ranges, before the caller sleeps
constexpr int kSteady = 16;                          // calls of one thread in a row, before threads keep off it
constexpr std::chrono::milliseconds kStay{1};        // times the threads: before they keep off another processor

struct Lock {
  explicit Lock(pthread_mutex_t* m) noexcept : m_(m) { pthread_mutex_lock(m_); }
  ~Lock() { pthread_mutex_unlock(m_); }
  pthread_mutex_t* m_;
};

/// Held while threads start or end. Its value is the holder's process: a forked child waits for no one of its parent.
struct Turn {
  explicit Turn(std::atomic<int>* turn) noexcept : turn_(turn) {
    const int self = getpid();
    for (int held = *turn_; held == self || !turn_->compare_exchange_weak(held, self); held = *turn_) sched_yield();
  }
  ~Turn() { *turn_ = 0; }
  std::atomic<int>* turn_;
};

}  // namespace

struct ThreadPool::Crew {
  struct Seats {  // what an executor of so many workers names
    Crew* crew;
    int workers;
  } seats[kMostWorkers + 1];
  std::atomic<pid_t> owner{0};  // the process that has the threads
  std::atomic<bool> busy{false};
  pthread_mutex_t mutex;
  pthread_cond_t wake, done;
  std::atomic<int64_t> next{0};
  void (*fn)(void*, int64_t, int64_t, int) = nullptr;
  void* arg = nullptr;
  int64_t n = 0, step = 1;
  std::fenv_t mode;  // the caller's floating-point environment
  int threads = 0;
  int wanted = 0;               // threads that the call still wants
  std::atomic<int> working{0};  // threads that have come and work
  bool stop = false;
  pthread_t caller{};
  std::atomic<int> steady{0};  // calls in a row that `caller` made while nobody else asked
  int apart_cpu = -1;          // the processor that the threads keep off
  Clock::time_point stay;
  pthread_t thread[kMostWorkers - 1];

  Crew() noexcept {
    for (int w = 0; w <= kMostWorkers; ++w) seats[w] = {this, w};
  }

  void work(int worker) {
    for (int64_t i; (i = next.fetch_add(step, std::memory_order_relaxed)) < n;)
      fn(arg, i, std::min(i + step, n), worker);
  }

  static void* loop(void* p) {
    Crew* const crew = static_cast<Crew*>(p);
    for (;;) {
      int worker;
      {
        Lock lock(&crew->mutex);
        while (!crew->stop && crew->wanted == 0) pthread_cond_wait(&crew->wake, &crew->mutex);
        if (crew->stop) return nullptr;
        worker = crew->wanted--;
        ++crew->working;
      }
      std::fesetenv(&crew->mode);
      crew->work(worker);
      Lock lock(&crew->mutex);
      if (--crew->working == 0) pthread_cond_signal(&crew->done);
    }
  }

  /// In a process that has no threads of it: what a parent's threads held stays behind.
  void begin(int workers) noexcept {
    mutex = PTHREAD_MUTEX_INITIALIZER;
    wake = done = PTHREAD_COND_INITIALIZER;
    working = wanted = 0;
    busy = stop = false;
    start(workers);
    owner = getpid();
  }

  void start(int workers) noexcept {
    for (threads = 0; threads < workers - 1; ++threads)
      if (pthread_create(&thread[threads], nullptr, loop, this) != 0) break;  // fewer threads, same results
    steady = 0;
    place(-1);
  }

  void finish() noexcept {
    {
      Lock lock(&mutex);
      stop = true;
      pthread_cond_broadcast(&wake);
    }
    for (int i = 0; i < threads; ++i) pthread_join(thread[i], nullptr);
    stop = false;
  }

  /// Lets the threads run where the calling thread may, or, where it is bound to one processor, where the main thread
  /// may; not on `cpu`, unless that is -1.
  void place(int cpu) noexcept {
#ifdef __linux__
    apart_cpu = -1;
    for (const pid_t like : {pid_t{0}, getpid()}) {
      cpu_set_t set;
      if (sched_getaffinity(like, sizeof set, &set) != 0) return;
      if (cpu >= 0) CPU_CLR(static_cast<size_t>(cpu), &set);
      if (CPU_COUNT(&set) < (cpu >= 0 ? 1 : 2)) continue;
      for (int i = 0; i < threads; ++i) pthread_setaffinity_np(thread[i], sizeof set, &set);
      apart_cpu = cpu;
      return;
    }
#else
    (void)cpu;
#endif
  }

  /// Woken threads are put beside the caller, on virtual machines above all, whose idle processors look taken, and then
  /// wait until the scheduler moves them: 1.2 ms in place of .13 after a rest of 30. So they keep off the processor of
  /// the only caller, and follow it seldom, at no cost that counts. Where callers alternate, nothing is moved.
  void keep_apart() noexcept {
#ifdef __linux__
    const pthread_t self = pthread_self();
    if (!pthread_equal(caller, self)) steady = 0;
    caller = self;
    if (steady < kSteady) {
      ++steady;
      if (apart_cpu >= 0) place(-1);
      return;
    }
    const int cpu = sched_getcpu();
    if (cpu == apart_cpu) return;
    const Clock::time_point now = Clock::now();
    if (now < stay) return;
    stay = now + kStay * threads;
    place(cpu);
#endif
  }

  /// A call with at most `most` workers, or false where its caller has to work alone.
  bool run(int most, int64_t count, void (*f)(void*, int64_t, int64_t, int), void* a) noexcept {
    if (owner != getpid()) return false;
    if (busy.exchange(true)) return steady = 0, false;
    const int helpers = static_cast<int>(std::min<int64_t>(count, std::min(most, threads + 1))) - 1;
    if (helpers < 1) return busy = false;
    keep_apart();
    std::fegetenv(&mode);
    {
      Lock lock(&mutex);
      fn = f;
      arg = a;
      n = count;
      step = std::max<int64_t>(1, n / (64 * (helpers + 1)));  // as many together as still balance
      next = 0;
      wanted = helpers;
    }
    for (int i = 0; i < helpers; ++i) pthread_cond_signal(&wake);
    work(0);
    {
      Lock lock(&mutex);
      wanted = 0;
    }
    for (const auto late = Clock::now() + kPatience; working && Clock::now() < late;) sched_yield();
    {
      Lock lock(&mutex);
      while (working) pthread_cond_wait(&done, &mutex);
    }
    busy = false;
    return true;
  }
};

ThreadPool::~ThreadPool() {
  Crew* const crew = crew_;
  if (crew && crew->owner == getpid()) {
    while (crew->busy.exchange(true)) sched_yield();
    crew->finish();
  }
  delete crew;
}

Status ThreadPool::resize(int workers) noexcept {
  if (workers < 1 || workers > kMostWorkers) return invalid("threads: expected 1 to %d, got %d", kMostWorkers, workers);
  const Turn turn(&turn_);
  if (workers == workers_) return {};
  workers_ = workers;
  Crew* const crew = crew_;
  if (!crew || crew->owner != getpid()) return {};
  while (crew->busy.exchange(true)) sched_yield();
  crew->finish();
  crew->start(workers);
  crew->busy = false;
  return {};
}

Executor ThreadPool::executor() noexcept {
  const int workers = workers_;
  if (workers == 1) return {nullptr, 1, run};
  Crew* crew = crew_;
  if (!crew || crew->owner != getpid()) {
    const Turn turn(&turn_);
    if (!crew_) crew_ = new (std::nothrow) Crew;
    crew = crew_;
    if (!crew) return {nullptr, 1, run};
    if (crew->owner != getpid()) crew->begin(workers_);
  }
  return {&crew->seats[workers], workers, run};
}

void ThreadPool::run(void* self, int64_t n, void (*fn)(void*, int64_t, int64_t, int), void* arg) {
  const Crew::Seats* const seats = static_cast<Crew::Seats*>(self);
  if (!seats || !seats->crew->run(seats->workers, n, fn, arg)) fn(arg, 0, n, 0);
}

}  // namespace hisac
