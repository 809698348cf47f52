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
#include <chrono>
#include <new>

namespace hisac {
namespace {

constexpr int kMostWorkers = 256;
constexpr std::chrono::microseconds kPatience{100};  // for the last ranges, before the caller sleeps

struct Lock {
  explicit Lock(pthread_mutex_t* m) noexcept : m_(m) { pthread_mutex_lock(m_); }
  ~Lock() { pthread_mutex_unlock(m_); }
  pthread_mutex_t* m_;
};

}  // namespace

struct ThreadPool::Crew {
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
  std::atomic<bool> busy{false};
  std::atomic<int64_t> next{0};
  void (*fn)(void*, int64_t, int64_t, int) = nullptr;
  void* arg = nullptr;
  int64_t n = 0;
  int workers = 0, threads = 0;
  int wanted = 0;               // threads that the call still wants
  std::atomic<int> working{0};  // threads that have come and work
  bool stop = false;
  pid_t owner = 0;
  Crew* older = nullptr;
  int apart_cpu = -1, apart = 0;  // the first `apart` threads keep off this processor
  pthread_t thread[kMostWorkers];
  struct Seat {
    Crew* crew;
    int worker;
  } seat[kMostWorkers];

  /// One by one, or as many together as still balance when there are many.
  void work(int worker) {
    const int64_t step = std::max<int64_t>(1, n / (64 * (threads + 1)));
    for (int64_t i; (i = next.fetch_add(step, std::memory_order_relaxed)) < n;)
      fn(arg, i, std::min(i + step, n), worker);
  }

  static void* loop(void* p) {
    Seat* const seat = static_cast<Seat*>(p);
    Crew* const crew = seat->crew;
    for (;;) {
      {
        Lock lock(&crew->mutex);
        while (!crew->stop && crew->wanted == 0) pthread_cond_wait(&crew->wake, &crew->mutex);
        if (crew->stop) return nullptr;
        --crew->wanted;
        ++crew->working;
      }
      crew->work(seat->worker);
      Lock lock(&crew->mutex);
      if (--crew->working == 0) pthread_cond_signal(&crew->done);
    }
  }

  void start(int count) {
    owner = getpid();
    workers = count;
    for (threads = 0; threads < workers - 1; ++threads) {
      seat[threads] = {this, threads + 1};
      if (pthread_create(&thread[threads], nullptr, loop, &seat[threads]) != 0) break;  // fewer threads, same results
    }
  }

  /// Lets the first `count` threads run where the caller may, or, where it is bound to one processor, where the main
  /// thread may, but for the processor that it is on now. Woken threads are put there, on virtual machines above all,
  /// whose idle processors look taken, and then wait until the scheduler moves them: 1.2 ms in place of .13 after a
  /// rest of 30.
  void keep_apart(int count) noexcept {
#ifdef __linux__
    const int cpu = sched_getcpu();
    if (cpu != apart_cpu) apart = 0;
    apart_cpu = cpu;
    for (const pid_t like : {pid_t{0}, owner}) {
      cpu_set_t set;
      if (apart >= count || sched_getaffinity(like, sizeof set, &set) != 0) return;
      CPU_CLR(static_cast<size_t>(cpu), &set);
      for (; CPU_COUNT(&set) && apart < count; ++apart) pthread_setaffinity_np(thread[apart], sizeof set, &set);
    }
#else
    (void)count;
#endif
  }

  void finish() {
    {
      Lock lock(&mutex);
      stop = true;
      pthread_cond_broadcast(&wake);
    }
    for (int i = 0; i < threads; ++i) pthread_join(thread[i], nullptr);
  }
};

ThreadPool::~ThreadPool() {
  if (Crew* const crew = crew_) {
    crew->older = retired_;
    retired_ = crew;
    stop(crew);
  }
  while (Crew* const crew = retired_) {
    retired_ = crew->older;
    if (crew->owner == getpid()) delete crew;  // a forked child leaves its parent's as they were: locks may be held
  }
}

void ThreadPool::stop(Crew* crew) noexcept {
  if (crew->owner != getpid()) return;              // a forked child has no threads to join
  while (crew->busy.exchange(true)) sched_yield();  // and busy for good: later calls run serially
  crew->finish();
}

Status ThreadPool::resize(int workers) noexcept {
  if (workers < 1 || workers > kMostWorkers)
    return Status::error(Code::invalid_argument, "threads: expected 1 to %d, got %d", kMostWorkers, workers);
  if (workers == workers_) return {};
  workers_ = workers;
  if (Crew* const crew = crew_.exchange(nullptr)) {
    stop(crew);
    crew->older = retired_;
    retired_ = crew;
  }
  return {};
}

Executor ThreadPool::executor() noexcept {
  const int workers = workers_;
  Crew* crew = crew_;
  if (workers > 1 && (!crew || crew->owner != getpid())) {
    Crew* const fresh = new (std::nothrow) Crew;
    if (fresh) fresh->start(workers);
    if (fresh && crew_.compare_exchange_strong(crew, fresh)) {
      crew = fresh;      // after fork the parent's is left behind as it was
    } else if (fresh) {  // another thread was first
      fresh->finish();
      delete fresh;
    }
  }
  return {crew, crew ? crew->workers : 1, run};
}

void ThreadPool::run(void* self, int64_t n, void (*fn)(void*, int64_t, int64_t, int), void* arg) {
  Crew* const crew = static_cast<Crew*>(self);
  if (!crew || crew->threads == 0 || crew->owner != getpid() || crew->busy.exchange(true)) return fn(arg, 0, n, 0);
  const int wanted = static_cast<int>(std::clamp<int64_t>(n - 1, 0, crew->threads));
  crew->keep_apart(wanted);
  {
    Lock lock(&crew->mutex);
    crew->fn = fn;
    crew->arg = arg;
    crew->n = n;
    crew->next = 0;
    crew->wanted = wanted;
  }
  for (int i = 0; i < wanted; ++i) pthread_cond_signal(&crew->wake);
  crew->work(0);
  {
    Lock lock(&crew->mutex);
    crew->wanted = 0;
  }
  using Clock = std::chrono::steady_clock;
  for (const auto late = Clock::now() + kPatience; crew->working && Clock::now() < late;) sched_yield();
  {
    Lock lock(&crew->mutex);
    while (crew->working) pthread_cond_wait(&crew->done, &crew->mutex);
  }
  crew->busy = false;
}

}  // namespace hisac
