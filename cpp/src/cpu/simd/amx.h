// SPDX-License-Identifier: Apache-2.0
// Products of bfloat16 on AMX tiles, in one pass (bf16) or three (bf16x3, for nearly float32 results).
//
// An element is 32 bits: two bfloat16 neighbours along the contraction, the even one in the low half.
//
//   matmul       z[n, m]  = sum_k a[n, k2] B[k2, m]   B packed as in pack.h, an element in place of each float
//   accumulate   c[w, m] += sum_k v[n2, w] e[n2, m]
//   *_bf16x3     the same of operands x = hi + lo + rest, hi = bf16(x), lo = bf16(x - hi): hi lo + hi hi + lo hi
//
// n, k2, m, n2, w >= 1. a is read in columns [0, k2) and v in [0, w). Rows of a, z and c are touched up to the next
// multiple of kRowStep, columns of e, z and c up to pad(m). No alignment is needed; 64 bytes avoid loads that cross
// cache lines. Where k2 or n2 is a multiple of 16 or of ceil(k2 / 16), all tile steps are of one depth; otherwise a
// second sweep over z or c adds the remainder.
//
// Error, u = 2^-24. One tile step takes d <= 16 pairs: the products of the even and of the odd halves are two chains of
// fused multiply-adds from 0 (the first is exact, d - 1 roundings), the chains' sum rounds once and so does its
// addition to the accumulator (but for the first). Denormal operands and results count as 0. So with s = ceil(k2 / 16)
// steps, sums over the contraction, and up to a factor 1 + 2^-14 for terms in u^2,
//   matmul            |dz| <= (d + s - 1) u sum |a b| + flush
//   accumulate        |dc| <= (d + s) u sum |v e| + s u |c| + flush
//   flush             <= 2^-126 (sum (|a| + |b|) + (2 d + 3) s), as far as the operands have denormals or the sums are
//                        as small
// where a and b are bfloat16 as given. With bf16x3, a rest is at most 2^-17 |x| and a lo at most 2^-8 |x|, so what is
// left out, lo lo' + rest p + (x - rest) rest', is at most (2^-16 + 2^-17 + 2^-17) |x p| = 2^-15 |x p| (attained within
// 5 %, at mantissas just above 1 + 2^-8), and |hi hi'| + |hi lo'| + |lo hi'| <= 1.016 |x p|:
//   matmul_bf16x3      |dz| <= (2^-15 + 1.016 (d + 3 s - 1) u) sum |x p| + 3 flush
//   accumulate_bf16x3  |dc| <= (2^-15 + 1.016 (d + 3 s) u) sum |x p| + 2 u |c| + 3 flush
// (accumulate_bf16x3, for n2 <= 32: it sums 32 pairs from 0 and adds the sum to c once, twice with a second sweep).
//
// Limit. A tile dot of 16 x 16 x 32 multiply-adds takes 16 cycles (512 a cycle) and 52 until its result can be added
// to, a tile load from L1 8, a store 16. 64 rows by a panel of 48 columns and 16 pairs of depth are 12 dots (192
// cycles) and 13 loads (104): two blocks of 2 x 2 tiles, 4 loads for 4 dots each, and one of 4 x 1, 5 for 4. In bf16x3
// they are 36 dots (576) and 30 loads (240): 8 loads for 12 dots, and 14 for 12. Each block keeps 4 chains of dots, 64
// cycles, which cover the latency of a dot; loads are covered while tiles come from L1. 32 rows or fewer leave blocks
// of 2 chains.
#pragma once
#include "cpu/simd/kernels.h"

namespace hisac::simd {

/// The order matters: xgetbv faults without OSXSAVE, and the system is asked for permission only where AMX can be used.
template <class Machine>
bool amx_permitted() {
  constexpr uint32_t kBf16 = 1u << 22, kTile = 1u << 24, kOsxsave = 1u << 27;
  constexpr uint64_t kTileState = uint64_t{3} << 17;  // configuration and data
  const uint32_t have = Machine::leaf7_edx();
  return (have & kBf16) && (have & kTile) && (Machine::leaf1_ecx() & kOsxsave) &&
         (Machine::xcr0() & kTileState) == kTileState && Machine::request();
}

/// Whether this process may use amx_kernels(): the processor has AMX, the system saves the tiles, and it gave
/// permission when asked. Asks once per process.
bool amx_available() noexcept;

}  // namespace hisac::simd
