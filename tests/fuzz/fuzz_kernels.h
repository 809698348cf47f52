// SPDX-License-Identifier: Apache-2.0
// What the parts of the kernel fuzzer share.
#pragma once
#include <algorithm>

#include "amx_table.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/pack.h"
#include "fuzz.h"
#include "near.h"

namespace kernel_fuzz {

using namespace hisac;
using fuzz::Bytes;
using fuzz::decode;
using near::kUlp;
using near::Near;
using simd::Kernels;
using simd::pad;
using test::Guarded;

constexpr float kInf = std::numeric_limits<float>::infinity();

inline std::vector<const Kernels*> all() {
  const Kernels* have[simd::kMostTables];
  std::vector<const Kernels*> out(have, have + simd::supported(have));
  out.push_back(&test::amx_emulation());
  return out;
}

inline int64_t padded_rows(int64_t n) { return (n + simd::kRowStep - 1) / simd::kRowStep * simd::kRowStep; }

/// The same bits, but any NaN for a NaN.
inline bool same(float a, float b) { return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, 4) == 0; }

inline void close(double a, double b, double bound) {
  if (a == b) return;
  if (!(std::fabs(a - b) <= bound)) std::fprintf(stderr, "%.9g, %.9g: apart by more than %.3g\n", a, b, bound);
  CHECK(std::fabs(a - b) <= bound);
}

inline void close(float got, const Near& expected) { close(double(got), expected.value, expected.wrong); }

/// values [rows, width] as [rows, stride], the rest `fill`.
inline std::vector<float> strided(const std::vector<float>& values, int64_t rows, int64_t width, int64_t stride,
                                  float fill = 0) {
  std::vector<float> out(test::size(rows * stride), fill);
  for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i)
    out[test::size(i / width * stride + i % width)] = values[test::size(i)];
  return out;
}

/// Element d of bfloat16 pairs.
inline float half_of(const uint32_t* pairs, int64_t d) {
  return decode(reinterpret_cast<const std::byte*>(pairs) + d * 2, DType::bfloat16);
}

// ---- fuzz_softmax.cpp
void row_sums(Bytes& in);
void route_weights(Bytes& in);
void rows(Bytes& in);
void weighed(Bytes& in);
void gradients(Bytes& in);
void distances(Bytes& in);

}  // namespace kernel_fuzz
