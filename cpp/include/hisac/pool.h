// SPDX-License-Identifier: Apache-2.0
// A small pool of threads for callers who have none: asleep between calls, usable after fork.
#pragma once
#include <atomic>

#include "context.h"
#include "status.h"

namespace hisac {

/// Owns workers - 1 threads; the calling thread is the last worker. One call runs at a time; a call that finds the pool
/// busy runs serially in its own thread. So a service with as many request threads as processors lends no executor, and
/// one that takes few large batches lends a pool to each call. A caller that has no work left yields (sched_yield) for
/// up to 100 us until the threads are done, and then sleeps. A call's threads take its caller's floating-point
/// environment (rounding, subnormals as zero), so the bits do not depend on their number; flags that they raise stay
/// theirs.
///
/// executor() allocates and starts the threads where there are none: call it at start-up. The threads inherit the
/// signal mask of the thread that starts them. If the system refuses a thread, calls run with fewer; workers() stays as
/// set. Any number of threads may call executor() and use what it returned while the pool lives. After a resize an
/// older executor has the smaller number of workers. After fork the child gets threads of its own with its next
/// executor(); an older executor is serial until then.
///
/// On Linux the pool sets the affinity of its own threads (pthread_setaffinity_np), never that of a caller. When they
/// start, it is the affinity of the thread that starts them, or of the process's main thread if the former is bound to
/// one processor. After 16 calls in a row from one thread, that caller's processor is taken out of it. This follows the
/// caller when it moves, at most once in (workers - 1) ms, and ends when another thread calls.
class ThreadPool {
 public:
  ThreadPool() noexcept = default;
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// Sets the number of workers, 1 to 256. Threads start with the first executor(); if they have, resize ends them and
  /// starts the new number. It waits for a call that runs, so it must not be called from within one.
  Status resize(int workers) noexcept;
  int workers() const noexcept { return workers_; }
  Executor executor() noexcept;

 private:
  struct Crew;
  static void run(void* self, int64_t n, void (*fn)(void*, int64_t, int64_t, int), void* arg);
  std::atomic<Crew*> crew_{nullptr};
  std::atomic<int> turn_{0};  // the process that starts or ends threads
  std::atomic<int> workers_{1};
};

}  // namespace hisac
