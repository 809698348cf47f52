// SPDX-License-Identifier: Apache-2.0
#include "cuda/table_gradient.h"

#include "base/radix_sort.h"
#include "cuda/device/block.h"

namespace hisac::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kSortThreads = 1024;
constexpr int kPlacesAt = kFront + 16;  // in the sort's shared memory

/// A block has a table: its slots by key, stably, least significant digit first.
SIMT_KERNEL(kSortThreads)
sort_slots(SIMT_CONSTANT TableGradient x, SIMT_CONSTANT TableGradient v, SIMT_CONSTANT Chunks chunks, int passes) {
  const TableGradient& t = simt::block() == 0 ? x : v;
  if (!t.gathers() || !t.given) return;
  const uint32_t n = static_cast<uint32_t>(chunks.slots());
  for (uint32_t i = static_cast<uint32_t>(simt::thread()); i < n; i += kSortThreads) {
    const int64_t behaviour = chunks.behaviour(i);
    const int64_t row = behaviour < t.ids.size ? row_in_table(t.ids, behaviour, t.table) : -1;
    t.key[i] = row < 0 ? t.table : row;
  }
  simt::sync();                    // a warp sorts keys that others wrote, where there are more than kSortThreads
  const uint32_t* from = nullptr;  // null: the slots as they stand
  for (int p = 0; p < passes; ++p) {
    uint32_t* const to = (passes - p) % 2 ? t.order : t.spare;
    const auto item = [&](uint32_t i) {
      const uint32_t slot = from ? from[i] : i;
      return Keyed<uint32_t>{digit_of(static_cast<uint64_t>(t.key[slot]), kDigit * p), slot};
    };
    radix_pass<uint32_t>(n, shared<uint32_t>(kPlacesAt), item,
                         [&](uint32_t, uint32_t slot, uint32_t place) { to[place] = slot; });
    from = to;
  }
}

/// A warp has a row of the gradient.
SIMT_KERNEL(kThreads) sum_slots(SIMT_CONSTANT TableGradient t, SIMT_CONSTANT Chunks chunks) {
  const int64_t n = t.given ? chunks.slots() : 0, width = t.out.shape[1];
  for (int64_t r = int64_t{simt::block()} * kWarps + simt::warp(); r < t.out.shape[0];
       r += int64_t{simt::blocks()} * kWarps) {
    const int64_t row = row_in_table(t.listed, r, t.table);
    const auto before = [&](int64_t i) { return t.key[t.order[i]] < row; };
    int64_t first = last_of(n, before);
    SIMT_UNLESS_PLANTED(65, first += n > 0 && before(first));
    for (int64_t c = simt::lane(); c < width; c += 32) {
      double sum = 0;
      for (int64_t i = first; i < n && t.key[t.order[i]] == row; ++i)
        sum = simt::plain_sum(sum, t.rows[t.order[i] * width + c]);
      t.out.data[r * width + c] = static_cast<float>(sum);
    }
  }
}

}  // namespace

void launch_table_gradients(const TableGradient& x, const TableGradient& v, const Chunks& chunks, Launcher& launch) {
  int bits = 1;
  for (const TableGradient* t : {&x, &v})
    if (t->gathers()) bits = std::max(bits, bits_of(static_cast<uint64_t>(t->table)));
  const size_t shared_bytes = kPlacesAt + (kSortThreads / 32 << kDigit) * sizeof(uint32_t);
  if (chunks.place) launch(sort_slots, 2, kSortThreads, shared_bytes, x, v, chunks, (bits + kDigit - 1) / kDigit);
  for (const TableGradient* t : {&x, &v})
    if (t->gathers())
      launch(sum_slots, least((t->out.shape[0] + kWarps - 1) / kWarps, launch.machine.processors * 8), kThreads, 0, *t,
             chunks);
}

}  // namespace hisac::cuda
