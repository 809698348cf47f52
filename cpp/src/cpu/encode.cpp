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

/// The scratch of each worker.
NearestScratch* carve(Arena& arena, const Codebook& book, int workers) noexcept {
  const int64_t* const sizes = book.body().size;
  const int64_t largest = *std::max_element(sizes, sizes + book.levels());
  return arena.take_each<NearestScratch>(workers, [&](NearestScratch& s) { s.carve(arena, book.width(), largest); });
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
    ok[i] = finite(r, width, load_row(x, begin + i, r));
    if (!ok[i]) std::fill_n(r, width, 0.f);
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
  NearestScratch* const scratch = carve(arena, book, workers_of(context));
  HISAC_TRY(arena.check("encode"));
  parallel_for(context, (x.rows + rows - 1) / rows, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t i = begin * rows; i < end * rows && i < x.rows; i += rows)
      encode_block(book, x, i, static_cast<int>(std::min(rows, x.rows - i)), scratch[worker],
                   codes.data + i * book.levels());
  });
  return {};
}

}  // namespace hisac::cpu
