// SPDX-License-Identifier: Apache-2.0
// The table of the AMX emulation: the loops over vectors of 4 as for the baseline, those of bfloat16 too, and products
// of bfloat16 on emulated tiles.
#include "amx_table.h"

#include "amx_emulation.h"

#define W 4
#define HISAC_BF16
#define HISAC_ISA_TABLE kEmulationLoops
#define HISAC_ISA_NAME "amx-emulation"
namespace hisac::simd {
extern const Kernels kEmulationLoops;
}
#include "cpu/simd/kernels.inl"

namespace test {
const hisac::simd::Kernels& amx_emulation() noexcept {
  static const hisac::simd::Kernels table =
      hisac::simd::Products<hisac::simd::EmulatedTiles>::replaced_in(hisac::simd::kEmulationLoops);
  return table;
}

}  // namespace test
