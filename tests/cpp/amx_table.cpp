// SPDX-License-Identifier: Apache-2.0
// The twin's table: the loops over vectors of 4 as for the baseline, those of pairs too, and pair products on the twin.
#include "amx_table.h"

#include "amx_twin.h"

#define W 4
#define HISAC_PAIRS
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
    k.matmul_pairs = Products<Twin>::matmul;
    k.accumulate_pairs = Products<Twin>::accumulate;
    k.matmul_split = Products<Twin>::matmul_split;
    k.accumulate_split = Products<Twin>::accumulate_split;
    return k;
  }();
  return table;
}

}  // namespace test
