// SPDX-License-Identifier: Apache-2.0
// The verbs on a GPU: those of the other headers, with arrays on the current device and Context{.device =
// Device::cuda}, from the library hisac_cuda.
#pragma once
#include "status.h"

namespace hisac {

/// Makes every verb but `fit` and `leaves` take a context on CUDA; not_implemented where there is no device
/// or driver. Such a call puts everything on context.stream, allocates nothing and waits for nothing, so it may be
/// captured into a graph; its results have the same bits every time. Values of arrays are not seen by the host: offsets
/// are clamped to [0, T], and an end to its start, where the CPU would name them.
Status enable_cuda() noexcept;

}  // namespace hisac
