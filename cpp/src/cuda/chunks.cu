// SPDX-License-Identifier: Apache-2.0
#include "cuda/chunks.h"

namespace hisac::cuda {
namespace {

constexpr int kThreads = 256, kScanThreads = 1024;

SIMT_KERNEL(kThreads) clear_chunks(SIMT_CONSTANT Chunks chunks) { chunks.clear(); }
SIMT_KERNEL(kThreads) plan_chunks(SIMT_CONSTANT ClampedSpans s, SIMT_CONSTANT Chunks chunks) { chunks.plan(s); }
SIMT_KERNEL(kScanThreads) number_chunks(SIMT_CONSTANT Chunks chunks) { chunks.number(); }

}  // namespace

void launch_clear_chunks(const Chunks& chunks, Launcher& launch) {
  launch(clear_chunks, launch.machine.processors, kThreads, 0, chunks);
}

void launch_plan_chunks(const ClampedSpans& spans, const Chunks& chunks, Launcher& launch) {
  launch(plan_chunks, launch.machine.processors * 2, kThreads, 0, spans, chunks);
  if (chunks.place) launch(number_chunks, 1, kScanThreads, kFront, chunks);
}

}  // namespace hisac::cuda
