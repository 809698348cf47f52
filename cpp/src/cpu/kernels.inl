// SPDX-License-Identifier: Apache-2.0
// The inner loops, once, over a vector of W floats; included by isa_*.cpp inside a target region, which defines W.
// Everything is in an unnamed namespace and uses nothing from std::, so no instruction of this region can reach a weak
// symbol that another translation unit may pick (tests/test_layout.py looks).
//
// Products a * b + c are contracted to FMA where the ISA has it (-ffp-contract=fast for these files alone).

namespace hisac::cpu {
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

template <int... I>
struct Lanes {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using lanes = Lanes<I...>;
};

/// Lanes i and i ^ step change places.
template <int step, class V, int... I>
HISAC_INLINE V crossed(V x, Lanes<I...>) {
  return __builtin_shufflevector(x, x, (I ^ step)...);
}

/// op over all lanes, in every lane.
template <int step, class V, class Op>
HISAC_INLINE V folded(V x, Op op) {
  x = op(x, crossed<step>(x, typename Count<static_cast<int>(sizeof(V) / sizeof(x[0]))>::lanes()));
  if constexpr (step > 1) x = folded<step / 2>(x, op);
  return x;
}

template <class V>
HISAC_INLINE auto sum_of(V x) {
  return folded<static_cast<int>(sizeof(V) / sizeof(x[0]) / 2)>(
      x, [](V a, V b) __attribute__((always_inline)) { return a + b; })[0];
}

HISAC_INLINE float largest_of(vf x) { return folded<W / 2>(x, larger)[0]; }

/// 2^x within 2 ulp for x in [-126, 127]; 0 below (and for NaN), clamped above. Few dependent steps: the processor
/// keeps several of these going at once.
HISAC_INLINE vf exp2v(vf x) {
  x = smaller(larger(x, splat(-127.f)), splat(127.f));
  constexpr float kRound = 12582912.f + 127.f;  // leaves 127 + round(x), a float's exponent, in the lowest bits
  const vf n = x + kRound;
  const vf r = x - (n - kRound), r2 = r * r;
  const vf low = r * 6.931472028e-1f + 1.f, middle = r * 5.550332548e-2f + 2.402264791e-1f;
  const vf high = r * 1.339887440e-3f + 9.618437357e-3f + r2 * 1.535336188e-4f;
  return ((high * r2 + middle) * r2 + low) * (vf)((vi)n << 23);
}

// ---- products; the elements are floats, or pairs of bfloat16 where the ISA multiplies those

/// Vectors of the next tile where `left` remain: not one left alone.
constexpr int64_t tile_vectors(int64_t left) { return left <= kAcross ? left : left == kAcross + 1 ? 2 : kAcross; }

HISAC_INLINE void multiply_add(vf& acc, float x, vf y) { acc += splat(x) * y; }
#if defined(HISAC_PAIRS)
HISAC_INLINE void multiply_add(vf& acc, uint32_t x, vu y) {
#if W == 16  // the builtin's types differ between compilers
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(y), "v"(x - vu{}));
#else  // in tests, where no processor needs to have it
  const vu both = x - vu{};
  acc += (vf)(both << 16) * (vf)(y << 16) + (vf)(both & 0xffff0000u) * (vf)(y & 0xffff0000u);
#endif
}
#endif

template <int R, int V, class T>
HISAC_INLINE void matmul_tile(int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* z, int64_t ldz) {
  vf acc[R][V] = {};
  for (int64_t d = 0; d < k; ++d) {
    decltype(load(b)) column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = load(b + d * ldb + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) multiply_add(acc[r][v], a[r * lda + d], column[v]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(z + r * ldz + v * W, acc[r][v]);
}

template <class T>
HISAC_INLINE void product(int n, int64_t k, int64_t m, const T* a, int64_t lda, const T* packed, float* z, int64_t ldz,
                          Ahead* ahead) {
  for (int64_t left = pad(m) / kLanes; left > 0;) {
    const int64_t group = panel_group(left);
    left -= group;
    const int64_t width = group * kLanes;
    for (int64_t at = 0; at < width;) {
      const int64_t take = tile_vectors((width - at) / W);
      for (int i = 0; i < n; i += kRows) {
        if (ahead) ahead->fetch(kRows * take * W);
        const T* x = a + i * lda;
        float* out = z + i * ldz + at;
        if (kAcross == 4 && take == 4) matmul_tile<kRows, 4>(k, x, lda, packed + at, width, out, ldz);
        if (take == 3) matmul_tile<kRows, 3>(k, x, lda, packed + at, width, out, ldz);
        if (take == 2) matmul_tile<kRows, 2>(k, x, lda, packed + at, width, out, ldz);
        if (take == 1) matmul_tile<kRows, 1>(k, x, lda, packed + at, width, out, ldz);
      }
      at += take * W;
    }
    packed += k * width;
    z += width;
  }
}

static void matmul(int n, int64_t k, int64_t m, const float* a, int64_t lda, const float* packed, float* z, int64_t ldz,
                   Ahead* ahead) {
  product(n, k, m, a, lda, packed, z, ldz, ahead);
}

#if defined(HISAC_PAIRS)
static void matmul_pairs(int n, int64_t k2, int64_t m, const uint32_t* a, int64_t lda, const uint32_t* packed, float* z,
                         int64_t ldz, Ahead* ahead) {
  product(n, k2, m, a, lda, packed, z, ldz, ahead);
}
#endif

/// The block's sum is made apart and added once, so that a tile of equal rows does not lose its last digits one by one.
template <int R, int V, class T>
HISAC_INLINE void accumulate_tile(int n, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc) {
  vf acc[R][V] = {};
  for (int i = 0; i < n; ++i) {
    decltype(load(b)) row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load(b + i * ldb + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) multiply_add(acc[r][v], a[i * lda + r], row[v]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + r * ldc + v * W, load(c + r * ldc + v * W) + acc[r][v]);
}

template <class T>
HISAC_INLINE void transposed_product(int n, int64_t m, int64_t w, const T* a, int64_t lda, const T* b, int64_t ldb,
                                     float* c, int64_t ldc) {
  for (int64_t at = 0; at < pad(w);) {
    const int64_t take = tile_vectors((pad(w) - at) / W);
    for (int64_t r = 0; r < m; r += kRows) {
      if (kAcross == 4 && take == 4) accumulate_tile<kRows, 4>(n, a + r, lda, b + at, ldb, c + r * ldc + at, ldc);
      if (take == 3) accumulate_tile<kRows, 3>(n, a + r, lda, b + at, ldb, c + r * ldc + at, ldc);
      if (take == 2) accumulate_tile<kRows, 2>(n, a + r, lda, b + at, ldb, c + r * ldc + at, ldc);
      if (take == 1) accumulate_tile<kRows, 1>(n, a + r, lda, b + at, ldb, c + r * ldc + at, ldc);
    }
    at += take * W;
  }
}

static void accumulate(int n, int64_t m, int64_t w, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                       int64_t ldc) {
  transposed_product(n, m, w, a, lda, b, ldb, c, ldc);
}

#if defined(HISAC_PAIRS)
static void accumulate_pairs(int n2, int64_t w, int64_t m, const uint32_t* a, int64_t lda, const uint32_t* e,
                             int64_t lde, float* c, int64_t ldc) {
  transposed_product(n2, w, m, a, lda, e, lde, c, ldc);
}
#endif

// ---- packing

/// a0 b0 a1 b1 .. of the lower (from = 0) or upper (from = W / 2) halves.
template <int from, int... I>
HISAC_INLINE vf interleave(vf a, vf b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, (from + I / 2 + I % 2 * W)...);
}

/// W vectors of W: log2(W) rounds of interleaving the first half with the second.
HISAC_INLINE void transpose(vf* x) {
  vf y[W];
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      y[2 * i] = interleave<0>(x[i], x[i + W / 2], typename Count<W>::lanes());
      y[2 * i + 1] = interleave<W / 2>(x[i], x[i + W / 2], typename Count<W>::lanes());
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i];
  }
}

static void transpose(int64_t w, const float* src, int64_t ld, float* dst, int64_t ldd) {
  for (int64_t r = 0; r < w; r += W)
    for (int64_t c = 0; c < kLanes; c += W) {
      vf x[W];
      for (int i = 0; i < W; ++i) x[i] = load(src + (r + i) * ld + c);
      transpose(x);
      for (int i = 0; i < W; ++i) store(dst + (c + i) * ldd + r, x[i]);
    }
}

/// Panels from read(j, d, have): up to W elements of column j from row d on, the rest 0.
template <class Read>
HISAC_INLINE void pack(int64_t k, int64_t m, float* out, Read read) {
  int64_t j0 = 0;
  for (int64_t left = pad(m) / kLanes; left > 0;) {
    const int64_t group = panel_group(left), width = group * kLanes;
    left -= group;
    for (int64_t j = j0; j < j0 + width; j += W)
      for (int64_t d = 0; d < k; d += W) {
        vf x[W] = {};
        const size_t have = static_cast<size_t>(k - d < W ? k - d : W);
        for (int i = 0; i < W && j + i < m; ++i) x[i] = read(j + i, d, have);
        transpose(x);
        for (size_t i = 0; i < have; ++i) store(out + (d + static_cast<int64_t>(i)) * width + (j - j0), x[i]);
      }
    out += k * width;
    j0 += width;
  }
}

HISAC_INLINE vf load_some(const float* p, size_t have) {
  if (have >= W) return load(p);
  vf x = {};
  __builtin_memcpy(&x, p, have * 4);
  return x;
}

static void pack_columns(int64_t k, int64_t m, const float* columns, int64_t ld, float* out) {
  pack(k, m, out, [=](int64_t j, int64_t d, size_t have) __attribute__((always_inline)) {
    return load_some(columns + j * ld + d, have);
  });
}

static void pack_rows(int64_t k, int64_t m, const float* rows, int64_t ld, float* out) {
  int64_t j0 = 0;
  for (int64_t left = pad(m) / kLanes; left > 0;) {
    const int64_t group = panel_group(left), width = group * kLanes;
    left -= group;
    const size_t have = static_cast<size_t>(m - j0 < width ? m - j0 : width);
    for (int64_t d = 0; d < k; ++d, out += width) {
      __builtin_memcpy(out, rows + d * ld + j0, have * 4);
      __builtin_memset(out + have, 0, (static_cast<size_t>(width) - have) * 4);
    }
    j0 += width;
  }
}

// ---- rows in and out

HISAC_INLINE vf widen(vh raw, DType type) {
  const vu bits = __builtin_convertvector(raw, vu);
  if (type == DType::bfloat16) return (vf)(bits << 16);
  // half: move exponent and mantissa into place, mend the exponent's bias by a product; infinities and NaN by hand
  const vf magnitude = (vf)((bits & 0x7fffu) << 13) * 0x1p112f;
  const vu special = (vu)((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (vf)((vu)magnitude | special | ((bits & 0x8000u) << 16));
}

HISAC_INLINE vh narrow(vf x, DType type) {
  const vu bits = (vu)x, sign = bits & 0x80000000u, magnitude = bits & 0x7fffffffu;
  const vu is_nan = (vu)(magnitude > 0x7f800000u);
  if (type == DType::bfloat16) {
    const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), vh);
  }
  const vu normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const vf tiny = (vf)magnitude + 0.5f;  // aligns the mantissa of a subnormal half and rounds to nearest even
  const vu subnormal = (vu)tiny - 0x3f000000u;
  const vu is_small = (vu)(magnitude < 0x38800000u), is_large = (vu)(magnitude >= 0x477ff000u);
  vu half = (is_small & subnormal) | (~is_small & normal);
  half = (is_large & 0x7c00u) | (~is_large & half);
  half = (is_nan & 0x7e00u) | (~is_nan & half);
  return __builtin_convertvector(half | (sign >> 16), vh);
}

static float load_row(const void* src, DType type, int64_t width, float* dst) {
  vf squares = {};
  int64_t d = 0;
  for (; d + W <= width; d += W) {
    const vf x = type == DType::float32
                     ? load(static_cast<const float*>(src) + d)
                     : widen(*reinterpret_cast<const vh_loose*>(static_cast<const uint16_t*>(src) + d), type);
    store(dst + d, x);
    squares += x * x;
  }
  if (d < width) {
    const size_t rest = static_cast<size_t>(width - d);
    vf x = {};
    if (type == DType::float32) {
      __builtin_memcpy(&x, static_cast<const float*>(src) + d, rest * 4);
    } else {
      vh raw = {};
      __builtin_memcpy(&raw, static_cast<const uint16_t*>(src) + d, rest * 2);
      x = widen(raw, type);
    }
    __builtin_memcpy(dst + d, &x, rest * 4);
    squares += x * x;
  }
  return sum_of(squares);
}

/// A plain loop: vectors of int8 GCC widens lane by lane.
static float load_int8(const int8_t* __restrict src, float scale, int64_t width, float* __restrict dst) {
  for (int64_t d = 0; d < width; ++d) dst[d] = scale * static_cast<float>(src[d]);
  return load_row(dst, DType::float32, width, dst);
}

static void store_row(void* dst, DType type, int64_t width, const float* src, float scale) {
  float* const out = static_cast<float*>(dst);
  uint16_t* const half = static_cast<uint16_t*>(dst);
  int64_t d = 0;
  for (; d + W <= width; d += W) {
    const vf x = load(src + d) * scale;
    if (type == DType::float32)
      store(out + d, x);
    else
      *reinterpret_cast<vh_loose*>(half + d) = narrow(x, type);
  }
  if (d == width) return;
  const size_t rest = static_cast<size_t>(width - d);
  const vf x = load_some(src + d, rest) * scale;
  const vh raw = narrow(x, type);
  if (type == DType::float32)
    __builtin_memcpy(out + d, &x, rest * 4);
  else
    __builtin_memcpy(half + d, &raw, rest * 2);
}

/// Two vectors rounded to bfloat16, the first in the lower halves; ties away from zero.
HISAC_INLINE vu pair_of(vf even, vf odd) { return ((vu)even + 0x8000u) >> 16 | (((vu)odd + 0x8000u) & 0xffff0000u); }

#if defined(HISAC_PAIRS)
HISAC_INLINE vh narrow_flushed(vf x) {
#if W == 16
  vh out;
  asm("vcvtneps2bf16 %1, %0" : "=v"(out) : "v"(x));
  return out;
#else  // in tests, as above
  return narrow((vf)((vu)x & ((vu)(((vu)x & 0x7f800000u) != 0) | 0x80000000u)), DType::bfloat16);
#endif
}

/// Finite stays finite: the largest floats would round to infinity, and 0 times that is NaN.
HISAC_INLINE vf within_bfloat16(vf x) {
  constexpr float kMost = 0x1.fep127f;
  return smaller(splat(kMost), larger(splat(-kMost), x));
}

static void pair_rows(int64_t width, const float* even, const float* odd, uint32_t* dst) {
  for (int64_t d = 0; d < width; d += W) {
    const vh low = narrow_flushed(within_bfloat16(load(even + d)));
    const vh high = narrow_flushed(within_bfloat16(odd ? load(odd + d) : vf{}));
    *reinterpret_cast<vu_loose*>(dst + d) = __builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16;
  }
}

static void remainder(int64_t width, const float* src, float* dst) {
  for (int64_t d = 0; d < width; d += W) {
    const size_t have = static_cast<size_t>(width - d < W ? width - d : W);
    const vf x = within_bfloat16(load_some(src + d, have));
    const vf rest = x - widen(narrow_flushed(x), DType::bfloat16);
    __builtin_memcpy(dst + d, &rest, have * 4);
  }
}

static void pack_pairs(int64_t k, int64_t m, const float* columns, int64_t ld, uint32_t* out) {
  const auto read = [=](int64_t j, int64_t pair, size_t) __attribute__((always_inline)) {
    const int64_t left = k - 2 * pair;
    const float* const p = columns + j * ld + 2 * pair;
    const vh half[2] = {narrow_flushed(load_some(p, static_cast<size_t>(left))),
                        narrow_flushed(left > W ? load_some(p + W, static_cast<size_t>(left - W)) : vf{})};
    vf x;
    __builtin_memcpy(&x, half, sizeof x);
    return x;
  };
  pack((k + 1) / 2, m, reinterpret_cast<float*>(out), read);
}
#endif

static void add_row(int64_t width, const float* src, float factor, float* dst) {
  for (int64_t d = 0; d < width; ++d) dst[d] += factor * src[d];
}

// ---- route

static void distance_logits(int n, int64_t m, float* z, int64_t ldz, const float* row_norm, const float* norm,
                            const float* rate) {
  for (int i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; j += W) {
      float* p = z + i * ldz + j;
      const vf d = larger(row_norm[i] + load(norm + j) - 2.f * load(p), vf{});
      store(p, -load(rate + j) * d);
    }
}

static void row_lse(int n, int64_t m, const float* z, int64_t ldz, float* lse) {
  for (int i = 0; i < n; ++i) {
    const float* row = z + i * ldz;
    vf top = splat(-kInfinity), sum = {};
    for (int64_t j = 0; j < m; j += W) top = larger(load(row + j), top);
    const float t = largest_of(top), safe = t == -kInfinity ? 0.f : t;
    for (int64_t j = 0; j < m; j += W) sum += exp2v(load(row + j) - safe);
    lse[i] = t == -kInfinity ? t : safe + __builtin_log2f(sum_of(sum));
  }
}

template <bool products>
HISAC_INLINE vf route_logit(const float* z, const RouteWeights& p, int i, vf norm, vf rate) {
  if (!products) return load(z) + p.shift[i];
  return p.shift[i] - rate * larger(p.row_norm[i] + norm - 2.f * load(z), vf{});
}

/// Where weights go in pairs of rows; lo null: one half.
struct PairTarget {
  uint32_t *hi, *lo;
  PairTarget operator+(int64_t j) const { return {hi + j, lo ? lo + j : lo}; }
};

/// Weights of one vector of agents, their sum, and the largest logit.
template <bool products>
HISAC_INLINE void weigh(int n, const float* z, int64_t ldz, const RouteWeights& p, vf norm, vf rate, vf top, float* e,
                        int64_t lde, vf& peak, vf& sum) {
  peak = splat(-kInfinity);
  sum = vf{};
  for (int i = 0; i < n; ++i) {
    const vf logit = route_logit<products>(z + i * ldz, p, i, norm, rate), w = exp2v(logit - top);
    peak = larger(logit, peak);
    store(e + i * lde, w);
    sum += w;
  }
}

/// The same in pairs of rows; lo, if wanted, is what rounding left.
template <bool products>
HISAC_INLINE void weigh(int n, const float* z, int64_t ldz, const RouteWeights& p, vf norm, vf rate, vf top,
                        PairTarget e, int64_t lde, vf& peak, vf& sum) {
  const auto halves = [](vu pair, vf& even, vf& odd) __attribute__((always_inline)) {
    even = (vf)(pair << 16);
    odd = (vf)(pair & 0xffff0000u);
  };
  peak = splat(-kInfinity);
  sum = vf{};
  for (int i = 0; i < n; i += 2) {
    vf even = route_logit<products>(z + i * ldz, p, i, norm, rate);
    vf odd = i + 1 < n ? route_logit<products>(z + (i + 1) * ldz, p, i + 1, norm, rate) : splat(-kInfinity);
    peak = larger(larger(even, odd), peak);
    even = exp2v(even - top);
    odd = exp2v(odd - top);
    const vu hi = pair_of(even, odd);
    *reinterpret_cast<vu_loose*>(e.hi + i / 2 * lde) = hi;
    vf high_even, high_odd;
    halves(hi, high_even, high_odd);
    sum += high_even + high_odd;
    if (!e.lo) continue;
    const vu lo = pair_of(even - high_even, odd - high_odd);
    *reinterpret_cast<vu_loose*>(e.lo + i / 2 * lde) = lo;
    halves(lo, even, odd);
    sum += even + odd;
  }
}

template <bool products, class T>
HISAC_INLINE bool route_weights_of(int n, int64_t m, const float* z, int64_t ldz, const RouteWeights& p, T e,
                                   int64_t lde) {
  constexpr float kRise = 12;
  bool changed = false;
  for (int64_t j = 0; j < m; j += W) {
    const vf norm = load(p.norm + j), rate = load(p.rate + j), old = load(p.top + j);
    const vf top = old == -kInfinity ? vf{} : old;
    vf peak, sum, factor = splat(1.f);
    weigh<products>(n, z + j, ldz, p, norm, rate, top, e + j, lde, peak, sum);
    const vi rises = (peak > top + kRise) | ((old == -kInfinity) & (peak > -kInfinity));
    int any = 0;
    for (int l = 0; l < W; ++l) any |= rises[l];
    if (any) {
      const vf next = larger(peak, old);
      const vf safe = next == -kInfinity ? vf{} : next;  // no mass yet: -inf - -inf would be NaN
      weigh<products>(n, z + j, ldz, p, norm, rate, safe, e + j, lde, peak, sum);
      factor = exp2v(old - safe);
      store(p.top + j, next);
      if (!changed)
        for (int64_t c = 0; c < j; c += W) store(p.factor + c, splat(1.f));
      changed = true;
    }
    if (changed) store(p.factor + j, factor);
    store(p.mass + j, load(p.mass + j) * factor + sum);
  }
  return changed;
}

static bool route_weights(int n, int64_t m, const float* z, int64_t ldz, const RouteWeights& p, float* e, int64_t lde) {
  return p.row_norm ? route_weights_of<true>(n, m, z, ldz, p, e, lde)
                    : route_weights_of<false>(n, m, z, ldz, p, e, lde);
}

#if defined(HISAC_PAIRS)
static bool route_weights_split(int n, int64_t m, const float* z, int64_t ldz, const RouteWeights& p, uint32_t* e_hi,
                                uint32_t* e_lo, int64_t lde) {
  const PairTarget e{e_hi, e_lo};
  return p.row_norm ? route_weights_of<true>(n, m, z, ldz, p, e, lde)
                    : route_weights_of<false>(n, m, z, ldz, p, e, lde);
}

static bool route_weights_pairs(int n, int64_t m, const float* z, int64_t ldz, const RouteWeights& p, uint32_t* e,
                                int64_t lde) {
  return route_weights_split(n, m, z, ldz, p, e, nullptr, lde);
}
#endif

/// raw <- weights w = 2^(raw + shift_i - lse_a); dz = w (g + offset_a); d_bias_i = sum_a dz; in agents mode
/// dz -= 2^(raw - row_lse_i) d_bias_i; g <- rate_a dz.
template <bool shares>
HISAC_INLINE void route_gradient_of(int n, int64_t m, float* raw, float* g, int64_t ldz, const RouteGradient& p) {
  for (int i = 0; i < n; ++i) {
    float *r = raw + i * ldz, *q = g + i * ldz;
    vf bias_sum = {}, distance_sum = {};
    const auto take = [&](int64_t j, vf w, vf dz) __attribute__((always_inline)) {
      const vf logit = larger(load(r + j), splat(-3e38f));  // 0 * -inf would be NaN
      if (shares) dz -= exp2v(logit - p.row_lse[i]) * p.d_bias[i];
      store(r + j, w);
      store(p.d_raw + j, load(p.d_raw + j) + dz * logit);
      const vf distance = dz * load(p.rate + j);
      store(q + j, distance);
      store(p.column_sum + j, load(p.column_sum + j) + distance);
      distance_sum += distance;
    };
    const auto weight = [&](int64_t j) __attribute__((always_inline)) {
      return exp2v(load(r + j) + p.shift[i] - load(p.lse + j));
    };
    for (int64_t j = 0; j < m; j += W) {
      const vf w = weight(j), dz = w * (load(q + j) + load(p.offset + j));
      bias_sum += dz;
      if (shares)
        store(q + j, dz);
      else
        take(j, w, dz);
    }
    p.d_bias[i] = sum_of(bias_sum);
    for (int64_t j = 0; shares && j < m; j += W) take(j, weight(j), load(q + j));
    p.row_sum[i] = sum_of(distance_sum);
  }
}

static void route_gradient(int n, int64_t m, float* raw, float* g, int64_t ldz, const RouteGradient& p) {
  if (p.row_lse)
    route_gradient_of<true>(n, m, raw, g, ldz, p);
  else
    route_gradient_of<false>(n, m, raw, g, ldz, p);
}

// ---- attend

/// A logit that two of its kind, added, keep finite; NaN loses.
HISAC_INLINE vf bounded(vf x) { return smaller(larger(x, splat(-1.7e38f)), splat(1.7e38f)); }

static void row_softmax(int n, int64_t m, float* z, int64_t ldz, float scale, const float* bias, float* lse) {
  for (int i = 0; i < n; ++i) {
    float* row = z + i * ldz;
    vf top = splat(-kInfinity), sum = {};
    for (int64_t j = 0; j < m; j += W) {
      const vf x = bounded(scale * load(row + j)) + load(bias + j);
      store(row + j, x);
      top = larger(x, top);
    }
    const float t = largest_of(top), safe = t == -kInfinity ? 0.f : t;
    for (int64_t j = 0; j < m; j += W) {
      const vf e = exp2v(load(row + j) - safe);
      store(row + j, e);
      sum += e;
    }
    const float total = sum_of(sum), inverse = t == -kInfinity ? 0.f : 1.f / total;
    lse[i] = t == -kInfinity ? t : safe + __builtin_log2f(total);
    for (int64_t j = 0; j < m; j += W) store(row + j, load(row + j) * inverse);
  }
}

static void row_weights(int n, int64_t m, float* z, int64_t ldz, float scale, const float* bias, const float* lse) {
  for (int i = 0; i < n; ++i) {
    const float shift = lse[i] == -kInfinity ? kInfinity : lse[i];
    for (int64_t j = 0; j < m; j += W) {
      float* p = z + i * ldz + j;
      store(p, exp2v(bounded(scale * load(p)) + load(bias + j) - shift));
    }
  }
}

static void attend_gradient(int n, int64_t m, const float* w, float* g, int64_t ldz, const float* offset,
                            float* column_sum) {
  for (int64_t j = 0; j < m; j += W) {
    vf sum = load(column_sum + j);
    for (int i = 0; i < n; ++i) {
      const vf dz = load(w + i * ldz + j) * (load(g + i * ldz + j) + offset[i]);
      store(g + i * ldz + j, dz);
      sum += dz;
    }
    store(column_sum + j, sum);
  }
}

#include "kernels_nearest.inl"

#undef HISAC_INLINE

#if !defined(HISAC_PAIRS)
constexpr decltype(Kernels::matmul_pairs) matmul_pairs = nullptr;
constexpr decltype(Kernels::pack_pairs) pack_pairs = nullptr;
constexpr decltype(Kernels::accumulate_pairs) accumulate_pairs = nullptr;
constexpr decltype(Kernels::route_weights_pairs) route_weights_pairs = nullptr;
constexpr decltype(Kernels::pair_rows) pair_rows = nullptr;
constexpr decltype(Kernels::remainder) remainder = nullptr;
constexpr decltype(Kernels::route_weights_split) route_weights_split = nullptr;
constexpr decltype(Kernels::round_pairs) round_pairs = nullptr;
#endif

}  // namespace

const Kernels HISAC_ISA_TABLE = {
    HISAC_ISA_NAME,  matmul,         accumulate,  pack_columns,     pack_rows,           load_row,
    load_int8,       store_row,      transpose,   add_row,          distance_logits,     row_lse,
    route_weights,   route_gradient, row_softmax, row_weights,      attend_gradient,     screen,
    square_distance, matmul_pairs,   pack_pairs,  accumulate_pairs, route_weights_pairs, pair_rows,
    remainder,       round_pairs,    nullptr,     nullptr,          route_weights_split};

}  // namespace hisac::cpu
