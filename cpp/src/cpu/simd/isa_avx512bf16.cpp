// SPDX-License-Identifier: Apache-2.0
// AVX-512 with products of bfloat16, for processors that run them at twice the rate of FMA (dispatch.cpp).
#if defined(__x86_64__)
#include "cpu/simd/kernels.h"
#include "cpu/simd/pack.h"
#include "cpu/simd/target.h"

HISAC_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#define W 16
#define HISAC_BF16
#define HISAC_ISA_TABLE kAvx512Bf16
#define HISAC_ISA_NAME "avx512bf16"
#include "cpu/simd/kernels.inl"
HISAC_TARGET_END
#endif
