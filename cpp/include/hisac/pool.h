// SPDX-License-Identifier: Apache-2.0
// A small pool of threads for callers who have none: asleep between calls, usable after fork.
#pragma once
#include <atomic>

#include "context.h"
#include "status.h"

namespace hisac {

/// Owns workers - 1 threads; the calling thread is the last worker. One call runs at a time; a call that finds the pool
/// busy runs serially in its own thread. After fork the child gets threads of its own with its next executor(). Any
/// number of threads may call executor() and use what it returned while the pool lives. After a resize an older
/// executor has the smaller number of workers; after a fork it is serial until the child has threads. A call's threads
/// take its caller's floating-point environment (rounding, subnormals as zero), so the bits do not depend on their
/// number; flags that they raise stay theirs. On Linux they may run where the caller may, or, if it is bound to one
/// processor, where the process's main thread may. The processor of a caller that has been the only one for some calls
/// is left to it.
class ThreadPool {
 public:
  ThreadPool() noexcept = default;
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// Set the number of workers, 1 to 256; threads start with the first executor(). Waits for a call that runs; not from
  /// within one.
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
