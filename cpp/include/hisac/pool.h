// SPDX-License-Identifier: Apache-2.0
// A small pool of threads for callers who have none: asleep between calls, usable after fork.
#pragma once
#include <atomic>

#include "context.h"
#include "status.h"

namespace hisac {

/// Owns workers - 1 threads; the calling thread is the last worker. One call runs at a time; a call that finds the pool
/// busy runs serially in its own thread. After fork the child gets threads of its own with its next executor(). Any
/// number of threads may call executor() and use what it returned; an executor from before a resize or a fork stays
/// usable and runs serially. On Linux a call lets its threads run on the processors that the caller may use, or, if it
/// is bound to one, the process's main thread, without the one that it is on.
class ThreadPool {
 public:
  ThreadPool() noexcept = default;
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// Set the number of workers, 1 to 256; threads start lazily. Waits for a call that runs; not from within one.
  Status resize(int workers) noexcept;
  int workers() const noexcept { return workers_; }
  Executor executor() noexcept;

 private:
  struct Crew;
  static void run(void* self, int64_t n, void (*fn)(void*, int64_t, int64_t, int), void* arg);
  static void stop(Crew* crew) noexcept;
  std::atomic<Crew*> crew_{nullptr};
  Crew* retired_ = nullptr;  // stopped, kept for executors that still name them
  std::atomic<int> workers_{1};
};

}  // namespace hisac
