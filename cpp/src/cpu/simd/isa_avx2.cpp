// SPDX-License-Identifier: Apache-2.0
// The inner loops for AVX2 and FMA: 8 floats a vector.
#if defined(__x86_64__)
#include "cpu/simd/kernels.h"
#include "cpu/simd/pack.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define W 8
#define HISAC_ISA_TABLE kAvx2
#define HISAC_ISA_NAME "avx2"
#include "cpu/simd/kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
