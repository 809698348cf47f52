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
typedef float vf_loose __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_loose __attribute__((vector_size(W * 2), aligned(2), may_alias));

#define HISAC_INLINE static inline __attribute__((always_inline))

constexpr float kInfinity = __builtin_huge_valf();
constexpr int kRows = W == 16 ? 8 : 4;  // rows of a product's register tile
#if defined(__aarch64__)
constexpr int kAcross = 4;  // vectors of a product's register tile: of 32 registers GCC spills 8 x 3 and 4 x 6
constexpr int kWide = 4;    // vectors of an accumulation's register tile
#else
constexpr int kAcross = 3;
constexpr int kWide = W == 16 ? 4 : 3;
#endif

HISAC_INLINE vf splat(float x) { return x - vf{}; }  // a broadcast; vf{} + x costs an addition
HISAC_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_loose*>(p); }
HISAC_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_loose*>(p) = x; }
HISAC_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }  // b where a is NaN

HISAC_INLINE float sum_of(vf x) {
  float s[W];
  store(s, x);
  for (int step = W / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) s[i] += s[i + step];
  return s[0];
}

HISAC_INLINE float largest_of(vf x) {
  float s[W];
  store(s, x);
  for (int step = W / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) s[i] = s[i] > s[i + step] ? s[i] : s[i + step];
  return s[0];
}

/// 2^x within 2 ulp for x in [-126, 127]; 0 below (and for NaN), clamped above.
HISAC_INLINE vf exp2v(vf x) {
  x = larger(x, splat(-127.f));
  x = x < 127.f ? x : splat(127.f);
  const vf n = (x + 12582912.f) - 12582912.f;
  const vf r = x - n;
  vf p = splat(1.535336188e-4f);
  p = p * r + 1.339887440e-3f;
  p = p * r + 9.618437357e-3f;
  p = p * r + 5.550332548e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472028e-1f;
  p = p * r + 1.f;
  return p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
}

// ---- products

template <int R, int V>
HISAC_INLINE void matmul_tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* z,
                              int64_t ldz) {
  vf acc[R][V] = {};
  for (int64_t d = 0; d < k; ++d) {
    vf column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = load(b + d * ldb + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf x = splat(a[r * lda + d]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += x * column[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(z + r * ldz + v * W, acc[r][v]);
}

static void matmul(int n, int64_t k, int64_t m, const float* a, int64_t lda, const float* packed, float* z,
                   int64_t ldz) {
  for (int64_t left = pad(m) / kLanes; left > 0;) {
    const int64_t group = panel_group(left);
    left -= group;
    const int64_t width = group * kLanes;
    for (int64_t at = 0; at < width;) {
      int64_t take = (width - at) / W;
      if (take > kAcross) take = take == kAcross + 1 ? 2 : kAcross;  // none left alone
      for (int i = 0; i < n; i += kRows) {
        const float* x = a + i * lda;
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

/// The block's sum is made apart and added once, so that a tile of equal rows does not lose its last digits one by one.
template <int V>
HISAC_INLINE void accumulate_tile(int n, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                                  int64_t ldc) {
  vf acc[4][V] = {};
  for (int i = 0; i < n; ++i) {
    vf row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load(b + i * ldb + v * W);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const vf x = splat(a[i * lda + r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += x * row[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + r * ldc + v * W, load(c + r * ldc + v * W) + acc[r][v]);
}

static void accumulate(int n, int64_t m, int64_t w, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                       int64_t ldc) {
  for (int64_t at = 0; at < pad(w);) {
    const int64_t vectors = (pad(w) - at) / W, take = vectors < kWide ? vectors : kWide;
    for (int64_t r = 0; r < m; r += 4) {
      if (take == 4) accumulate_tile<4>(n, a + r, lda, b + at, ldb, c + r * ldc + at, ldc);
      if (take == 3) accumulate_tile<3>(n, a + r, lda, b + at, ldb, c + r * ldc + at, ldc);
      if (take == 2) accumulate_tile<2>(n, a + r, lda, b + at, ldb, c + r * ldc + at, ldc);
      if (take == 1) accumulate_tile<1>(n, a + r, lda, b + at, ldb, c + r * ldc + at, ldc);
    }
    at += take * W;
  }
}

// ---- packing

template <int... I>
struct Lanes {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using lanes = Lanes<I...>;
};

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

static void pack_columns(int64_t k, int64_t m, const float* columns, int64_t ld, float* out) {
  int64_t j0 = 0;
  for (int64_t left = pad(m) / kLanes; left > 0;) {
    const int64_t group = panel_group(left), width = group * kLanes;
    left -= group;
    for (int64_t j = j0; j < j0 + width; j += W)
      for (int64_t d = 0; d < k; d += W) {
        vf x[W] = {};
        const size_t have = static_cast<size_t>(k - d < W ? k - d : W);
        for (int i = 0; i < W && j + i < m; ++i) {
          if (have == W)
            x[i] = load(columns + (j + i) * ld + d);
          else
            __builtin_memcpy(&x[i], columns + (j + i) * ld + d, have * 4);
        }
        transpose(x);
        for (size_t i = 0; i < have; ++i) store(out + (d + static_cast<int64_t>(i)) * width + (j - j0), x[i]);
      }
    out += k * width;
    j0 += width;
  }
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

static void store_row(void* dst, DType type, int64_t width, const float* src, float scale) {
  for (int64_t d = 0; d < width; d += W) {
    const size_t rest = static_cast<size_t>(width - d < W ? width - d : W);
    vf x = {};
    __builtin_memcpy(&x, src + d, rest * 4);
    x *= scale;
    if (type == DType::float32) {
      __builtin_memcpy(static_cast<float*>(dst) + d, &x, rest * 4);
    } else {
      const vh raw = narrow(x, type);
      __builtin_memcpy(static_cast<uint16_t*>(dst) + d, &raw, rest * 2);
    }
  }
}

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

static void row_shift(int n, int64_t m, float* z, int64_t ldz, const float* shift) {
  for (int i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; j += W) store(z + i * ldz + j, load(z + i * ldz + j) + shift[i]);
}

static bool column_softmax(int n, int64_t m, float* z, int64_t ldz, float* top, float* mass, float* factor) {
  vi changed = {};
  for (int64_t j = 0; j < m; j += W) {
    const vf old = load(top + j);
    vf peak = old, sum = {};
    for (int i = 0; i < n; ++i) peak = larger(load(z + i * ldz + j), peak);
    const vf safe = peak == -kInfinity ? vf{} : peak;  // nothing yet: -inf - -inf would be NaN
    for (int i = 0; i < n; ++i) {
      const vf e = exp2v(load(z + i * ldz + j) - safe);
      store(z + i * ldz + j, e);
      sum += e;
    }
    const vf f = exp2v(old - safe);
    changed |= peak > old;
    store(top + j, peak);
    store(factor + j, f);
    store(mass + j, load(mass + j) * f + sum);
  }
  int any = 0;
  for (int l = 0; l < W; ++l) any |= changed[l];
  return any != 0;
}

/// raw <- weights w = 2^(raw + shift_i - lse_a); dz = w (g + offset_a); d_bias_i = sum_a dz; in agents mode
/// dz -= 2^(raw - row_lse_i) d_bias_i; g <- rate_a dz.
static void route_gradient(int n, int64_t m, float* raw, float* g, int64_t ldz, const RouteGradient& p) {
  for (int i = 0; i < n; ++i) {
    float *r = raw + i * ldz, *q = g + i * ldz;
    vf bias_sum = {}, distance_sum = {};
    for (int64_t j = 0; j < m; j += W) {
      const vf w = exp2v(load(r + j) + p.shift[i] - load(p.lse + j));
      const vf dz = w * (load(q + j) + load(p.offset + j));
      bias_sum += dz;
      store(q + j, dz);
    }
    const float d_bias = p.d_bias[i] = sum_of(bias_sum);
    for (int64_t j = 0; j < m; j += W) {
      const vf logit = larger(load(r + j), splat(-3e38f));  // 0 * -inf would be NaN
      vf dz = load(q + j);
      if (p.row_lse) dz -= exp2v(logit - p.row_lse[i]) * d_bias;
      store(r + j, exp2v(load(r + j) + p.shift[i] - load(p.lse + j)));
      store(p.d_raw + j, load(p.d_raw + j) + dz * logit);
      const vf distance = dz * load(p.rate + j);
      store(q + j, distance);
      store(p.column_sum + j, load(p.column_sum + j) + distance);
      distance_sum += distance;
    }
    p.row_sum[i] = sum_of(distance_sum);
  }
}

// ---- attend

/// A logit that two of its kind, added, keep finite; NaN loses.
HISAC_INLINE vf bounded(vf x) {
  x = larger(x, splat(-1.7e38f));
  return x < 1.7e38f ? x : splat(1.7e38f);
}

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

// ---- encode

static void screen(int n, int64_t m, float* z, int64_t ldz, const float* half, float* smallest) {
  for (int i = 0; i < n; ++i) {
    vf low = splat(kInfinity);
    for (int64_t j = 0; j < m; j += W) {
      const vf x = load(half + j) - load(z + i * ldz + j);
      store(z + i * ldz + j, x);
      low = x < low ? x : low;
    }
    smallest[i] = -largest_of(-low);
  }
}

static int64_t survivors(int64_t m, const float* z, float threshold, int32_t* out) {
  int64_t count = 0;
  for (int64_t j = 0; j < m; j += kLanes) {
    int any = 0;
    for (int l = 0; l < kLanes; ++l) any |= !(z[j + l] > threshold);
    if (!any) continue;
    for (int64_t l = j; l < j + kLanes && l < m; ++l)
      if (!(z[l] > threshold)) out[count++] = static_cast<int32_t>(l);
  }
  return count;
}

#undef HISAC_INLINE

}  // namespace

const Kernels HISAC_ISA_TABLE = {HISAC_ISA_NAME,  matmul,         accumulate,     pack_columns,    pack_rows,
                                 load_row,        store_row,      add_row,        distance_logits, row_lse,
                                 row_shift,       column_softmax, route_gradient, row_softmax,     row_weights,
                                 attend_gradient, screen,         survivors};

}  // namespace hisac::cpu
