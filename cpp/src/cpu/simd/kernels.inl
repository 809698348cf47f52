// SPDX-License-Identifier: Apache-2.0
// The inner loops, once, over a vector of W floats. Each isa_*.cpp defines W and includes this file, all but
// isa_baseline.cpp inside a target region. Everything is in an unnamed namespace and calls nothing of std::. So no
// instruction of such a region can reach a weak symbol that another translation unit may pick
// (tests/python/test_package.py checks that).
//
// Products a * b + c are contracted to FMA where the ISA has it (-ffp-contract=fast for these files alone).

namespace hisac::simd {
namespace {

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef double vd __attribute__((vector_size(W * 4)));
typedef uint32_t vu_loose __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef float vf_loose __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef float vf_half __attribute__((vector_size(W * 2), aligned(4), may_alias));
typedef uint16_t vh_loose __attribute__((vector_size(W * 2), aligned(2), may_alias));

#define HISAC_INLINE static inline __attribute__((always_inline))

constexpr float kInfinity = __builtin_huge_valf();
constexpr int kRows = W == 16 ? 8 : 4;  // rows of a product's register tile, and its columns in vectors
#if defined(__aarch64__)
constexpr int kAcross = 4;  // of 32 registers GCC spills with tiles of 8 x 3 and 4 x 6
#else
constexpr int kAcross = 3;
#endif

HISAC_INLINE vf splat(float x) { return x - vf{}; }  // a broadcast; vf{} + x costs an addition
HISAC_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_loose*>(p); }
HISAC_INLINE vu load(const uint32_t* p) { return *reinterpret_cast<const vu_loose*>(p); }
HISAC_INLINE vf_half load_half(const float* p) { return *reinterpret_cast<const vf_half*>(p); }
HISAC_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_loose*>(p) = x; }

/// The lanes of the next vector of a row of which `left` elements remain.
HISAC_INLINE size_t lanes_of(int64_t left) { return static_cast<size_t>(left < W ? left : W); }

/// The first n <= W elements at p, and zeros; nothing else is read.
HISAC_INLINE vf load_first(const float* p, size_t n) {
  if (n == W) return load(p);
  vf x = {};
  __builtin_memcpy(&x, p, n * sizeof *p);
  return x;
}
HISAC_INLINE vh load_first(const uint16_t* p, size_t n) {
  if (n == W) return *reinterpret_cast<const vh_loose*>(p);
  vh x = {};
  __builtin_memcpy(&x, p, n * sizeof *p);
  return x;
}
/// Writes the first n <= W elements.
HISAC_INLINE void store_first(float* p, vf x, size_t n) {
  if (n == W) return store(p, x);
  __builtin_memcpy(p, &x, n * sizeof *p);
}
HISAC_INLINE void store_first(uint16_t* p, vh x, size_t n) {
  if (n == W)
    *reinterpret_cast<vh_loose*>(p) = x;
  else
    __builtin_memcpy(p, &x, n * sizeof *p);
}

/// The larger or the smaller; b where a is NaN. GCC makes a compare and a blend of a > b ? a : b, of more latency.
#if defined(__x86_64__) && W > 4
HISAC_INLINE vf larger(vf a, vf b) {
  vf out;
  __asm__("vmaxps %2, %1, %0" : "=v"(out) : "v"(a), "v"(b));
  return out;
}
HISAC_INLINE vf smaller(vf a, vf b) {
  vf out;
  __asm__("vminps %2, %1, %0" : "=v"(out) : "v"(a), "v"(b));
  return out;
}
#else
HISAC_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
HISAC_INLINE vf smaller(vf a, vf b) { return a < b ? a : b; }
#endif

template <class V>
constexpr int kLanesOf = static_cast<int>(sizeof(V) / sizeof(V{}[0]));
/// 0, 1, .. of the lanes of V.
template <class V>
using LanesOf = std::make_integer_sequence<int, kLanesOf<V>>;

/// Lanes i and i ^ step swap.
template <int step, class V, int... I>
HISAC_INLINE V crossed(V x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I ^ step)...);
}

/// op over all lanes, in every lane.
template <int step, class V, class Op>
HISAC_INLINE V folded(V x, Op op) {
  x = op(x, crossed<step>(x, LanesOf<V>()));
  if constexpr (step > 1) x = folded<step / 2>(x, op);
  return x;
}

template <class V>
HISAC_INLINE auto sum_of(V x) {
  return folded<kLanesOf<V> / 2>(x, [](V a, V b) __attribute__((always_inline)) { return a + b; })[0];
}

HISAC_INLINE float largest_of(vf x) { return folded<W / 2>(x, larger)[0]; }

/// 2^x within 2 ulp for x in [-126, 127]; 0 below (and for NaN), clamped above. Few steps depend on one another, so
/// that the processor overlaps several of these.
HISAC_INLINE vf exp2v(vf x) {
  x = smaller(larger(x, splat(-127.f)), splat(127.f));
  constexpr float kRound = 12582912.f + 127.f;  // leaves 127 + round(x), a float's exponent, in the lowest bits
  const vf n = x + kRound;
  const vf r = x - (n - kRound), r2 = r * r;
  const vf low = r * 6.931472028e-1f + 1.f, middle = r * 5.550332548e-2f + 2.402264791e-1f;
  const vf high = r * 1.339887440e-3f + 9.618437357e-3f + r2 * 1.535336188e-4f;
  return ((high * r2 + middle) * r2 + low) * (vf)((vi)n << 23);
}

// clang-format off: each builds on those before it
#include "cpu/simd/kernels_product.inl"
#include "cpu/simd/kernels_rows.inl"
#include "cpu/simd/kernels_softmax.inl"
#include "cpu/simd/kernels_nearest.inl"
// clang-format on

#undef HISAC_INLINE

}  // namespace

constexpr Kernels HISAC_ISA_TABLE = [] {
  Kernels k;
  k.name = HISAC_ISA_NAME;
  k.matmul = matmul<float>;
  k.accumulate = accumulate<float>;
  k.pack_columns = pack_columns;
  k.pack_rows = pack_rows;
  k.load_row = load_row;
  k.load_int8 = load_int8;
  k.store_row = store_row;
  k.transpose = transpose;
  k.subtract_row = subtract_row;
  k.blend_row = blend_row;
  k.add_row = add_row;
  k.distance_logits = distance_logits;
  k.row_lse = row_lse;
  k.route_weights = route_weights;
  k.route_gradient = route_gradient;
  k.row_softmax = row_softmax;
  k.row_weights = row_weights;
  k.attend_gradient = attend_gradient;
  k.largest = largest;
  k.weigh_rows = weigh_rows;
  k.screen = screen;
  k.square_distance = square_distance;
  k.kth_smallest = kth_smallest;
  k.columns_below = columns_below;
#if defined(HISAC_BF16)
  k.matmul_bf16 = matmul<uint32_t>;
  k.pack_bf16 = pack_bf16;
  k.accumulate_bf16 = accumulate<uint32_t>;
  k.route_weights_bf16 = route_weights_bf16;
  k.pair_rows_bf16 = pair_rows_bf16;
  k.bf16_remainder = bf16_remainder;
  k.round_bf16 = round_bf16;
#endif
  return k;
}();

}  // namespace hisac::simd
