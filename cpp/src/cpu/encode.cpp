// SPDX-License-Identifier: Apache-2.0
// A small block of rows goes through all levels while its residuals stay in cache. So x is read once, and codes are
// written once.
#include <cmath>

#include "base/parallel.h"
#include "codebook/body.h"
#include "cpu/nearest.h"
#include "cpu/rows.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

int64_t largest_size(const Codebook& book) noexcept {
  int64_t largest = 0;
  for (int l = 0; l < book.levels(); ++l) largest = book.size(l) > largest ? book.size(l) : largest;
  return largest;
}

/// Carves the scratch of `workers` workers; returns the last one's.
NearestScratch carve(Arena& arena, const Codebook& book, int workers) noexcept {
  NearestScratch scratch;
  for (int w = 0; w < workers; ++w) scratch.carve(arena, book.width(), largest_size(book));
  return scratch;
}

void encode_block(const Codebook& book, Rows x, int64_t begin, int n, NearestScratch& s, int32_t* codes) noexcept {
  const simd::Kernels& k = simd::kernels();
  const int64_t width = book.width(), bytes = bytes_of(x.dtype);
  const int levels = book.levels();
  const std::byte* const rows = static_cast<const std::byte*>(x.data) + begin * width * bytes;
  const int64_t last = (begin + 2 * n < x.rows ? 2 * n : x.rows - begin) * width * bytes;
  bool ok[simd::kBlock];
  for (int i = 0; i < n; ++i) {
    float* const r = s.r + i * width;
    const float squares = k.load_row(rows + i * width * bytes, x.dtype, width, r);
    ok[i] = finite(r, width, squares);
    if (!ok[i])
      for (int64_t d = 0; d < width; ++d) r[d] = 0;
  }
  for (int64_t byte = n * width * bytes; byte < last; byte += 64) __builtin_prefetch(rows + byte);  // the next block's
  for (int l = 0; l < levels; ++l) {
    const Level& level = book.body().level[l];
    nearest(level, n, s, codes + l, levels);
    if (l + 1 == levels) break;
    for (int i = 0; i < n; ++i) k.add_row(width, level.centers + codes[i * levels + l] * width, -1.f, s.r + i * width);
  }
  for (int i = 0; i < n; ++i)
    for (int l = 0; l < levels && !ok[i]; ++l) codes[i * levels + l] = -1;
}

}  // namespace

size_t encode_workspace(const Context& context, const Codebook& book) noexcept {
  Arena arena;
  carve(arena, book, workers_of(context));
  return arena.used();
}

Status encode(const Context& context, const Codebook& book, Rows x, Array<int32_t, 2> codes) noexcept {
  constexpr int64_t rows = NearestScratch::rows;
  Arena arena(context.workspace);
  carve(arena, book, workers_of(context));
  HISAC_TRY(arena.check("encode"));
  parallel_for(context, (x.rows + rows - 1) / rows, [&](int64_t begin, int64_t end, int worker) {
    Arena worker_arena(context.workspace);
    NearestScratch scratch = carve(worker_arena, book, worker + 1);
    for (int64_t i = begin * rows; i < end * rows && i < x.rows; i += rows)
      encode_block(book, x, i, static_cast<int>(x.rows - i < rows ? x.rows - i : rows), scratch,
                   codes.data + i * book.levels());
  });
  return {};
}

}  // namespace hisac::cpu
