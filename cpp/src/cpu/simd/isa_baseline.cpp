// SPDX-License-Identifier: Apache-2.0
// The inner loops for whatever the compiler targets: SSE2 on x86-64, NEON, which every processor has, on AArch64. 4
// floats a vector.
#include "cpu/simd/kernels.h"
#include "cpu/simd/pack.h"

#define W 4
#define HISAC_ISA_TABLE kBaseline
#if defined(__aarch64__)
#define HISAC_ISA_NAME "neon"
#else
#define HISAC_ISA_NAME "baseline"
#endif
#include "cpu/simd/kernels.inl"
