// SPDX-License-Identifier: Apache-2.0
// A small pool of threads for callers who have none: condition variables, no spinning, usable after fork.
#pragma once
#include "context.h"
#include "status.h"

namespace hisac {

/// Owns workers - 1 threads; the calling thread is the last worker. One call runs at a time; a call that finds the pool
/// busy runs serially in its own thread. After fork the child starts threads of its own at its first call.
class ThreadPool {
 public:
  ThreadPool() noexcept = default;
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// Set the number of workers, 1 to 256; threads start lazily. Not while a call runs.
  Status resize(int workers) noexcept;
  int workers() const noexcept { return workers_; }
  Executor executor() noexcept;

 private:
  struct Crew;
  static void run(void* self, int64_t n, void (*fn)(void*, int64_t, int64_t, int), void* arg);
  Crew* crew_ = nullptr;
  int workers_ = 1;
};

}  // namespace hisac
