// SPDX-License-Identifier: Apache-2.0
// A small block of rows goes through all levels while its residuals stay in cache. So x is read once, and codes are
// written once.
#include <algorithm>
#include <numeric>

#include "base/parallel.h"
#include "codebook/body.h"
#include "cpu/nearest.h"
#include "cpu/rows.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

/// Of a worker, for kScreenRows rows.
struct Scratch {
  float* r = nullptr;            // [rows, D] the residuals
  uint32_t* screened = nullptr;  // [rows, screened_width] the residuals as products take them
  float* scores = nullptr;       // [rows, pad(C)]
  int32_t* survivors = nullptr;  // [C]
};

struct Encoder {
  const Context& context;
  const Codebook& book;
  Rows x{};
  int32_t* codes = nullptr;    // [T, L]
  Scratch* scratch = nullptr;  // of each worker

  void carve(Arena& arena) noexcept {
    const int64_t* const sizes = book.body().size;
    const int64_t largest = *std::max_element(sizes, sizes + book.levels());
    scratch = arena.take_each<Scratch>(workers_of(context), [&](Scratch& s) {
      s.r = arena.take<float>(kScreenRows * book.width());
      s.screened = arena.take<uint32_t>(kScreenRows * screened_width(book.width()));
      s.scores = arena.take<float>(kScreenRows * simd::pad(largest));
      s.survivors = arena.take<int32_t>(largest);
    });
  }

  void run() noexcept {
    parallel_pieces(context, x.rows, kScreenRows, [&](int64_t begin, int64_t end, int worker) {
      for (int64_t i = begin; i < end; i += kScreenRows)
        block(i, static_cast<int>(std::min<int64_t>(kScreenRows, end - i)), scratch[worker], codes + i * book.levels());
    });
  }

  /// out: the codes of the n rows from `begin` on.
  void block(int64_t begin, int n, Scratch& s, int32_t* out) const noexcept {
    const simd::Kernels& k = simd::kernels();
    const int64_t width = book.width(), bytes = bytes_of(x.dtype);
    const int levels = book.levels();
    const std::byte* const rows = static_cast<const std::byte*>(x.data) + begin * width * bytes;
    const int64_t last = (begin + 2 * n < x.rows ? 2 * n : x.rows - begin) * width * bytes;
    bool ok[kScreenRows];
    for (int i = 0; i < n; ++i) {
      float* const r = s.r + i * width;
      ok[i] = finite(r, width, load_row(x, begin + i, r));
      if (!ok[i]) std::fill_n(r, width, 0.f);
    }
    // the next block's
    for (int64_t byte = n * width * bytes; byte < last; byte += 64) __builtin_prefetch(rows + byte);
    for (int l = 0; l < levels; ++l) {
      const Level& level = book.body().level[l];
      nearest(level, n, s, out + l);
      if (l + 1 == levels) break;
      for (int i = 0; i < n; ++i) k.add_row(width, level.centers + out[i * levels + l] * width, -1.f, s.r + i * width);
    }
    for (int i = 0; i < n; ++i)
      if (!ok[i]) std::fill_n(out + i * levels, levels, -1);
  }

  /// out[i L] = the nearest code of residual i, of n.
  void nearest(const Level& level, int n, Scratch& s, int32_t* out) const noexcept {
    const simd::Kernels& k = simd::kernels();
    const int64_t ld = simd::pad(level.size), width = level.width;
    simd::Rounded sums[kScreenRows];
    for (int i = 0; i < n; ++i) sums[i] = screened(level, s.r + i * width, s.screened + i * screened_width(width));
    products(level, n, s.screened, 0, level.size, s.scores, ld);
    for (int i = 0; i < n; ++i) {
      simd::Screen row;
      int64_t found = level.size;
      if (screen_of(level, sums[i], &row))
        found = k.screen(level.size, s.scores + i * ld, row, s.survivors);
      else
        std::iota(s.survivors, s.survivors + found, 0);
      out[i * book.levels()] = found == 1 ? s.survivors[0] : closest(level, s.r + i * width, s.survivors, found);
    }
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
