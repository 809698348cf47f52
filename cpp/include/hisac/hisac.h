// SPDX-License-Identifier: Apache-2.0
// hisac: from histories of 10,000 behaviours to a few hundred tokens (HiSAC, arXiv 2602.21009). The map, in data order:
//
//   item embeddings --fit--> codebook
//   x --encode--> codes --vote--> agents --route--> tokens --attend--> candidates' features
//                 codes, v --leaf_sums--> leaf sums --match--> candidates' features
//
// `compress` is the way from x, or codes, to tokens in one call. A UserState (state.h) keeps a user's leaf sums between
// requests, as bytes, and follows every event.
//
// Every verb takes a Context (your workspace, your threads) and borrowed arrays, returns a Status, never throws, never
// allocates. The calls that do allocate are Codebook::build, parse, load and save, ThreadPool::resize and executor,
// and, inside CUDA, enable_cuda.
//
// The behaviours of a batch of users are one value, Histories. The values in it (x, v, codes, ids, bias, spread,
// weights) are never errors: a behaviour with a NaN in x is absent, one with an invalid code is absent where codes are
// read, a NaN in v reaches the result, and an empty history gives zero tokens. Offsets, shapes, types and parameters
// are checked. It is also an error if centers are not finite, or if `fit` gets no row that it can use.
//
// `<verb>_workspace` names the bytes of scratch. The definition of every verb is in python/hisac/reference.
#pragma once
#include "array.h"
#include "attend.h"
#include "codebook.h"
#include "compress.h"
#include "context.h"
#include "cuda.h"
#include "encode.h"
#include "fit.h"
#include "histories.h"
#include "leaf_sums.h"
#include "match.h"
#include "pool.h"
#include "route.h"
#include "state.h"
#include "status.h"
#include "vote.h"

namespace hisac {

/// The instruction sets compiled in that this processor has, best last, separated by spaces: of "baseline", "avx2",
/// "avx512", "avx512bf16" (AMD), "amx"; on AArch64 "neon", where it is the baseline.
///
/// On a processor with AMX, the first call of this function or of one that makes the choice below asks Linux to let the
/// process use AMX (arch_prctl, ARCH_REQ_XCOMP_PERM). It asks whatever HISAC_ISA says, and for the whole process.
const char* available_isas() noexcept;
/// The one in use. It is chosen once, by what comes first: this function, Codebook::build, parse, load or view, or a
/// verb or a workspace function that needs it. The choice is the one that the environment variable HISAC_ISA names;
/// without it, or where it names none of those available, the best.
const char* active_isa() noexcept;

}  // namespace hisac
