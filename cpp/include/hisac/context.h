// SPDX-License-Identifier: Apache-2.0
// Where a verb runs: the caller's memory and the caller's threads. A verb neither allocates nor starts a thread.
//
// Verbs may run at the same time if each has a workspace and outputs of its own. They may share inputs, codebooks and
// an executor. Verbs assume the default floating-point environment (rounding to nearest, subnormals kept). They neither
// set nor check it.
#pragma once
#include "array.h"

namespace hisac {

/// The caller's threads. parallel_for covers [0, n) by calls fn(arg, begin, end, worker) on disjoint ranges. No two
/// calls that run at once have the same worker, and each worker is in [0, workers). When parallel_for returns, all
/// calls have returned and what they wrote is visible to its caller. parallel_for must not throw, since verbs are
/// noexcept. It must allow calls from several threads at once if verbs that run at the same time share it. fn does not
/// throw and does not call parallel_for. Results do not depend on `workers` nor on how the ranges are cut, if all
/// threads have the caller's floating-point environment (ThreadPool's do).
struct Executor {
  void* ctx = nullptr;
  int workers = 1;
  void (*parallel_for)(void* ctx, int64_t n, void (*fn)(void* arg, int64_t begin, int64_t end, int worker),
                       void* arg) = nullptr;
};

/// Where a verb's arrays lie, the workspace among them.
enum class Device : int32_t { cpu, cuda };

/// A codebook on a GPU: a copy of Codebook::image() in the memory of the device, made by any means and aligned to 64
/// there, and the fingerprint of that codebook, by which a verb refuses another one's.
struct DeviceImage {
  Array<const std::byte, 1> bytes{};
  uint64_t fingerprint = 0;
};

/// `workspace` is scratch of at least the bytes that <verb>_workspace(context, ..) names, aligned to 64. It need not be
/// initialised, keeps nothing between calls (that of `fit_begin` aside: fit.h), and serves one call at a time, on CUDA
/// until the stream has done the work.
///
/// <verb>_workspace reads the device and the number of workers of the context, and no array's elements but the offsets
/// of histories that do not state `longest` and `rows`, and of tokens whose most is not stated (attend.h). It cannot
/// report an error: it returns 0 for parameters that the verb refuses and for a device that lacks the verb, and
/// SIZE_MAX / 2 for sizes beyond the limits. The verb then returns the error. On the CPU, a workspace for the largest
/// B, T, N, `longest` and `rows` serves all smaller calls (`fit` aside).
///
/// The executor has to live as long as contexts that point to it are used. Null: serial.
struct Context {
  Array<std::byte, 1> workspace{};
  const Executor* executor = nullptr;
  Device device = Device::cpu;   // cuda: the current one; cuda.h
  void* stream = nullptr;        // a cudaStream_t
  DeviceImage codebook_image{};  // of the verb's codebook, on CUDA
};

/// The workers of a context on the CPU.
inline int workers_of(const Context& context) noexcept {
  return context.executor && context.executor->parallel_for && context.executor->workers > 1 ? context.executor->workers
                                                                                             : 1;
}

}  // namespace hisac
