// SPDX-License-Identifier: Apache-2.0
// The inner loops for AVX-512: 16 floats a vector.
#if defined(__x86_64__)
#include "cpu/simd/kernels.h"
#include "cpu/simd/pack.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define W 16
#define HISAC_ISA_TABLE kAvx512
#define HISAC_ISA_NAME "avx512"
#include "cpu/simd/kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
