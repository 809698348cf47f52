// SPDX-License-Identifier: Apache-2.0
// The part of kernels.inl that multiplies: register tiles whose elements are floats, or pairs of bfloat16 where the ISA
// multiplies those.

/// Vectors of the next tile where `left` vectors remain, chosen so that a tile of one is not left over.
constexpr int64_t tile_vectors(int64_t left) { return left <= kAcross ? left : left == kAcross + 1 ? 2 : kAcross; }

HISAC_INLINE void multiply_add(vf& acc, float x, vf y) { acc += splat(x) * y; }
#if defined(HISAC_BF16)
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
static void matmul(int n, int64_t k, int64_t m, const T* a, int64_t lda, const T* packed, float* z, int64_t ldz,
                   Prefetcher* prefetcher) {
  for (int64_t first = 0, width; first < m; first += width) {
    width = panel_width(m, first);
    const T* const panel = packed + k * first;
    for (int64_t column = 0; column < width;) {
      const int64_t vectors = tile_vectors((width - column) / W);
      for (int i = 0; i < n; i += kRows) {
        if (prefetcher) prefetcher->prefetch(kRows * vectors * W);
        const T* x = a + i * lda;
        float* out = z + i * ldz + first + column;
        if (kAcross == 4 && vectors == 4) matmul_tile<kRows, 4>(k, x, lda, panel + column, width, out, ldz);
        if (vectors == 3) matmul_tile<kRows, 3>(k, x, lda, panel + column, width, out, ldz);
        if (vectors == 2) matmul_tile<kRows, 2>(k, x, lda, panel + column, width, out, ldz);
        if (vectors == 1) matmul_tile<kRows, 1>(k, x, lda, panel + column, width, out, ldz);
      }
      column += vectors * W;
    }
  }
}

/// The block is summed from 0 and added to c once: added row by row, a large c would lose the last digits of each row.
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
static void accumulate(int n, int64_t m, int64_t w, const T* a, int64_t lda, const T* b, int64_t ldb, float* c,
                       int64_t ldc) {
  for (int64_t column = 0; column < pad(w);) {
    const int64_t vectors = tile_vectors((pad(w) - column) / W);
    for (int64_t r = 0; r < m; r += kRows) {
      if (kAcross == 4 && vectors == 4)
        accumulate_tile<kRows, 4>(n, a + r, lda, b + column, ldb, c + r * ldc + column, ldc);
      if (vectors == 3) accumulate_tile<kRows, 3>(n, a + r, lda, b + column, ldb, c + r * ldc + column, ldc);
      if (vectors == 2) accumulate_tile<kRows, 2>(n, a + r, lda, b + column, ldb, c + r * ldc + column, ldc);
      if (vectors == 1) accumulate_tile<kRows, 1>(n, a + r, lda, b + column, ldb, c + r * ldc + column, ldc);
    }
    column += vectors * W;
  }
}
