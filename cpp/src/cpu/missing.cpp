// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "base/checks.h"
#include "base/parallel.h"
#include "codebook/checks.h"
#include "cpu/histories.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

constexpr int64_t kChunk = 256;  // behaviours that a worker takes at a time

}  // namespace

size_t missing_workspace(const Context& context, const Codebook* book, const Histories& histories) noexcept {
  Arena arena;
  arena.take<float>(workers_of(context), width_of(book, histories) + histories.v.width);
  return arena.used();
}

Status missing(const Context& context, const Codebook* book, const Histories& histories, Array<float, 1> out) noexcept {
  const int64_t width = width_of(book, histories), value_width = histories.v.width, rows = histories.behaviours();
  const RowLoader loader(book, histories, width);
  const RowSource values(histories.v, histories.v_ids);
  Arena arena(context.workspace);
  float* const scratch = arena.take<float>(workers_of(context), width + value_width);
  HISAC_TRY(arena.check("missing"));
  parallel_for(context, (rows + kChunk - 1) / kChunk, [&](int64_t begin, int64_t end, int w) {
    float *const x = scratch + w * (width + value_width), *const v = x + width;
    for (int64_t i = begin * kChunk; i < std::min(end * kChunk, rows); ++i) {
      float norm;
      const bool missing = values.has(i) && !loader.load_x(i, x, &norm) && finite(v, value_width, values.load(i, v));
      out.data[i] = missing ? 0.f : -INFINITY;
    }
  });
  return {};
}

}  // namespace hisac::cpu
