// SPDX-License-Identifier: Apache-2.0
// AVX-512 with products of bfloat16, for processors that run them at twice the rate of FMA (dispatch.cpp).
#if defined(__x86_64__)
#include "cpu/simd/kernels.h"
#include "cpu/simd/pack.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif
#define W 16
#define HISAC_BF16
#define HISAC_ISA_TABLE kAvx512Bf16
#define HISAC_ISA_NAME "avx512bf16"
#include "cpu/simd/kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
