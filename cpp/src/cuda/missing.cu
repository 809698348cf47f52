// SPDX-License-Identifier: Apache-2.0
// `missing`: the behaviours that `route` takes for absent though they have a v, a warp for each behaviour.
#include "codebook/checks.h"
#include "cuda/chunks.h"
#include "cuda/histories.h"
#include "cuda/verbs.h"

namespace hisac::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

SIMT_KERNEL(kThreads) mark_missing(SIMT_CONSTANT Behaviours t, SIMT_CONSTANT Chunks chunks, float* out) {
  for (int64_t b = int64_t{simt::block()} * kWarps + simt::warp(); b < t.rows; b += int64_t{simt::blocks()} * kWarps) {
    const int64_t row = t.v_row(b);
    bool missing = false;  // unless some history has it
    chunks.each_user(t, b, b + 1, [&](int64_t) { missing = true; });
    missing = missing && t.norm_of(b) < 0 && t.v.data && row >= 0;
    for (int64_t c = simt::lane(); missing && c < t.v.width; c += 32) missing = finite(t.v_element(row, c));
    if (const bool all = simt::ballot(!missing) == 0; simt::lane() == 0) out[b] = all ? 0.f : -kInfinity;
  }
}

Chunks describe(const Histories& in, Arena& arena) {
  Chunks chunks;
  chunks.size = 32;
  chunks.count = static_cast<int>((in.behaviours() + 31) / 32);
  chunks.carve(chunks.count, arena);
  return chunks;
}

}  // namespace

size_t missing_workspace(const Context&, const Codebook*, const Histories& histories) noexcept {
  Arena arena;
  describe(histories, arena);
  return arena.used();
}

Status missing(const Context& context, const Codebook* book, const Histories& histories, Array<float, 1> out) noexcept {
  HISAC_TRY(check_counts("missing", histories));
  Behaviours t = behaviours_of(book, histories, width_of(book, histories));
  HISAC_TRY(place_centers("missing", context, book, t));
  Arena arena(context.workspace);
  const Chunks chunks = describe(histories, arena);
  HISAC_TRY(arena.check("missing"));
  Launcher launch("missing", context);
  launch_clear_chunks(chunks, launch);
  launch_plan_chunks(t, chunks, launch);
  launch(mark_missing, least((t.rows + kWarps - 1) / kWarps, launch.machine.processors * 16), kThreads, 0, t, chunks,
         out.data);
  return launch.status();
}

}  // namespace hisac::cuda
