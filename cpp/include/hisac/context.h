// SPDX-License-Identifier: Apache-2.0
// Where a verb runs: the caller's memory and the caller's threads. A verb neither allocates nor starts a thread.
#pragma once
#include "array.h"

namespace hisac {

/// The caller's threads. parallel_for covers [0, n) by calls fn(arg, begin, end, worker) on disjoint ranges, returns
/// when all are done, and gives no two calls that run at once the same worker in [0, workers). Results do not depend on
/// `workers` nor on how the ranges are cut, if all threads have the caller's floating-point mode (ThreadPool's do).
struct Executor {
  void* ctx = nullptr;
  int workers = 1;
  void (*parallel_for)(void* ctx, int64_t n, void (*fn)(void* arg, int64_t begin, int64_t end, int worker),
                       void* arg) = nullptr;
};

/// Where a verb's arrays lie, the workspace among them.
enum class Device : int32_t { cpu, cuda };

/// `workspace` is scratch of at least the bytes that <verb>_workspace(context, ..) names, aligned to 64; that function
/// reads the device and the executor's number of workers alone. Null executor: serial.
struct Context {
  Array<std::byte, 1> workspace{};
  const Executor* executor = nullptr;
  Device device = Device::cpu;                 // cuda: the current one; cuda.h
  void* stream = nullptr;                      // a cudaStream_t
  Array<const std::byte, 1> codebook_image{};  // on the device: codebook_image of the verb's codebook
};

/// The workers of a context on the CPU.
inline int workers_of(const Context& context) noexcept {
  return context.executor && context.executor->parallel_for && context.executor->workers > 1 ? context.executor->workers
                                                                                             : 1;
}

}  // namespace hisac
