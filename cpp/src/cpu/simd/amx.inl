// SPDX-License-Identifier: Apache-2.0
// The bfloat16 products of amx.h, written once over a policy of tile steps: Hardware below, or the scalar emulation of
// the tests. As in kernels.inl everything is in an unnamed namespace and uses nothing from std::. Where it runs on real
// tiles it is included inside a target region.
//
// Tiles 0-3 are sums (height x 16 columns), 4 and 5 hold B (depth x 16 columns), 6 and 7 hold A (height x depth pairs).

namespace hisac::simd {
namespace {

#define HISAC_INLINE static inline __attribute__((always_inline))

/// What ldtilecfg reads.
struct TileConfig {
  uint8_t palette, start_row, reserved0[14];
  uint16_t row_bytes[8], reserved1[8];
  uint8_t rows[8], reserved2[8];
};
static_assert(sizeof(TileConfig) == 64, "the format of palette 1");

#if defined(__x86_64__)
/// Inline assembly: the intrinsics of GCC 12 neither name the memory that they read nor keep their order with it.
struct Hardware {
  HISAC_INLINE void configure(const TileConfig& c) { asm volatile("ldtilecfg %0" ::"m"(c)); }
  HISAC_INLINE void release() { asm volatile("tilerelease" ::: "memory"); }
  template <int t>
  HISAC_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  template <int t>
  HISAC_INLINE void load(const void* p, int64_t row_bytes) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(t), "r"(p), "r"(row_bytes) : "memory");
  }
  template <int t>
  HISAC_INLINE void store(void* p, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(t), "r"(p), "r"(row_bytes) : "memory");
  }
  /// tile c += tile a x tile b
  template <int c, int a, int b>
  HISAC_INLINE void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
  static void pack(int64_t k, int64_t m, const float* columns, int64_t ld, float* out) {
    kAvx512.pack_columns(k, m, columns, ld, out);
  }
};
#endif

/// A matrix of bfloat16 pairs, or of bf16x3 operands hi + lo (one pass does not read lo).
struct Bf16Matrix {
  const uint32_t *hi, *lo;
  int64_t ld;
  Bf16Matrix offset_by(int64_t elements) const { return {hi + elements, lo + elements, ld}; }
};

typedef float Sixteen __attribute__((vector_size(64), aligned(4), may_alias));

/// How z gets the product P: overwrite: z = P; accumulate: the tiles start from z; add: P is summed from 0, then z += P
/// (bf16x3).
enum class Update { overwrite, accumulate, add };

/// R x C sums at a time, all of one height.
template <class Tiles, bool bf16x3, int R, int C>
struct Block {
  template <int t = 0>
  HISAC_INLINE void load_sums(Update update, const float* z, int64_t ldz, int height) {
    if (update == Update::accumulate)
      Tiles::template load<t>(z + t / C * height * ldz + t % C * 16, ldz * 4);
    else
      Tiles::template zero<t>();
    if constexpr (t + 1 < R * C) load_sums<t + 1>(update, z, ldz, height);
  }

  template <int t = 0>
  HISAC_INLINE void store_sums(float* z, int64_t ldz, int height) {
    Tiles::template store<t>(z + t / C * height * ldz + t % C * 16, ldz * 4);
    if constexpr (t + 1 < R * C) store_sums<t + 1>(z, ldz, height);
  }

  HISAC_INLINE void load_right(const uint32_t* b, int64_t ldb) {
    Tiles::template load<4>(b, ldb * 4);
    if constexpr (C == 2) Tiles::template load<5>(b + 16, ldb * 4);
  }

  /// sums += A B for the loaded B; left_loaded: A is loaded too.
  template <bool left_loaded, int r = 0>
  HISAC_INLINE void multiply_add(const uint32_t* a, int64_t lda, int height) {
    constexpr int left = 6 + r % 2;
    if constexpr (!left_loaded) Tiles::template load<left>(a + r * height * lda, lda * 4);
    Tiles::template dot<r * C, left, 4>();
    if constexpr (C == 2) Tiles::template dot<r * C + 1, left, 5>();
    if constexpr (r + 1 < R) multiply_add<left_loaded, r + 1>(a, lda, height);
  }

  /// `steps` steps of `depth` pairs.
  static void run(int64_t steps, int depth, int height, Bf16Matrix a, Bf16Matrix b, float* z, int64_t ldz,
                  Update update, Prefetcher* prefetcher) {
    if (prefetcher) prefetcher->prefetch(R * height * C * 16);
    load_sums(update, z, ldz, height);
    for (int64_t s = 0; s < steps; ++s, a = a.offset_by(depth), b = b.offset_by(depth * b.ld)) {
      if constexpr (bf16x3) {
        load_right(b.lo, b.ld);
        multiply_add<false>(a.hi, a.ld, height);
        load_right(b.hi, b.ld);
        multiply_add<R <= 2>(a.hi, a.ld, height);
        multiply_add<false>(a.lo, a.ld, height);
      } else {
        load_right(b.hi, b.ld);
        multiply_add<false>(a.hi, a.ld, height);
      }
    }
    if (!bf16x3 || update != Update::add) return store_sums(z, ldz, height);
    alignas(64) float sum[4 * 16 * 16];
    store_sums(sum, C * 16, height);
    for (int i = 0; i < R * height; ++i)
      for (int j = 0; j < C * 16; j += 16)
        *reinterpret_cast<Sixteen*>(z + i * ldz + j) += *reinterpret_cast<const Sixteen*>(sum + i * C * 16 + j);
  }
};

/// Rows [first, first + steps * depth) of B [k2, m]; B in panels, or as one of the row stride b.ld.
template <class Tiles, bool bf16x3>
static void multiply_panels(int64_t n, int64_t k2, int64_t m, int64_t first, int64_t steps, int depth, Bf16Matrix a,
                            Bf16Matrix b, bool panels, float* z, int64_t ldz, Update update, Prefetcher* prefetcher) {
  int configured = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int rows = static_cast<int>(n - i < kBlock ? (n - i + kRowStep - 1) / kRowStep * kRowStep : kBlock);
    const int tiles = rows <= 16 ? 1 : rows <= 32 ? 2 : 4, height = rows / tiles;  // exact: 40 rows are 4 of 10
    if (height != configured) {
      TileConfig c = {};
      c.palette = 1;
      for (int t = 0; t < 8; ++t) {
        c.rows[t] = static_cast<uint8_t>(t == 4 || t == 5 ? depth : height);
        c.row_bytes[t] = static_cast<uint16_t>(t < 6 ? 64 : depth * 4);
      }
      Tiles::configure(c);
      configured = height;
    }
    const Bf16Matrix left = a.offset_by(i * a.ld + first);
    for (int64_t from = 0, width; from < m; from += width) {
      width = panels ? panel_width(m, from) : pad(m);
      Bf16Matrix panel = b.offset_by(k2 * from);
      if (panels) panel.ld = width;
      for (int64_t column = 0; column < width;) {
        const Bf16Matrix right = panel.offset_by(first * panel.ld + column);
        float* const out = z + i * ldz + from + column;
        const auto run = [&](auto block, int r) __attribute__((always_inline)) {
          block.run(steps, depth, height, left.offset_by(r * height * a.ld), right, out + r * height * ldz, ldz, update,
                    prefetcher);
        };
        const bool pair = width - column >= 32;
        if (pair && tiles == 1) run(Block<Tiles, bf16x3, 1, 2>(), 0);
        for (int r = 0; pair && r + 2 <= tiles; r += 2) run(Block<Tiles, bf16x3, 2, 2>(), r);
        if (!pair && tiles == 1) run(Block<Tiles, bf16x3, 1, 1>(), 0);
        if (!pair && tiles == 2) run(Block<Tiles, bf16x3, 2, 1>(), 0);
        if (!pair && tiles == 4) run(Block<Tiles, bf16x3, 4, 1>(), 0);
        column += pair ? 32 : 16;
      }
    }
  }
}

template <class Tiles, bool bf16x3>
static void product(int64_t n, int64_t k2, int64_t m, Bf16Matrix a, Bf16Matrix b, bool panels, float* z, int64_t ldz,
                    Update update, Prefetcher* prefetcher) {
  const int64_t least = (k2 + 15) / 16;
  const int depth = k2 % least == 0 ? static_cast<int>(k2 / least) : 16, rest = static_cast<int>(k2 % depth);
  multiply_panels<Tiles, bf16x3>(n, k2, m, 0, k2 / depth, depth, a, b, panels, z, ldz, update, prefetcher);
  if (rest > 0)
    multiply_panels<Tiles, bf16x3>(n, k2, m, k2 - rest, 1, rest, a, b, panels, z, ldz,
                                   update == Update::overwrite ? Update::accumulate : update, nullptr);
}

template <class Tiles, bool bf16x3>
static void accumulate_product(int64_t n2, int64_t w, int64_t m, Bf16Matrix v, Bf16Matrix e, float* c, int64_t ldc) {
  constexpr int64_t kMaxDepth = 32;
  alignas(64) uint32_t transposed[1 + bf16x3][kBlock * kMaxDepth];
  for (int64_t k = 0; k < n2; k += kMaxDepth)
    for (int64_t i = 0; i < w; i += kBlock) {
      const int64_t depth = n2 - k < kMaxDepth ? n2 - k : kMaxDepth, rows = w - i < kBlock ? w - i : kBlock,
                    ld = pad(depth);
      for (int half = 0; half <= bf16x3; ++half) {
        uint32_t* out = transposed[half];
        Tiles::pack(rows, depth, reinterpret_cast<const float*>((half ? v.lo : v.hi) + k * v.ld + i), v.ld,
                    reinterpret_cast<float*>(out));
        __builtin_memset(out + rows * ld, 0, static_cast<size_t>(-rows & (kRowStep - 1)) * static_cast<size_t>(ld) * 4);
      }
      product<Tiles, bf16x3>(rows, depth, m, {transposed[0], transposed[bf16x3], ld}, e.offset_by(k * e.ld), false,
                             c + i * ldc, ldc, bf16x3 ? Update::add : Update::accumulate, nullptr);
    }
  Tiles::release();
}

/// The bfloat16 products of a table of kernels.
template <class Tiles>
struct Products {
  static void matmul(int n, int64_t k2, int64_t m, const uint32_t* a, int64_t lda, const uint32_t* packed, float* z,
                     int64_t ldz, Prefetcher* prefetcher) {
    product<Tiles, false>(n, k2, m, {a, a, lda}, {packed, packed, 0}, true, z, ldz, Update::overwrite, prefetcher);
    Tiles::release();
  }
  static void accumulate(int n2, int64_t w, int64_t m, const uint32_t* v, int64_t ldv, const uint32_t* e, int64_t lde,
                         float* c, int64_t ldc) {
    accumulate_product<Tiles, false>(n2, w, m, {v, v, ldv}, {e, e, lde}, c, ldc);
  }
  static void matmul_bf16x3(int n, int64_t k2, int64_t m, const uint32_t* a_hi, const uint32_t* a_lo, int64_t lda,
                            const uint32_t* packed_hi, const uint32_t* packed_lo, float* z, int64_t ldz,
                            Prefetcher* prefetcher) {
    product<Tiles, true>(n, k2, m, {a_hi, a_lo, lda}, {packed_hi, packed_lo, 0}, true, z, ldz, Update::overwrite,
                         prefetcher);
    Tiles::release();
  }
  static void accumulate_bf16x3(int n2, int64_t w, int64_t m, const uint32_t* v_hi, const uint32_t* v_lo, int64_t ldv,
                                const uint32_t* e_hi, const uint32_t* e_lo, int64_t lde, float* c, int64_t ldc) {
    accumulate_product<Tiles, true>(n2, w, m, {v_hi, v_lo, ldv}, {e_hi, e_lo, lde}, c, ldc);
  }
  static constexpr Kernels replaced_in(Kernels k) {
    k.matmul_bf16 = matmul;
    k.accumulate_bf16 = accumulate;
    k.matmul_bf16x3 = matmul_bf16x3;
    k.accumulate_bf16x3 = accumulate_bf16x3;
    return k;
  }
};

#undef HISAC_INLINE

}  // namespace
}  // namespace hisac::simd
