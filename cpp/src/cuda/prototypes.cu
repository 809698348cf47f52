// SPDX-License-Identifier: Apache-2.0
// `code_prototypes`: reads no more of a codebook's image than its centers.
#include "codebook/image.h"
#include "cuda/device/elements.h"
#include "cuda/device/launcher.h"
#include "cuda/verbs.h"

namespace hisac::cuda {
namespace {

constexpr int kThreads = 256;

struct PrototypesTask {
  CodebookImage book;
  const std::byte* image;
  const int32_t* codes;
  float* out;
  int64_t rows;
};

/// A warp has a row: zero, then the codewords from the root down.
SIMT_KERNEL(kThreads) sum_codewords(SIMT_CONSTANT PrototypesTask t) {
  const int64_t warps = int64_t{simt::blocks()} * (kThreads / 32);
  for (int64_t row = int64_t{simt::block()} * (kThreads / 32) + simt::warp(); row < t.rows; row += warps) {
    const int32_t* const codes = t.codes + row * t.book.levels;
    bool valid = true;
    for (int l = 0; l < t.book.levels; ++l)
      valid = valid && static_cast<uint32_t>(codes[l]) < static_cast<uint32_t>(t.book.level[l].size);
    for (int d = simt::lane(); d < t.book.width; d += 32) {
      float sum = 0;
      for (int l = 0; valid && l < t.book.levels; ++l)
        sum += reinterpret_cast<const float*>(t.image + t.book.level[l].centers)[int64_t{codes[l]} * t.book.pitch + d];
      t.out[row * t.book.width + d] = sum;
    }
  }
}

}  // namespace

Status code_prototypes(const Context& context, const Codebook& book, Array<const int32_t, 2> codes,
                       Array<float, 2> out) noexcept {
  const PrototypesTask t{CodebookImage(book), context.codebook_image.data, codes.data, out.data, codes.shape[0]};
  HISAC_TRY(check_image("prototypes", context, t.book));
  Launcher launch("prototypes", context);
  launch(sum_codewords, least((t.rows + kThreads / 32 - 1) / (kThreads / 32), launch.machine.processors * 8), kThreads,
         0, t);
  return launch.status();
}

}  // namespace hisac::cuda
