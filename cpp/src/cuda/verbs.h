// SPDX-License-Identifier: Apache-2.0
// The verbs on a GPU, with the signatures of the public ones, which have checked shapes, types and parameters: all
// arrays lie on the current device, everything is put on context.stream, nothing is allocated, nothing waits. What a
// caller must know of them stands in hisac/cuda.h. Each stands in the file of its name.
#pragma once
#include "backend.h"

namespace hisac::cuda {

HISAC_EACH_VERB(HISAC_DECLARE_VERB)

}  // namespace hisac::cuda
