// SPDX-License-Identifier: Apache-2.0
// The inner loops for AVX2 and FMA: 8 floats a vector.
#if defined(__x86_64__)
#include "cpu/simd/kernels.h"
#include "cpu/simd/pack.h"
#include "cpu/simd/target.h"

HISAC_TARGET_BEGIN("avx2,fma")
#define W 8
#define HISAC_ISA_TABLE kAvx2
#define HISAC_ISA_NAME "avx2"
#include "cpu/simd/kernels.inl"
HISAC_TARGET_END
#endif
