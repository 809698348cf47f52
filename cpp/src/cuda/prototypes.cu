// SPDX-License-Identifier: Apache-2.0
// `code_prototypes`: reads no more of a codebook's image than its centers.
#include "cuda/device/launcher.h"
#include "cuda/histories.h"
#include "cuda/verbs.h"

namespace hisac::cuda {
namespace {

constexpr int kThreads = 256;

/// A warp has a row: zero, then the codewords from the root down.
SIMT_KERNEL(kThreads) sum_codewords(SIMT_CONSTANT Behaviours t, float* out) {
  const int64_t warps = int64_t{simt::blocks()} * (kThreads / 32);
  for (int64_t row = int64_t{simt::block()} * (kThreads / 32) + simt::warp(); row < t.rows; row += warps) {
    const int32_t* const codes = t.codes + row * t.levels;
    const bool valid = t.valid(codes);
    for (int d = simt::lane(); d < t.x.width; d += 32) {
      float sum = 0;
      for (int l = 0; valid && l < t.levels; ++l) sum += t.center(l, codes[l])[d];
      out[row * t.x.width + d] = sum;
    }
  }
}

}  // namespace

Status code_prototypes(const Context& context, const Codebook& book, Array<const int32_t, 2> codes,
                       Array<float, 2> out) noexcept {
  HISAC_TRY(check_device_image("prototypes", context, book));
  Histories in;
  in.codes = codes;
  Behaviours t = behaviours_of(&book, in, book.width());
  t.rows = codes.shape[0];
  HISAC_TRY(place_centers("prototypes", context, &book, t));
  Launcher launch("prototypes", context);
  launch(sum_codewords, least((t.rows + kThreads / 32 - 1) / (kThreads / 32), launch.machine.processors * 8), kThreads,
         0, t, out.data);
  return launch.status();
}

}  // namespace hisac::cuda
