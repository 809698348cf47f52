// SPDX-License-Identifier: Apache-2.0
// The inner loops for whatever the compiler targets: SSE2 on x86-64.
#if !defined(__aarch64__)
#include "cpu/simd/kernels.h"
#include "cpu/simd/pack.h"

#define W 4
#define HISAC_ISA_TABLE kBaseline
#define HISAC_ISA_NAME "baseline"
#include "cpu/simd/kernels.inl"
#endif
