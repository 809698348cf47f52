// SPDX-License-Identifier: Apache-2.0
// `leaf_sums_backward`: a warp has a behaviour and, if it is present, takes the users whose histories hold it, in their
// order. A user's sums are sorted by leaf, so that of the behaviour's leaf is searched for.
#include "codebook/checks.h"
#include "cuda/chunks.h"
#include "cuda/device/block.h"
#include "cuda/device/launcher.h"
#include "cuda/histories.h"
#include "cuda/table_gradient.h"
#include "cuda/verbs.h"

namespace hisac::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct LeafBackTask : Behaviours {
  LeafSumsForward forward;
  ClampedSpans sums;      // of forward
  LeafSumsGradients out;  // of a table v: the scratch
  TableGradient of_v;
  Chunks chunks;
};

class LeafBack {
 public:
  SIMT_DEVICE LeafBack(const LeafBackTask& task, int64_t behaviour) : t(task), f(task.forward), b(behaviour) {}

  SIMT_DEVICE void run() {
    const int64_t chunk = b / t.chunks.size;
    if (t.norm_of(b) >= 0) t.chunks.each_user(t, b, b + 1, [&](int64_t user) { give(user); });
    if (t.out.bias.data && simt::lane() == 0) t.out.bias.data[b] = static_cast<float>(d_bias);
    const bool has_row = t.out.v.data && !(t.of_v.gathers() && t.chunks.last[chunk] == 0);
    for (int64_t c = simt::lane(); has_row && !given && c < t.v.width; c += 32) d_v(c) = 0;
  }

 private:
  SIMT_DEVICE float& d_v(int64_t c) const {
    const int64_t row = t.of_v.gathers() ? b + t.chunks.shift(b / t.chunks.size) : b;
    return t.out.v.data[row * t.v.width + c];
  }

  /// The row of a user's sum of the behaviour's leaf; -1 where there is none.
  SIMT_DEVICE int64_t find(int64_t user) const {
    const int64_t first = t.sums.start(user), n = t.sums.length(user);
    const int32_t* const leaf = t.codes + t.x_row(b) * t.levels;
    const auto compare = [&](int64_t sum) {
      const int32_t* const codes = f.sums.codes.data + sum * t.levels;
      int l = 0;
      while (l + 1 < t.levels && codes[l] == leaf[l]) ++l;
      return codes[l] < leaf[l] ? -1 : codes[l] > leaf[l];
    };
    const int64_t sum = first + last_of(n, [&](int64_t i) { return compare(first + i) <= 0; });
    return n > 0 && compare(sum) == 0 ? sum : -1;
  }

  /// What the behaviour's share of a user's sum brings.
  SIMT_DEVICE void give(int64_t user) {
    const int64_t sum = find(user), x_row = t.x_row(b), v_row = t.v_row(b), x = sum * t.x.width, v = sum * t.v.width;
    if (sum < 0) return;
    const float share = simt::exp2(((t.bias ? t.bias[b] : 0.f) - f.sums.bias.data[sum]) * kLog2e);
    const auto number = [](const void* p, int64_t i) {
      return p ? static_cast<double>(static_cast<const float*>(p)[i]) : 0.0;
    };
    double d = 0, squares = 0;
    for (int64_t c = simt::lane(); f.d_v.data && c < t.v.width; c += 32) {
      const float dv = f.d_v.data[v + c];
      if (t.out.v.data) d_v(c) = simt::fused(share, dv, given ? d_v(c) : 0.f);
      if (t.out.bias.data) d += static_cast<double>(dv) * (t.v_element(v_row, c) - number(f.sums.v.data, v + c));
    }
    SIMT_UNLESS_PLANTED(63, given |= f.d_v.data != nullptr);
    for (int64_t c = simt::lane(); t.out.bias.data && (f.d_x.data || f.d_spread.data) && c < t.x.width; c += 32) {
      const double difference = t.x_element(x_row, c) - number(f.sums.x.data, x + c);
      d += number(f.d_x.data, x + c) * difference;
      squares += difference * difference;
    }
    for (int m = 16; m; m /= 2) {
      d += simt::shuffle_xor(d, m);
      squares += simt::shuffle_xor(squares, m);
    }
    const double more = number(t.spread, b) + squares - number(f.sums.spread.data, sum);
    d_bias += static_cast<double>(share) * (d + number(f.d_bias.data, sum) + number(f.d_spread.data, sum) * more);
  }

  const LeafBackTask& t;
  const LeafSumsForward& f;
  const int64_t b;
  bool given = false;  // whether its dv holds a sum
  double d_bias = 0;
};

SIMT_KERNEL(kThreads, 4) give_back(SIMT_CONSTANT LeafBackTask t) {
  for (int64_t b = int64_t{simt::block()} * kWarps + simt::warp(); b < t.rows; b += int64_t{simt::blocks()} * kWarps)
    LeafBack(t, b).run();
}

LeafBackTask describe(const Codebook& book, const Histories& in, const LeafSumsGradients& out, Arena& arena) {
  LeafBackTask t;
  static_cast<Behaviours&>(t) = behaviours_of(&book, in, width_of(&book, in));
  t.chunks.size = 32;
  t.chunks.count = static_cast<int>((t.rows + 31) / 32);
  t.out = out;
  t.of_v = {in.v_ids, in.v.rows, out.v_rows, out.v, true};
  t.chunks.reserve_slots(t.of_v.gathers(), in.rows, t.users);
  t.chunks.carve(t.chunks.count, arena);
  t.of_v.carve(int64_t{t.chunks.most} * t.chunks.size, arena, &t.out.v);
  return t;
}

}  // namespace

size_t leaf_sums_backward_workspace(const Context&, const Codebook& book, const Histories& histories,
                                    const LeafSumsGradients& out) noexcept {
  Arena arena;
  describe(book, histories, out, arena);
  return arena.used();
}

Status leaf_sums_backward(const Context& context, const Codebook& book, const Histories& histories,
                          const LeafSumsForward& forward, const LeafSumsGradients& out) noexcept {
  HISAC_TRY(check_counts("leaf_sums_backward", histories));
  Arena arena(context.workspace);
  LeafBackTask t = describe(book, histories, out, arena);
  HISAC_TRY(arena.check("leaf_sums_backward"));
  HISAC_TRY(place_centers("leaf_sums_backward", context, &book, t));
  t.forward = forward;
  static_cast<Spans&>(t.sums) = forward.sums.offsets;
  t.sums.rows = forward.sums.codes.shape[0];
  Launcher launch("leaf_sums_backward", context);
  const int processors = launch.machine.processors;
  launch_clear_chunks(t.chunks, launch);
  launch_plan_chunks(t, t.chunks, launch);
  launch(give_back, least((t.rows + kWarps - 1) / kWarps, processors * 8), kThreads, 0, t);
  launch_table_gradients({}, t.of_v, t.chunks, launch);
  return launch.status();
}

}  // namespace hisac::cuda
