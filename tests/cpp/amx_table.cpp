// SPDX-License-Identifier: Apache-2.0
// The twin's table: the loops of the baseline, pair products on the twin, and by plain arithmetic the conversions that
// have an instruction elsewhere.
#include "amx_table.h"

#include "amx_twin.h"

#define W 4
#define HISAC_PAIRS
#define HISAC_ISA_TABLE kTwinLoops
#define HISAC_ISA_NAME "amx-twin"
namespace hisac::cpu {
extern const Kernels kTwinLoops;
}
#include "cpu/kernels.inl"

namespace test {
namespace {

uint32_t rounded(float x) {
  const uint32_t bits = hisac::cpu::bits_of(hisac::cpu::Twin::flush(x));
  return x != x ? bits >> 16 | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

float round_pairs(int64_t width, const float* src, uint32_t* dst) {
  float squares = 0;
  for (int64_t d = 0; d < width; ++d) {
    const uint32_t half = rounded(src[d]);
    dst[d / 2] = d % 2 ? dst[d / 2] | half << 16 : half;
    const float error = src[d] - hisac::cpu::float_of(half << 16);
    squares += error * error;
  }
  return squares;
}

void pair_rows(int64_t width, const float* even, const float* odd, uint32_t* dst) {
  for (int64_t d = 0; d < width; ++d) dst[d] = rounded(even[d]) | (odd ? rounded(odd[d]) << 16 : 0);
}

void pack_pairs(int64_t k, int64_t m, const float* columns, int64_t ld, uint32_t* out) {
  hisac::cpu::for_panels(m, [&](int64_t first, int64_t width) {
    for (int64_t d = 0; d < k; d += 2)
      for (int64_t j = first; j < first + width; ++j) {
        const float* const x = columns + j * ld + d;
        *out++ = j < m ? rounded(x[0]) | (d + 1 < k ? rounded(x[1]) << 16 : 0) : 0;
      }
  });
}

}  // namespace

const hisac::cpu::Kernels& amx_twin() noexcept {
  static const hisac::cpu::Kernels table = [] {
    using hisac::cpu::Products, hisac::cpu::Twin;
    hisac::cpu::Kernels k = hisac::cpu::kTwinLoops;
    k.matmul_pairs = Products<Twin>::matmul;
    k.accumulate_pairs = Products<Twin>::accumulate;
    k.pack_pairs = pack_pairs;
    k.pair_rows = pair_rows;
    k.round_pairs = round_pairs;
    return k;
  }();
  return table;
}

}  // namespace test
