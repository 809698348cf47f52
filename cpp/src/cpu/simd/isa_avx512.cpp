// SPDX-License-Identifier: Apache-2.0
// The inner loops for AVX-512: 16 floats a vector.
#if defined(__x86_64__)
#include "cpu/simd/kernels.h"
#include "cpu/simd/pack.h"
#include "cpu/simd/target.h"

HISAC_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define W 16
#define HISAC_ISA_TABLE kAvx512
#define HISAC_ISA_NAME "avx512"
#include "cpu/simd/kernels.inl"
HISAC_TARGET_END
#endif
