// SPDX-License-Identifier: Apache-2.0
// The inner loops for NEON, which every AArch64 processor has: 4 floats a vector.
#if defined(__aarch64__)
#include "cpu/simd/kernels.h"
#include "cpu/simd/pack.h"

#define W 4
#define HISAC_ISA_TABLE kNeon
#define HISAC_ISA_NAME "neon"
#include "cpu/simd/kernels.inl"
#endif
