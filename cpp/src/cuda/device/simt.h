// SPDX-License-Identifier: Apache-2.0
// The vocabulary of the kernels: one source, two compilers. Under nvcc thin names over CUDA and PTX (sm_80 and later);
// elsewhere the same names of tests/cuda, which run a kernel's blocks, warps and lanes on the CPU. A kernel touches the
// machine through this header only.
#pragma once
#include <cstddef>
#include <cstdint>

#ifndef __CUDACC__
#include "emulator.h"  // tests/cuda
#else
#include <cuda_runtime.h>

#define SIMT_DEVICE __device__ __forceinline__
#define SIMT_BOTH __host__ __device__ __forceinline__
#define SIMT_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)  // threads, blocks a processor
#define SIMT_EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); ++i)  // so that arrays stay in registers
#define SIMT_ROLLED _Pragma("unroll 1")
#define SIMT_CONSTANT __grid_constant__ const    // of a kernel's parameter that stays in constant memory
#define SIMT_UNLESS_PLANTED(n, ...) __VA_ARGS__  // what a planted fault leaves out, under the emulator

namespace simt {

using Stream = cudaStream_t;
struct alignas(16) Quad {
  uint32_t word[4];
};

SIMT_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
SIMT_DEVICE int fresh_thread() {  // asked for anew: nothing that follows from it waits in a register for the next use
  int t;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
  return t;
}
SIMT_DEVICE int threads() { return static_cast<int>(blockDim.x); }
SIMT_DEVICE int lane() { return static_cast<int>(threadIdx.x & 31); }
SIMT_DEVICE int warp() { return static_cast<int>(threadIdx.x >> 5); }
SIMT_DEVICE int block() { return static_cast<int>(blockIdx.x); }
SIMT_DEVICE int blocks() { return static_cast<int>(gridDim.x); }

/// The block's dynamic shared memory.
SIMT_DEVICE std::byte* shared() {
  extern __shared__ __align__(128) unsigned char simt_shared[];
  return reinterpret_cast<std::byte*>(simt_shared);
}
SIMT_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

SIMT_DEVICE void sync() { __syncthreads(); }
SIMT_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
SIMT_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
template <class T>
SIMT_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(~0u, value, lane);
}
SIMT_DEVICE uint32_t ballot(bool flag) { return __ballot_sync(~0u, flag); }
SIMT_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }
template <class T>
SIMT_DEVICE T atomic_add(T* p, T value) {  // integers only: float sums would depend on the order
  static_assert(T(1) / 2 == 0, "no float atomics");
  if constexpr (sizeof(T) == 8)  // one of the two 64-bit types, which are CUDA's by another name
    return static_cast<T>(atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(value)));
  else
    return atomicAdd(p, value);
}
SIMT_DEVICE void atomic_or(uint32_t* p, uint32_t bits) { atomicOr(p, bits); }
SIMT_DEVICE int32_t atomic_max(int32_t* p, int32_t value) { return atomicMax(p, value); }
SIMT_DEVICE uint64_t atomic_claim(uint64_t* p, uint64_t value) {  // puts it in the place of 0; returns what was there
  return atomicCAS(reinterpret_cast<unsigned long long*>(p), 0ull, static_cast<unsigned long long>(value));
}

/// 16 bytes from global to shared memory, or zeros; both aligned to 16. Seen by this thread after wait, by the block
/// after a sync on top.
SIMT_DEVICE void copy16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
SIMT_DEVICE void copy4(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}
SIMT_DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kOpen>
SIMT_DEVICE void wait() {  // until at most the last kOpen groups are under way
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

/// Four 8 x 8 matrices of 16-bit elements; lane 8 j + i names row i of matrix j.
SIMT_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
SIMT_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
/// d[16, 8] += a[16, 16] b[16, 8], bfloat16 with float32 sums.
SIMT_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// The same of float16.
SIMT_DEVICE void multiply_add_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Two bfloat16, nearest even, `low` in the lower half.
SIMT_DEVICE uint32_t pack(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
SIMT_DEVICE uint32_t pack_half(float low, float high) {  // two float16 likewise
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
SIMT_DEVICE float from_half(uint16_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
SIMT_DEVICE uint16_t to_half(float f) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
SIMT_DEVICE float exp2(float x) {  // within 2 ulp; results below 2^-126 are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SIMT_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
SIMT_DEVICE uint64_t bits_of(double x) { return static_cast<uint64_t>(__double_as_longlong(x)); }
SIMT_DEVICE float float_of(uint32_t u) { return __uint_as_float(u); }
SIMT_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
SIMT_DEVICE float smaller(float a, float b) { return fminf(a, b); }  // a NaN loses
SIMT_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
SIMT_DEVICE float log2(float x) { return ::log2f(x); }
SIMT_DEVICE float root(float x) { return __fsqrt_rn(x); }
SIMT_DEVICE double plain_sum(double a, double b) { return __dadd_rn(a, b); }  // never contracted
SIMT_DEVICE double plain_product(double a, double b) { return __dmul_rn(a, b); }

// ---- host

/// What the launches need to know of the current device.
struct Machine {
  int processors = 0;
  size_t shared = 0;  // the most a block may ask for
};
inline cudaError_t machine(Machine* out) {
  int device = 0, shared_bytes = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&out->processors, cudaDevAttrMultiProcessorCount, device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  out->shared = static_cast<size_t>(shared_bytes);
  return e;
}
/// Makes a device the current one; returns the one before.
inline int use_device(int device) noexcept {
  int before = 0;
  if (cudaGetDevice(&before) == cudaSuccess && before != device) cudaSetDevice(device);
  return before;
}
template <class Kernel, class... Arguments>
cudaError_t launch(Kernel kernel, int blocks, int threads, size_t shared_bytes, Stream stream, Arguments... arguments) {
  if (blocks <= 0) return cudaSuccess;
  if (shared_bytes > 48 << 10) {
    const cudaError_t e =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (e != cudaSuccess) return e;
  }
  void* pointers[] = {&arguments...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                          dim3(static_cast<unsigned>(threads)), pointers, shared_bytes, stream);
}
inline const char* describe(cudaError_t e) { return cudaGetErrorString(e); }

}  // namespace simt
#endif
