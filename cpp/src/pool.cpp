// SPDX-License-Identifier: Apache-2.0
// Condition variables rather than spinning: a service that calls once a millisecond must not burn a core in between.
#include "hisac/pool.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <new>

namespace hisac {
namespace {

constexpr int kMostWorkers = 256;

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
  uint64_t round = 0;
  int threads = 0, left = 0;
  bool stop = false;
  pid_t owner = 0;
  pthread_t thread[kMostWorkers];
  struct Seat {
    Crew* crew;
    int worker;
  } seat[kMostWorkers];

  void work(int worker) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) fn(arg, i, i + 1, worker);
  }

  static void* loop(void* p) {
    Seat* const seat = static_cast<Seat*>(p);
    Crew* const crew = seat->crew;
    for (uint64_t seen = 0;;) {
      {
        Lock lock(&crew->mutex);
        while (!crew->stop && crew->round == seen) pthread_cond_wait(&crew->wake, &crew->mutex);
        if (crew->stop) return nullptr;
        seen = crew->round;
      }
      crew->work(seat->worker);
      Lock lock(&crew->mutex);
      if (--crew->left == 0) pthread_cond_signal(&crew->done);
    }
  }

  void start(int workers) {
    owner = getpid();
    for (threads = 0; threads < workers - 1; ++threads) {
      seat[threads] = {this, threads + 1};
      if (pthread_create(&thread[threads], nullptr, loop, &seat[threads]) != 0) break;  // fewer threads, same results
    }
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
  if (crew_ && crew_->owner == getpid()) {  // a forked child has no threads to join
    crew_->finish();
    delete crew_;
  }
}

Status ThreadPool::resize(int workers) noexcept {
  if (workers < 1 || workers > kMostWorkers)
    return Status::error(Code::invalid_argument, "threads: expected 1 to %d, got %d", kMostWorkers, workers);
  if (workers == workers_) return {};
  if (crew_ && crew_->owner == getpid()) {
    crew_->finish();
    delete crew_;
  }
  crew_ = nullptr;
  workers_ = workers;
  return {};
}

Executor ThreadPool::executor() noexcept {
  if (workers_ > 1 && (!crew_ || crew_->owner != getpid())) {
    crew_ = new (std::nothrow) Crew;  // after fork the parent's crew is left as it was: its locks may be held
    if (crew_) crew_->start(workers_);
  }
  return {this, crew_ ? workers_ : 1, run};
}

void ThreadPool::run(void* self, int64_t n, void (*fn)(void*, int64_t, int64_t, int), void* arg) {
  Crew* const crew = static_cast<ThreadPool*>(self)->crew_;
  if (!crew || crew->threads == 0 || crew->busy.exchange(true)) return fn(arg, 0, n, 0);
  {
    Lock lock(&crew->mutex);
    crew->fn = fn;
    crew->arg = arg;
    crew->n = n;
    crew->next = 0;
    crew->left = crew->threads;
    ++crew->round;
    pthread_cond_broadcast(&crew->wake);
  }
  crew->work(0);
  {
    Lock lock(&crew->mutex);
    while (crew->left) pthread_cond_wait(&crew->done, &crew->mutex);
  }
  crew->busy = false;
}

}  // namespace hisac
