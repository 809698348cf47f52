// SPDX-License-Identifier: Apache-2.0
// The table of inner loops: all that differs between instruction sets. The loops stand once, in kernels.inl.
//
// Everything works on float32 scratch tiles whose row stride is a multiple of kLanes; columns past m up to the stride
// are padding that may be read and written. Matrices on the right of a product are packed (pack.h). Logits are in
// base 2.
#pragma once
#include "hisac/array.h"

namespace hisac::cpu {

constexpr int kLanes = 16;   // columns are padded to this, whatever the ISA: packed data fits every ISA
constexpr int kRowStep = 8;  // rows of a tile are padded to this
constexpr int kBlock = 64;   // rows a tile of scratch holds

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

/// A natural logit in base 2; finite stays finite, with room to add another.
inline float base2(float x) {
  x *= kLog2e;
  return x < -1.7e38f ? -1.7e38f : x > 1.7e38f ? 1.7e38f : x;
}

constexpr int64_t pad(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

/// One block of route's backward; see route_gradient in kernels.inl.
struct RouteGradient {
  const float* shift;    // [n] bias, less the row's log-sum-exp in agents mode
  const float* row_lse;  // [n] the softmax over agents; null in history mode
  const float* lse;      // [m] of each agent; +inf where it has no mass
  const float* offset;   // [m] dlse - dtoken . token
  const float* rate;     // [m] 2 / tau
  float* d_bias;         // [n] out
  float* row_sum;        // [n] out: sum over agents of the distance gradients
  float* d_raw;          // [m] += sum over rows of dlogit * raw logit
  float* column_sum;     // [m] += sum over rows of the distance gradients
};

struct Kernels {
  const char* name;

  /// z[n, m] = a[n, k] B, B packed [k, m]. Rows of a and z up to the next kRowStep are touched.
  void (*matmul)(int n, int64_t k, int64_t m, const float* a, int64_t lda, const float* packed, float* z, int64_t ldz);
  /// c[m, w] += a[n, m]^T b[n, w]; m and w rounded up to 4 and kLanes.
  void (*accumulate)(int n, int64_t m, int64_t w, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                     int64_t ldc);
  /// Pack B [k, m] from its transpose: row j of `columns` (stride ld) is column j of B.
  void (*pack_columns)(int64_t k, int64_t m, const float* columns, int64_t ld, float* out);
  /// Pack B [k, m] from its rows (stride ld).
  void (*pack_rows)(int64_t k, int64_t m, const float* rows, int64_t ld, float* out);
  /// dst[0, width) = a row of `type`; returns its sum of squares.
  float (*load_row)(const void* src, DType type, int64_t width, float* dst);
  /// row of `type` = scale * src[0, width), rounded to nearest even.
  void (*store_row)(void* dst, DType type, int64_t width, const float* src, float scale);
  /// dst += factor * src
  void (*add_row)(int64_t width, const float* src, float factor, float* dst);

  /// z <- -rate_a max(0, norm_i + norm_a - 2 z): from products to negative scaled square distances.
  void (*distance_logits)(int n, int64_t m, float* z, int64_t ldz, const float* row_norm, const float* norm,
                          const float* rate);
  /// lse_i = log2 sum_a 2^z; -inf for a row of -inf.
  void (*row_lse)(int n, int64_t m, const float* z, int64_t ldz, float* lse);
  /// z <- z + shift_i
  void (*row_shift)(int n, int64_t m, float* z, int64_t ldz, const float* shift);
  /// One step of the online softmax over rows: top' = max(top, max_i z), factor = 2^(top - top'), z <- 2^(z - top'),
  /// mass <- factor mass + sum_i z. Returns whether any factor differs from 1.
  bool (*column_softmax)(int n, int64_t m, float* z, int64_t ldz, float* top, float* mass, float* factor);
  /// raw <- weights, g <- distance gradients, given g = v . dtoken.
  void (*route_gradient)(int n, int64_t m, float* raw, float* g, int64_t ldz, const RouteGradient& p);

  /// z <- softmax over the row of scale z + bias, and its log-sum-exp (base 2); a row without logits is 0, -inf.
  void (*row_softmax)(int n, int64_t m, float* z, int64_t ldz, float scale, const float* bias, float* lse);
  /// The same weights from a known log-sum-exp.
  void (*row_weights)(int n, int64_t m, float* z, int64_t ldz, float scale, const float* bias, const float* lse);
  /// g <- w (g + offset_i); column_sum += sum_i g.
  void (*attend_gradient)(int n, int64_t m, const float* w, float* g, int64_t ldz, const float* offset,
                          float* column_sum);

  /// z <- half - z (half the square distance, less |r|^2 / 2); returns each row's smallest.
  void (*screen)(int n, int64_t m, float* z, int64_t ldz, const float* half, float* smallest);
  /// Columns of one row with z <= threshold (NaN counts), ascending; returns how many.
  int64_t (*survivors)(int64_t m, const float* z, float threshold, int32_t* out);
};

#if defined(__aarch64__)
extern const Kernels kNeon;
#else
extern const Kernels kBaseline;
#endif
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

/// The tables that this processor can run, the best last; returns how many.
constexpr int kMostTables = 3;
int supported(const Kernels** out) noexcept;

/// The loops in use, chosen once per process.
const Kernels& kernels() noexcept;

/// Another choice, for tests that compare tables in one process; no verb may be running.
void choose(const Kernels& table) noexcept;

}  // namespace hisac::cpu
