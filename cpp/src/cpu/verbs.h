// SPDX-License-Identifier: Apache-2.0
// The verbs on the CPU. They have the signatures of the public verbs, which have checked shapes, types and parameters.
// Each is in the file of its name, but `fit` is in kmeans.cpp.
#pragma once
#include "backend.h"

namespace hisac::cpu {

HISAC_EACH_VERB(HISAC_DECLARE_VERB)
HISAC_EACH_CPU_VERB(HISAC_DECLARE_VERB)

}  // namespace hisac::cpu
