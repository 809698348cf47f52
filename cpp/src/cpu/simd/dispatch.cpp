// SPDX-License-Identifier: Apache-2.0
// The choice of inner loops: the best table that the processor runs, or the one that HISAC_ISA names.
#include <array>
#include <cstdlib>
#include <cstring>

#include "cpu/simd/amx.h"
#include "cpu/simd/kernels.h"
#include "hisac/hisac.h"

namespace hisac {
namespace simd {

int supported(const Kernels** out) noexcept {
  int n = 0;
  out[n++] = &kBaseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    out[n++] = &kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      out[n++] = &kAvx512;
      // Intel has vdpbf16ps too, at less than the rate of FMA
      const bool bf16 = __builtin_cpu_supports("avx512bf16");
      if (bf16 && __builtin_cpu_is("amd")) out[n++] = &kAvx512Bf16;
      if (bf16 && amx_available()) out[n++] = &amx_kernels();
    }
  }
#endif
  return n;
}

namespace {

const Kernels*& chosen() noexcept {
  static const Kernels* table = [] {
    const Kernels* tables[kMostTables];
    const int n = supported(tables);
    if (const char* wanted = std::getenv("HISAC_ISA"))
      for (int i = 0; i < n; ++i)
        if (std::strcmp(tables[i]->name, wanted) == 0) return tables[i];
    return tables[n - 1];
  }();
  return table;
}

}  // namespace

const Kernels& kernels() noexcept { return *chosen(); }

void choose(const Kernels& table) noexcept { chosen() = &table; }

}  // namespace simd

const char* active_isa() noexcept { return simd::kernels().name; }

const char* available_isas() noexcept {
  static const auto names = [] {
    std::array<char, 64> text{};
    const simd::Kernels* tables[simd::kMostTables];
    for (int i = 0, n = simd::supported(tables); i < n; ++i) {
      if (i) std::strcat(text.data(), " ");
      std::strcat(text.data(), tables[i]->name);
    }
    return text;
  }();
  return names.data();
}

}  // namespace hisac
