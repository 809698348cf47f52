// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "base/checks.h"
#include "base/parallel.h"
#include "codebook/checks.h"
#include "cpu/histories.h"
#include "cpu/row_gradient.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

/// Histories that overlap are looked at one after another (Waves).
struct Scratch {
  Waves waves;
  Units units;
  float* rows = nullptr;  // [workers, D + V]

  void carve(Arena& arena, const Context& context, const Codebook* book, const Histories& in) noexcept {
    waves.carve(arena, in.offsets.users);
    units.carve(arena, in.offsets.users);
    rows = arena.take<float>(workers_of(context), width_of(book, in) + in.v.width);
  }
};

}  // namespace

size_t missing_workspace(const Context& context, const Codebook* book, const Histories& histories) noexcept {
  Arena arena;
  Scratch().carve(arena, context, book, histories);
  return arena.used();
}

Status missing(const Context& context, const Codebook* book, const Histories& histories, Array<float, 1> out) noexcept {
  const int64_t width = width_of(book, histories), value_width = histories.v.width;
  const RowLoader loader(book, histories, width);
  const RowSource values(histories.v, histories.v_ids);
  Arena arena(context.workspace);
  Scratch scratch;
  scratch.carve(arena, context, book, histories);
  HISAC_TRY(arena.check("missing"));
  fill(context, out.data, histories.behaviours(), -INFINITY);
  scratch.waves.plan(histories.offsets);
  for (int64_t wave = 0; wave < scratch.waves.count(); ++wave) {
    scratch.units.plan(histories.offsets, scratch.waves.users(wave), scratch.waves.size(wave), workers_of(context));
    scratch.units.run(context, [&](const Unit& unit, int w) {
      float *const x = scratch.rows + w * (width + value_width), *const v = x + width;
      const auto [begin, end] = unit.rows(histories.offsets);
      for (int64_t i = begin; i < end; ++i) {
        float norm;
        if (values.has(i) && !loader.load_x(i, x, &norm) && finite(v, value_width, values.load(i, v))) out.data[i] = 0;
      }
    });
  }
  return {};
}

}  // namespace hisac::cpu
