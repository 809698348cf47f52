// SPDX-License-Identifier: Apache-2.0
// The part of kernels.inl that moves data: packing and transposing, rows of every type in and out, bfloat16 in pairs.

/// a0 b0 a1 b1 .. of the lower (offset = 0) or upper (offset = W / 2) halves.
template <int offset, int... I>
HISAC_INLINE vf interleave(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (offset + I / 2 + I % 2 * W)...);
}

/// W vectors of W: log2(W) rounds of interleaving the first half with the second.
HISAC_INLINE void transpose(vf* x) {
  vf y[W];
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      y[2 * i] = interleave<0>(x[i], x[i + W / 2], LanesOf<vf>());
      y[2 * i + 1] = interleave<W / 2>(x[i], x[i + W / 2], LanesOf<vf>());
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

/// Packs panels. read(j, d, have) returns `have` <= W elements of column j from row d on, and zeros after them.
template <class Read>
HISAC_INLINE void pack(int64_t k, int64_t m, float* out, Read read) {
  for (int64_t first = 0, width; first < m; first += width) {
    width = panel_width(m, first);
    for (int64_t j = first; j < first + width; j += W)
      for (int64_t d = 0; d < k; d += W) {
        vf x[W] = {};
        const size_t have = lanes_of(k - d);
        for (int i = 0; i < W && j + i < m; ++i) x[i] = read(j + i, d, have);
        transpose(x);
        float* const to = out + k * first + d * width + (j - first);
        for (int i = 0; i < static_cast<int>(have); ++i) store(to + i * width, x[i]);
      }
  }
}

static void pack_columns(int64_t k, int64_t m, const float* columns, int64_t ld, float* out) {
  pack(k, m, out, [=](int64_t j, int64_t d, size_t have) __attribute__((always_inline)) {
    return load_first(columns + j * ld + d, have);
  });
}

static void pack_rows(int64_t k, int64_t m, const float* rows, int64_t ld, float* out) {
  for (int64_t first = 0, width; first < m; first += width) {
    width = panel_width(m, first);
    const size_t have = static_cast<size_t>(m - first < width ? m - first : width);
    for (int64_t d = 0; d < k; ++d, out += width) {
      __builtin_memcpy(out, rows + d * ld + first, have * 4);
      __builtin_memset(out + have, 0, (static_cast<size_t>(width) - have) * 4);
    }
  }
}

// ---- rows in and out

HISAC_INLINE vf widen(vh raw, DType type) {
  const vu bits = __builtin_convertvector(raw, vu);
  if (type == DType::bfloat16) return (vf)(bits << 16);
  // float16: exponent and mantissa move into place, a product corrects the exponent's bias; infinities and NaN apart
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

/// f(d, have) for each vector of a row, the last of which may not be whole.
template <class F>
HISAC_INLINE void each_vector(int64_t width, F f) {
  int64_t d = 0;
  for (; d + W <= width; d += W) f(d, W);
  if (d < width) f(d, lanes_of(width - d));
}

/// Four independent sums, so that additions need not wait for one another. read(d, have): the elements from d on.
template <class Read>
HISAC_INLINE float load_row_of(int64_t width, float* dst, Read read) {
  vf squares[4] = {};
  int64_t d = 0;
  for (; d + 4 * W <= width; d += 4 * W) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const vf x = read(d + i * W, W);
      store(dst + d + i * W, x);
      squares[i] += x * x;
    }
  }
  for (; d < width; d += W) {
    const size_t have = lanes_of(width - d);
    const vf x = read(d, have);
    store_first(dst + d, x, have);
    squares[0] += x * x;
  }
  return sum_of((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

static float load_row(const void* src, DType type, int64_t width, float* dst) {
  const float* const floats = static_cast<const float*>(src);
  const uint16_t* const halves = static_cast<const uint16_t*>(src);
  if (type == DType::float32)
    return load_row_of(width, dst, [=](int64_t d, size_t have) __attribute__((always_inline)) {
      return load_first(floats + d, have);
    });
  return load_row_of(width, dst, [=](int64_t d, size_t have) __attribute__((always_inline)) {
    return widen(load_first(halves + d, have), type);
  });
}

static float subtract_row(int64_t width, const float* origin, float* row) {
  return load_row_of(width, row, [=](int64_t d, size_t have) __attribute__((always_inline)) {
    return load_first(row + d, have) - load_first(origin + d, have);
  });
}

/// A scalar loop, because GCC widens vectors of int8 lane by lane.
static float load_int8(const int8_t* __restrict src, float scale, int64_t width, float* __restrict dst) {
  for (int64_t d = 0; d < width; ++d) dst[d] = scale * static_cast<float>(src[d]);
  return load_row(dst, DType::float32, width, dst);
}

static void store_row(void* dst, DType type, int64_t width, const float* src, float scale) {
  float* const floats = static_cast<float*>(dst);
  uint16_t* const halves = static_cast<uint16_t*>(dst);
  if (type == DType::float32)
    return each_vector(width, [=](int64_t d, size_t have) __attribute__((always_inline)) {
      store_first(floats + d, load_first(src + d, have) * scale, have);
    });
  each_vector(width, [=](int64_t d, size_t have) __attribute__((always_inline)) {
    store_first(halves + d, narrow(load_first(src + d, have) * scale, type), have);
  });
}

/// Two vectors rounded to bfloat16, the first in the lower halves; ties away from zero.
HISAC_INLINE vu pair_of(vf even, vf odd) { return ((vu)even + 0x8000u) >> 16 | (((vu)odd + 0x8000u) & 0xffff0000u); }

#if defined(HISAC_BF16)
HISAC_INLINE vh narrow_flushed(vf x) {
#if W == 16
  vh out;
  asm("vcvtneps2bf16 %1, %0" : "=v"(out) : "v"(x));
  return out;
#else  // in tests, as above
  return narrow((vf)((vu)x & ((vu)(((vu)x & 0x7f800000u) != 0) | 0x80000000u)), DType::bfloat16);
#endif
}

/// Keeps finite values finite: the largest floats would round to infinity, and 0 times infinity is NaN.
HISAC_INLINE vf within_bfloat16(vf x) {
  constexpr float kMost = 0x1.fep127f;
  return smaller(splat(kMost), larger(splat(-kMost), x));
}

static void pair_rows_bf16(int64_t width, const float* even, const float* odd, uint32_t* dst) {
  for (int64_t d = 0; d < width; d += W) {
    const vh low = narrow_flushed(within_bfloat16(load(even + d)));
    const vh high = narrow_flushed(within_bfloat16(odd ? load(odd + d) : vf{}));
    *reinterpret_cast<vu_loose*>(dst + d) = __builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16;
  }
}

static void bf16_remainder(int64_t width, const float* src, float* dst) {
  each_vector(width, [=](int64_t d, size_t have) __attribute__((always_inline)) {
    const vf x = within_bfloat16(load_first(src + d, have));
    store_first(dst + d, x - widen(narrow_flushed(x), DType::bfloat16), have);
  });
}

static void pack_bf16(int64_t k, int64_t m, const float* columns, int64_t ld, uint32_t* out) {
  const auto read = [=](int64_t j, int64_t pair, size_t) __attribute__((always_inline)) {
    const int64_t left = k - 2 * pair;
    const float* const p = columns + j * ld + 2 * pair;
    const vh half[2] = {narrow_flushed(load_first(p, lanes_of(left))),
                        narrow_flushed(left > W ? load_first(p + W, lanes_of(left - W)) : vf{})};
    vf x;
    __builtin_memcpy(&x, half, sizeof x);
    return x;
  };
  pack(pairs_of(k), m, reinterpret_cast<float*>(out), read);
}
#endif

static void blend_row(int64_t width, float factor, const float* src, float by, float* dst) {
  int64_t d = 0;
  for (; d + W <= width; d += W) store(dst + d, factor * load(dst + d) + by * load(src + d));
  for (; d < width; ++d) dst[d] = factor * dst[d] + by * src[d];
}

static void add_row(int64_t width, const float* src, float factor, float* dst) {
  int64_t d = 0;
  for (; d + W <= width; d += W) store(dst + d, load(dst + d) + factor * load(src + d));
  for (; d < width; ++d) dst[d] += factor * src[d];
}
