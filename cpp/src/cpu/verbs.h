// SPDX-License-Identifier: Apache-2.0
// The verbs on the CPU, with the signatures of the public ones, which have checked shapes, types and parameters. Each
// stands in the file of its name, `fit` in kmeans.cpp.
#pragma once
#include "backend.h"

namespace hisac::cpu {

HISAC_EACH_VERB(HISAC_DECLARE_VERB)
HISAC_DECLARE_VERB(fit)
HISAC_DECLARE_VERB(fit_workspace)

}  // namespace hisac::cpu
