// SPDX-License-Identifier: Apache-2.0
// `encode` in one launch: x is read once, codes are written once, tiles of the codebook stream from L2. And what reads
// no more of a codebook's image than its centers.
#include <algorithm>

#include "encode_tile.h"
#include "launcher.h"
#include "verbs.h"

namespace hisac::cuda {
namespace {

constexpr int kMostWarps = 8;  // of a block, and of a processor: 255 registers a thread
constexpr int kThreads = 256;

template <bool kOnChip>
SIMT_KERNEL(32 * kMostWarps)
encode_rows(SIMT_CONSTANT EncodeTask t) {
  EncodeTile<kOnChip>(t).run();
}

struct PrototypesTask {
  CodebookImage book;
  const std::byte* image;
  const int32_t* codes;
  float* out;
  int64_t rows;
};

/// A warp a row: zero, then the codewords from the root down.
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

// ---- host

/// Offsets in shared memory, and its size.
size_t lay_out(EncodeTask& t, bool on_chip, int warps) {
  t.on_chip = on_chip;
  t.warps = warps;
  int64_t used = 0;
  const auto take = [&](int64_t n) {
    const int64_t at = used;
    used += n;
    return static_cast<int>(std::min<int64_t>(at, 1 << 30));
  };
  t.at.residuals = take(int64_t{32} * warps * t.row_pitch() * 4);
  t.at.panels = take(2 * CodebookImage::kCodes * t.panel_pitch() * 2);
  t.at.heads = take(2 * CodebookImage::kHead * 4);
  t.at.kept = take(EncodeTile<true>::kKeptBytes * warps);
  return static_cast<size_t>(used);
}

/// Most warps a processor, in several blocks where that costs none: one computes while another waits. Returns the
/// blocks a processor, 0 if nothing fits, or on the chip a single warp.
int choose(EncodeTask& t, bool on_chip, const simt::Machine& machine) {
  int chosen = 0, best = 0, blocks = 0;
  for (int warps = kMostWarps; warps > 0; --warps) {
    const int fit = static_cast<int>((machine.shared + 1024) / (lay_out(t, on_chip, warps) + 1024));
    const int n = std::min(fit, kMostWarps / warps), worth = 2 * n * warps + (n > 1);
    if (n * warps < (on_chip ? 2 : 1) || worth <= best) continue;
    best = worth;
    chosen = warps;
    blocks = n;
  }
  lay_out(t, on_chip, chosen);
  return blocks;
}

}  // namespace

Status encode(const Context& context, const Codebook& book, Rows x, Array<int32_t, 2> codes) noexcept {
  EncodeTask t(book);
  HISAC_TRY(check_image("encode", context, t.book));
  Launcher launch("encode", context);
  HISAC_TRY(launch.status());
  const simt::Machine& machine = launch.machine;
  t.x = x;
  t.aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.width * bytes_of(x.dtype) % 16 == 0;
  t.codes = codes.data;
  t.image = context.codebook_image.data;
  int blocks = choose(t, true, machine);
  if (blocks == 0) blocks = choose(t, false, machine);
  if (blocks == 0)
    return Status::error(Code::not_implemented, "encode: expected a device with more shared memory than %zu bytes",
                         machine.shared);
  while (t.warps > 1 && x.rows <= int64_t{16} * t.warps * machine.processors) t.warps = (t.warps + 1) / 2;  // few rows
  const size_t bytes = lay_out(t, t.on_chip, t.warps);
  t.tiles = (x.rows + 32 * t.warps - 1) / (32 * t.warps);
  launch(t.on_chip ? encode_rows<true> : encode_rows<false>, least(t.tiles, machine.processors * blocks), 32 * t.warps,
         bytes, t);
  return launch.status();
}

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
