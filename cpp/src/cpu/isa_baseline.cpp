// SPDX-License-Identifier: Apache-2.0
// The inner loops for whatever the compiler targets: SSE2 on x86-64.
#if !defined(__aarch64__)
#include "kernels.h"
#include "pack.h"

#define W 4
#define HISAC_ISA_TABLE kBaseline
#define HISAC_ISA_NAME "baseline"
#include "kernels.inl"
#endif
