// SPDX-License-Identifier: Apache-2.0
// What the kernels of route read: float32 blocks of present rows, each with a norm and a bias, and panels of present
// agents, packed.
#pragma once
#include <algorithm>
#include <cfloat>

#include "base/arena.h"
#include "cpu/simd/kernels.h"
#include "hisac/route.h"

namespace hisac::cpu {

/// The operands of products. bf16: x and prototypes are rounded to bfloat16, and their norms are those of the rounded.
/// bf16x3: each is a sum hi + lo of two bfloat16, multiplied in three products (amx.h).
enum class Operands { float32, bf16, bf16x3 };

/// Elements of bfloat16; of bf16x3 both parts.
struct Bf16Operand {
  uint32_t *hi = nullptr, *lo = nullptr;

  void carve(Arena& arena, int64_t size, Operands operands) noexcept {
    if (operands != Operands::float32) hi = arena.take<uint32_t>(size);
    if (operands == Operands::bf16x3) lo = arena.take<uint32_t>(size);
  }
};

/// The operands of route on this ISA: float32 where the ISA has no faster ones, or where bf16x3 is not allowed.
Operands operands_of(const RouteParams& params, bool allow_bf16x3) noexcept;

/// Up to kBlock present rows of one user.
struct Block {
  int n = 0;
  float* x = nullptr;           // [kBlock, pad(D)] x less the origin; padding columns stay zero
  float* values = nullptr;      // [kBlock, pad(columns)] v, and behind it x itself, as far as they are averaged
  float* norm = nullptr;        // [kBlock] |x|^2 + spread
  float* bias = nullptr;        // [kBlock] natural logarithm
  Bf16Operand x_bf16;           // [kBlock, pad((D + 1) / 2)] x in bfloat16
  float* remainder = nullptr;   // [D] scratch: what rounding to bfloat16 leaves of a row
  int64_t* row = nullptr;       // [kBlock] the row in x and v
  simd::Prefetcher prefetcher;  // the rows after this block
  bool last = false;            // the last block of its user

  /// columns: of the values.
  void carve(Arena& arena, int64_t width, int64_t columns, Operands operands) noexcept;
  void clear_padding(int64_t width, int64_t columns) noexcept;
};

/// The present agents of one user, packed for products with x. Distances do not depend on the origin, but |x|^2 + |p|^2
/// - 2 x . p loses the digits of large terms. So, unless products round to bfloat16, prototypes and rows are taken from
/// an origin among them: in each dimension the median of the first five present prototypes (of the first where there
/// are fewer), which one far prototype does not move.
struct AgentPanel {
  int64_t m = 0;
  int32_t* index = nullptr;              // [M] the agent of a column
  float* packed = nullptr;               // [D, m]
  Bf16Operand packed_bf16;               // [(D + 1) / 2, m] in place of packed
  uint32_t* rounding_scratch = nullptr;  // [(D + 1) / 2]; null: prototypes are not rounded
  float* remainders = nullptr;           // [M, D] of bf16x3: what rounding leaves of rows
  float* origin = nullptr;               // [D]; null: zero
  float* rows = nullptr;                 // [m, D] the present prototypes, less the origin
  float* norm = nullptr;                 // [pad(M)] |p|^2; padding: +inf, so that its logits are -inf
  float* rate = nullptr;                 // [pad(M)] log2(e) / tau

  void carve(Arena& arena, int64_t agents, int64_t width, Operands operands, bool round_to_bf16) noexcept;
  void load(const RouteParams& params, const float* prototypes, int64_t width, int64_t count) noexcept;
  /// Takes n of another panel's columns.
  void select(const AgentPanel& all, const int32_t* columns, int64_t n, int64_t width) noexcept;

 private:
  void pad_and_pack(int64_t width) noexcept;
};

/// The present agents of user b by count alone, clamped to [0, M].
inline int64_t count_of(const RouteAgents& agents, int64_t b) noexcept {
  const int64_t m = agents.prototypes.shape[1];
  return agents.count ? std::clamp<int64_t>(agents.count.data[b], 0, m) : m;
}

inline float temperature_of(const RouteParams& params, int64_t agent) noexcept {
  return params.temperature.data[params.temperature.shape[0] == 1 ? 0 : agent];
}

/// The shift of a row's base-2 logits, which are 0 or less. It is finite, so that no logit becomes +inf or NaN.
inline float row_shift_of(float bias, float row_lse) noexcept { return std::min(simd::base2(bias) - row_lse, FLT_MAX); }

}  // namespace hisac::cpu
