// SPDX-License-Identifier: Apache-2.0
// `encode` in one launch: x is read once, codes are written once, tiles of the codebook stream from L2.
#include <algorithm>

#include "cuda/device/launcher.h"
#include "cuda/encode_tile.h"
#include "cuda/verbs.h"

namespace hisac::cuda {
namespace {

constexpr int kMostWarps = 8;  // of a block, and of a processor: 255 registers a thread

template <bool kOnChip>
SIMT_KERNEL(32 * kMostWarps)
encode_rows(SIMT_CONSTANT EncodeTask t) {
  EncodeTile<kOnChip>(t).run();
}

// ---- host

/// Offsets in shared memory, and its size.
size_t lay_out(EncodeTask& t, bool on_chip, int warps) {
  t.on_chip = on_chip;
  t.warps = warps;
  SharedLayout shared;
  t.offset.residuals = shared.take(int64_t{32} * warps * t.row_pitch() * 4);
  t.offset.panels = shared.take(2 * CodebookImage::kCodes * t.panel_pitch() * 2);
  t.offset.heads = shared.take(2 * CodebookImage::kHead * 4);
  t.offset.kept = shared.take(EncodeTile<true>::kKeptBytes * warps);
  return static_cast<size_t>(shared.bytes());
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

size_t encode_workspace(const Context&, const Codebook&) noexcept { return 0; }

Status encode(const Context& context, const Codebook& book, Rows x, Array<int32_t, 2> codes) noexcept {
  EncodeTask t(book);
  HISAC_TRY(check_device_image("encode", context, book));
  Launcher launch("encode", context);
  HISAC_TRY(launch.status());
  const simt::Machine& machine = launch.machine;
  t.x = x;
  t.aligned = aligned(x);
  t.codes = codes.data;
  t.image = context.codebook_image.bytes.data;
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

}  // namespace hisac::cuda
