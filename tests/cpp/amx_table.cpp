// SPDX-License-Identifier: Apache-2.0
// The twin's table: the loops over vectors of 4 as for the baseline, those of pairs too, and pair products on the twin.
#include "amx_table.h"

#include "amx_twin.h"

#define W 4
#define HISAC_BF16
#define HISAC_ISA_TABLE kTwinLoops
#define HISAC_ISA_NAME "amx-twin"
namespace hisac::simd {
extern const Kernels kTwinLoops;
}
#include "cpu/simd/kernels.inl"

namespace test {
const hisac::simd::Kernels& amx_twin() noexcept {
  static const hisac::simd::Kernels table = [] {
    using hisac::simd::Products, hisac::simd::Twin;
    hisac::simd::Kernels k = hisac::simd::kTwinLoops;
    k.matmul_bf16 = Products<Twin>::matmul;
    k.accumulate_bf16 = Products<Twin>::accumulate;
    k.matmul_bf16x3 = Products<Twin>::matmul_bf16x3;
    k.accumulate_bf16x3 = Products<Twin>::accumulate_bf16x3;
    return k;
  }();
  return table;
}

}  // namespace test
