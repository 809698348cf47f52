// SPDX-License-Identifier: Apache-2.0
// Before a kernel's source where its PTX is to leave the bits of the emulated C++: log2f is one instruction, which the
// emulator and the interpreter compute by one function, in place of nvcc's polynomial.
#pragma once
#include <cuda_runtime.h>

__device__ __forceinline__ float one_log2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#define log2f one_log2
