// SPDX-License-Identifier: Apache-2.0
// hisac: from histories of 10,000 behaviours to a few hundred tokens (HiSAC, arXiv 2602.21009). The map, in data order:
//
//   item embeddings --fit--> codebook
//   x --encode--> codes --vote--> agents --prototypes, route--> tokens --attend--> candidates' features
//
// Every verb takes a Context (your workspace, your threads) and borrowed arrays, returns a Status, never throws, never
// allocates. Array values are never errors (an invalid code means absent, NaN loses, an empty history gives zero
// tokens); shapes, types, order and parameters are. `<verb>_workspace` names the bytes of scratch. The definition of
// every verb is in python/hisac/reference.
#pragma once
#include "array.h"
#include "attend.h"
#include "codebook.h"
#include "context.h"
#include "cuda.h"
#include "encode.h"
#include "fit.h"
#include "leaf_sums.h"
#include "pool.h"
#include "route.h"
#include "status.h"
#include "vote.h"

namespace hisac {

/// The instruction sets compiled in that this processor has, best last, separated by spaces: of "baseline", "avx2",
/// "avx512", "avx512bf16" (AMD), "amx" (asks the system's permission); on AArch64 "neon", where it is the baseline.
const char* available_isas() noexcept;
/// The one in use: the best, or what the environment variable HISAC_ISA named when the first verb ran.
const char* active_isa() noexcept;

}  // namespace hisac
