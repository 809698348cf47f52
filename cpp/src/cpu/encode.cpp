// SPDX-License-Identifier: Apache-2.0
// A small block of rows goes through all levels while its residuals stay in cache. So x is read once, and codes are
// written once.
#include <algorithm>

#include "base/parallel.h"
#include "codebook/body.h"
#include "cpu/nearest.h"
#include "cpu/rows.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

struct Encoder {
  const Context& context;
  const Codebook& book;
  Rows x{};
  int32_t* codes = nullptr;           // [T, L]
  NearestScratch* scratch = nullptr;  // of each worker

  void carve(Arena& arena) noexcept {
    const int64_t* const sizes = book.body().size;
    const int64_t largest = *std::max_element(sizes, sizes + book.levels());
    scratch = arena.take_each<NearestScratch>(workers_of(context),
                                              [&](NearestScratch& s) { s.carve(arena, book.width(), largest); });
  }

  void run() noexcept {
    constexpr int64_t rows = NearestScratch::rows;
    parallel_pieces(context, x.rows, rows, [&](int64_t begin, int64_t end, int worker) {
      for (int64_t i = begin; i < end; i += rows)
        block(i, static_cast<int>(std::min(rows, end - i)), scratch[worker], codes + i * book.levels());
    });
  }

  /// out: the codes of the n rows from `begin` on.
  void block(int64_t begin, int n, NearestScratch& s, int32_t* out) const noexcept {
    const simd::Kernels& k = simd::kernels();
    const int64_t width = book.width(), bytes = bytes_of(x.dtype);
    const int levels = book.levels();
    const std::byte* const rows = static_cast<const std::byte*>(x.data) + begin * width * bytes;
    const int64_t last = (begin + 2 * n < x.rows ? 2 * n : x.rows - begin) * width * bytes;
    bool ok[simd::kBlock];
    for (int i = 0; i < n; ++i) {
      float* const r = s.r + i * width;
      ok[i] = finite(r, width, load_row(x, begin + i, r));
      if (!ok[i]) std::fill_n(r, width, 0.f);
    }
    for (int64_t byte = n * width * bytes; byte < last; byte += 64)
      __builtin_prefetch(rows + byte);  // the next block's
    for (int l = 0; l < levels; ++l) {
      const Level& level = book.body().level[l];
      nearest(level, n, s, out + l, levels);
      if (l + 1 == levels) break;
      for (int i = 0; i < n; ++i) k.add_row(width, level.centers + out[i * levels + l] * width, -1.f, s.r + i * width);
    }
    for (int i = 0; i < n; ++i)
      if (!ok[i]) std::fill_n(out + i * levels, levels, -1);
  }
};

}  // namespace

size_t encode_workspace(const Context& context, const Codebook& book) noexcept {
  return workspace_of(Encoder{context, book});
}

Status encode(const Context& context, const Codebook& book, Rows x, Array<int32_t, 2> codes) noexcept {
  return run_call("encode", context, Encoder{context, book, x, codes.data});
}

}  // namespace hisac::cpu
