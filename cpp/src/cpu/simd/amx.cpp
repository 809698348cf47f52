// SPDX-License-Identifier: Apache-2.0
// The bfloat16 products on real tiles, and whether this process may use them.
#include "cpu/simd/amx.h"

#include "cpu/simd/kernels.h"
#include "cpu/simd/pack.h"
#include "cpu/simd/target.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

HISAC_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include "cpu/simd/amx.inl"
namespace hisac::simd {

const Kernels& amx_kernels() noexcept {
  static const Kernels table = [] {
    Kernels k = Products<Hardware>::replaced_in(kAvx512Bf16);
    k.name = "amx";
    return k;
  }();
  return table;
}

}  // namespace hisac::simd
HISAC_TARGET_END

namespace hisac::simd {
namespace {

struct Machine {
  static uint32_t leaf1_ecx() {
    uint32_t a, b, c = 0, d;
    return __get_cpuid(1, &a, &b, &c, &d) ? c : 0;
  }
  static uint32_t leaf7_edx() {
    uint32_t a, b, c, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) ? d : 0;
  }
  static uint64_t xcr0() {
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t{high} << 32 | low;
  }
  static bool request() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, the state component
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
  }
};

}  // namespace

bool amx_available() noexcept {
  static const bool permitted = amx_permitted<Machine>();
  return permitted;
}

}  // namespace hisac::simd
#else
bool hisac::simd::amx_available() noexcept { return false; }
#endif
