// SPDX-License-Identifier: Apache-2.0
// The table of inner loops: all that differs between instruction sets. The loops are written once, in kernels.inl.
//
// The loops work on float32 tiles whose row stride is a multiple of kLanes. Columns past m up to the stride are
// padding, which a loop may read and write. Matrices on the right of a product are packed (pack.h). Logits are in
// base 2.
#pragma once
#include <utility>

#include "hisac/array.h"

namespace hisac::simd {

constexpr int kLanes = 16;   // columns are padded to this, whatever the ISA: packed data fits every ISA
constexpr int kRowStep = 8;  // rows of a tile are padded to this
constexpr int kBlock = 64;   // rows a tile of scratch holds

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

/// A natural logit in base 2. A finite x gives a result so far from overflow that the sum of two is finite.
inline float base2(float x) {
  x *= kLog2e;
  return x < -1.7e38f ? -1.7e38f : x > 1.7e38f ? 1.7e38f : x;
}

/// 32-bit elements that hold n elements of bfloat16.
constexpr int64_t pairs_of(int64_t n) { return (n + 1) / 2; }

constexpr int64_t pad(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

/// A queue of memory that later steps read. A product prefetches it line by line while it computes.
struct Prefetcher {
  static constexpr int kMaxSpans = 2 * kBlock + 3, kLine = 64;
  struct Span {
    const std::byte *line, *end;  // the next line to prefetch
  } span[kMaxSpans];
  int spans = 0, current = 0;   // current: the first span that is not prefetched yet
  int64_t lines = 0;            // of all spans
  int64_t lines_per_block = 0;  // lines to prefetch per kBlock * kLanes elements of a product

  void clear() noexcept {
    spans = current = 0;
    lines = 0;
  }
  /// Queues the bytes [begin, end) of data.
  void add(const void* data, int64_t begin, int64_t end) noexcept {
    if (!data || begin >= end || spans == kMaxSpans) return;
    const std::byte* const first = static_cast<const std::byte*>(data) + begin;
    span[spans++] = {first - reinterpret_cast<uintptr_t>(first) % kLine, first + (end - begin)};
    lines += (end - begin) / kLine + 1;
  }
  /// Distributes the lines evenly over products of n rows and m columns in all.
  void distribute(int n, int64_t m) noexcept { lines_per_block = lines * kBlock * kLanes / (n * pad(m)) + 1; }
  /// Prefetches the lines that belong to so many elements of a product.
  __attribute__((always_inline)) void prefetch(int64_t elements) noexcept {
    for (int64_t due = lines_per_block * elements / (kBlock * kLanes) + 1; due > 0 && current < spans; --due) {
      __builtin_prefetch(span[current].line, 0, 2);
      span[current].line += kLine;
      if (span[current].line >= span[current].end) ++current;
    }
  }
};

/// One block of route's forward: the inputs and running sums of the online softmax.
struct RouteWeights {
  const float* row_norm;  // [n] |x|^2; null: z holds logits
  const float* shift;     // [n] bias, less the row's log-sum-exp in agents mode
  const float* norm;      // [m] |p|^2; padding +inf
  const float* rate;      // [m] log2(e) / tau
  float* max_logit;       // [m] what is subtracted from logits; may lag the maximum by 12; -inf before the first logit
  float* denominator;     // [m] sum of the weights 2^(logit - max_logit)
  float* factor;          // [m] out: 2^(old max_logit - new max_logit), which the sums so far are to be multiplied by
};

/// One block of route's backward; see route_gradient in kernels_softmax.inl.
struct RouteGradient {
  const float* shift;    // [n] bias, less the row's log-sum-exp in agents mode
  const float* row_lse;  // [n] the softmax over agents; null in history mode
  const float* lse;      // [m] of each agent; +inf where its denominator is 0
  const float* offset;   // [m] dlse - dtoken . token
  const float* rate;     // [m] 2 / tau
  float* d_bias;         // [n] out
  float* row_sum;        // [n] out: sum over agents of the distance gradients
  float* d_raw;          // [m] += sum over rows of dlogit * raw logit
  float* column_sum;     // [m] += sum over rows of the distance gradients
};

/// Column j's score half_j - z_j errs by at most error norm_j. The threshold first falls to the smallest upper bound of
/// a score + slack. A column survives if the lower bound of its score is not above the threshold. A column of infinite
/// half never survives.
struct Screen {
  const float *half, *norm;  // [m], padded with +inf and 0
  float error, slack;
  float threshold;  // in and out
  float low;        // out: the smallest lower bound of a score
};

/// The sum of squares of the elements before rounding, and that of the rounding errors.
struct Rounded {
  float squares, errors;
};

struct Kernels {
  const char* name = nullptr;

  /// z[n, m] = a[n, k] B, B packed [k, m]. Rows of a and z up to the next multiple of kRowStep are touched. prefetcher
  /// may be null.
  void (*matmul)(int n, int64_t k, int64_t m, const float* a, int64_t lda, const float* packed, float* z, int64_t ldz,
                 Prefetcher* prefetcher) = nullptr;
  /// c[m, w] += a[n, m]^T b[n, w]; m and w rounded up to kRowStep and kLanes.
  void (*accumulate)(int n, int64_t m, int64_t w, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                     int64_t ldc) = nullptr;
  /// Pack B [k, m] from its transpose: row j of `columns` (stride ld) is column j of B.
  void (*pack_columns)(int64_t k, int64_t m, const float* columns, int64_t ld, float* out) = nullptr;
  /// Pack B [k, m] from its rows (stride ld).
  void (*pack_rows)(int64_t k, int64_t m, const float* rows, int64_t ld, float* out) = nullptr;
  /// dst[0, width) = a row of `type`; returns its sum of squares.
  float (*load_row)(const void* src, DType type, int64_t width, float* dst) = nullptr;
  /// The same of scale * src.
  float (*load_int8)(const int8_t* src, float scale, int64_t width, float* dst) = nullptr;
  /// row of `type` = scale * src[0, width), rounded to nearest even.
  void (*store_row)(void* dst, DType type, int64_t width, const float* src, float scale) = nullptr;
  /// dst[c, r] = src[r, c] of 16 columns c and w rows r, w rounded up to kLanes.
  void (*transpose)(int64_t w, const float* src, int64_t ld, float* dst, int64_t ldd) = nullptr;
  /// row -= origin; returns the sum of squares of what is left.
  float (*subtract_row)(int64_t width, const float* origin, float* row) = nullptr;
  /// dst = factor * dst + by * src
  void (*blend_row)(int64_t width, float factor, const float* src, float by, float* dst) = nullptr;
  /// dst += factor * src
  void (*add_row)(int64_t width, const float* src, float factor, float* dst) = nullptr;

  /// z <- -rate_a max(0, norm_i + norm_a - 2 z): from products to negative scaled square distances.
  void (*distance_logits)(int n, int64_t m, float* z, int64_t ldz, const float* row_norm, const float* norm,
                          const float* rate) = nullptr;
  /// lse_i = log2 sum_a 2^z; -inf for a row of -inf.
  void (*row_lse)(int n, int64_t m, const float* z, int64_t ldz, float* lse) = nullptr;
  /// One step of the online softmax over rows: e = 2^(logit + shift_i - max_logit'), denominator <- factor denominator
  /// + sum_i e. max_logit' stays max_logit until a logit of its vector exceeds it by 12. Returns whether any factor
  /// differs from 1; factor is set only then.
  bool (*route_weights)(int n, int64_t m, const float* z, int64_t ldz, const RouteWeights& p, float* e,
                        int64_t lde) = nullptr;
  /// raw <- weights, g <- distance gradients, given g = v . dtoken.
  void (*route_gradient)(int n, int64_t m, float* raw, float* g, int64_t ldz, const RouteGradient& p) = nullptr;

  /// z <- softmax over the row of scale z + bias, and its log-sum-exp (base 2); a row without logits is 0, -inf.
  void (*row_softmax)(int n, int64_t m, float* z, int64_t ldz, float scale, const float* bias, float* lse) = nullptr;
  /// The same weights from a known log-sum-exp.
  void (*row_weights)(int n, int64_t m, float* z, int64_t ldz, float scale, const float* bias,
                      const float* lse) = nullptr;
  /// g <- w (g + offset_i); column_sum += sum_i g.
  void (*attend_gradient)(int n, int64_t m, const float* w, float* g, int64_t ldz, const float* offset,
                          float* column_sum) = nullptr;

  /// The largest of x [n], which has no NaN; -inf for none. x may be read up to kLanes elements further.
  float (*largest)(int64_t n, const float* x) = nullptr;
  /// sum [width] = sum_i w_i rows_i over n <= kBlock rows (stride ld), w_i = scale e^(bias_i - shift); returns sum_i
  /// w_i. A row whose bias is -inf is left out, whatever it holds. bias may be read up to kLanes elements further.
  float (*weigh_rows)(int n, int64_t width, const float* bias, float shift, float scale, const float* rows, int64_t ld,
                      float* sum) = nullptr;

  /// Columns of one row of products that may be the nearest, in any order; returns how many. See Screen.
  int64_t (*screen)(int64_t m, const float* z, Screen& row, int32_t* out) = nullptr;
  /// sum over d of (a_d - b_d)^2 in float64, in any order.
  double (*square_distance)(int64_t width, const float* a, const float* b) = nullptr;
  /// The k-th smallest of d [m], which are 0 or more, k of them finite; d is padded with +inf.
  float (*kth_smallest)(int64_t m, const float* d, int64_t k) = nullptr;
  /// out = the columns j < m of d_j <= most, ascending; returns how many. NaN is none.
  int64_t (*columns_below)(int64_t m, const float* d, float most, int32_t* out) = nullptr;

  // Products of bfloat16. A 32-bit element holds two consecutive elements of the contraction, the even one in the low
  // half. These are null where the ISA does not run them faster than float32. Denormals count as zero. Rounding is to
  // nearest: ties of weights go away from zero, all others to even.
  /// z[n, m] = a[n, k] B as matmul does, k = 2 k2.
  void (*matmul_bf16)(int n, int64_t k2, int64_t m, const uint32_t* a, int64_t lda, const uint32_t* packed, float* z,
                      int64_t ldz, Prefetcher* prefetcher) = nullptr;
  /// Pack B [k, m] in bfloat16, as pack_columns does; an odd k gets a zero.
  void (*pack_bf16)(int64_t k, int64_t m, const float* columns, int64_t ld, uint32_t* out) = nullptr;
  /// c[w, m] += a[n, w]^T e[n, m] as accumulate does, n = 2 n2: an element of a or e holds a column's rows 2 i and 2 i
  /// + 1.
  void (*accumulate_bf16)(int n2, int64_t w, int64_t m, const uint32_t* a, int64_t lda, const uint32_t* e, int64_t lde,
                          float* c, int64_t ldc) = nullptr;
  /// As route_weights; e_hi [(n + 1) / 2, m] holds rounded weights of two rows each, e_lo, which may be null, the lo of
  /// bf16x3. denominator is the sum of what they hold. An odd n gets a row of zeros.
  bool (*route_weights_bf16)(int n, int64_t m, const float* z, int64_t ldz, const RouteWeights& p, uint32_t* e_hi,
                             uint32_t* e_lo, int64_t lde) = nullptr;
  /// dst [pad(width)] = two rows, rounded, in the lower and upper halves; odd may be null: zeros.
  void (*pair_rows_bf16)(int64_t width, const float* even, const float* odd, uint32_t* dst) = nullptr;
  /// dst [width] = src - bf16(src), rounded as round_bf16 rounds: the lo of bf16x3 before its own rounding.
  void (*bf16_remainder)(int64_t width, const float* src, float* dst) = nullptr;
  /// dst [(width + 1) / 2] = src [width] - shift, rounded; shift may be null: zeros.
  Rounded (*round_bf16)(int64_t width, const float* src, const float* shift, uint32_t* dst) = nullptr;

  // bf16x3: operands are sums hi + lo of two bfloat16, for nearly float32 results (the bound: amx.h). These are null
  // where the ISA does not run three such products faster than one of float32.
  void (*matmul_bf16x3)(int n, int64_t k2, int64_t m, const uint32_t* a_hi, const uint32_t* a_lo, int64_t lda,
                        const uint32_t* packed_hi, const uint32_t* packed_lo, float* z, int64_t ldz,
                        Prefetcher* prefetcher) = nullptr;
  void (*accumulate_bf16x3)(int n2, int64_t w, int64_t m, const uint32_t* a_hi, const uint32_t* a_lo, int64_t lda,
                            const uint32_t* e_hi, const uint32_t* e_lo, int64_t lde, float* c, int64_t ldc) = nullptr;
};

extern const Kernels kBaseline;  // what the compiler targets
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;
/// kAvx512Bf16 with the bfloat16 products of the AMX unit (amx.h); only where amx_available().
const Kernels& amx_kernels() noexcept;
#endif

/// Writes the tables that this processor can run, the best last; returns their number.
constexpr int kMostTables = 5;
int supported(const Kernels** out) noexcept;

/// The loops in use, chosen once per process.
const Kernels& kernels() noexcept;

/// Chooses another table, for tests that compare tables in one process. No verb may be running.
void choose(const Kernels& table) noexcept;

}  // namespace hisac::simd
