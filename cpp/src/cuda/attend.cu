// SPDX-License-Identifier: Apache-2.0
// `attend` in two launches: units planned, tiles. Its backward in five: units, what is known of each candidate, d q,
// then all that sums over candidates, and users with several spans summed.
#include <algorithm>
#include <cmath>

#include "base/arena.h"
#include "cuda/attend_tile.h"
#include "cuda/device/block.h"
#include "cuda/device/launcher.h"
#include "cuda/verbs.h"

namespace hisac::cuda {
namespace {

using namespace attention;

constexpr int kWide = 256;  // threads of the small kernels
constexpr int kBlocks = 3;  // of the tiles' kernels, that a processor holds

/// Block 0: tiles of candidates, nobody's too; block 1: spans, at least one a user. A range begins where all earlier
/// ones have ended, whatever the offsets hold: no candidate is two users'.
SIMT_KERNEL(kWide) plan_units(SIMT_CONSTANT Task t) {
  const bool spans = simt::block() == 1;
  if (simt::block() > (t.spans.head != nullptr)) return;
  const List& list = spans ? t.spans : t.tiles;
  const int64_t size = spans ? kSpan : 16 * t.warps;
  int64_t ended = 0, units = 0;  // units; above 32 bits: users of several
  for (int64_t first = 0; first <= t.users; first += kWide) {
    const int64_t b = first + simt::thread();
    int64_t start = b < t.users ? t.start(b) : t.rows;
    int64_t end = b < t.users ? t.end(b) : t.rows;
    const int64_t before = scan_threads(end, &ended, Larger{});
    start = start < before ? before : start;
    end = end < start ? start : end;
    int64_t gap_units = 0, user_units = (end - start + size - 1) / size;
    SIMT_UNLESS_PLANTED(58, gap_units = spans ? 0 : (start - before + size - 1) / size);
    if (spans && b < t.users && user_units == 0) user_units = 1;
    const int64_t several = spans && user_units > 1;
    const int64_t place = scan_threads(gap_units + user_units + (several << 32), &units, Add{});
    const int64_t unit = place & 0xffffffff;
    const auto cut = [&](int64_t from, int64_t to, int64_t n, int64_t where, int64_t user) {
      for (int64_t i = 0; i < n; ++i)
        list.unit[where + i] = {static_cast<int32_t>(user), static_cast<int32_t>(from + i * size),
                                static_cast<int32_t>(from + (i + 1) * size < to ? from + (i + 1) * size : to)};
    };
    cut(before, start, gap_units, unit, -1);
    cut(start, end, user_units, unit + gap_units, b);
    if (!spans) continue;
    if (b <= t.users) list.before[b] = static_cast<int32_t>(unit);
    if (several)
      list.shared[place >> 32] = {static_cast<int32_t>(b), static_cast<int32_t>(unit - b),
                                  static_cast<int32_t>(user_units)};
  }
  if (simt::thread() == 0)
    *list.head = {static_cast<int32_t>(units & 0xffffffff), static_cast<int32_t>(units >> 32), 0};
}

SIMT_DEVICE void clear(float* out, int64_t n) {
  const int64_t step = int64_t{simt::blocks()} * kWide;
  for (int64_t i = int64_t{simt::block()} * kWide + simt::thread(); out && i < n; i += step) out[i] = 0;
}

/// Eight lanes a candidate's head: -lse in base 2, no weight where there are no tokens; dlse - dout . out. Tokens of
/// nobody have gradients of zero.
SIMT_KERNEL(kWide) candidate_terms(SIMT_CONSTANT Task t) {
  if (t.token_spans.starts) {
    SIMT_UNLESS_PLANTED(74, clear(t.gradients.keys.data, t.token_rows * t.heads * t.keys.width));
    SIMT_UNLESS_PLANTED(75, clear(t.gradients.values.data, t.token_rows * t.heads * t.values.width));
    SIMT_UNLESS_PLANTED(76, clear(t.gradients.bias.data, t.token_rows));
  }
  const int64_t rows = t.rows * t.heads, step = int64_t{simt::blocks()} * (kWide / 8);
  for (int64_t first = int64_t{simt::block()} * (kWide / 8); first < rows; first += step) {
    const int64_t row = first + simt::thread() / 8;
    double dot = 0;
    for (int c = simt::lane() & 7; row < rows && c < t.values.width; c += 8)
      dot += static_cast<double>(element(t.d_out.data, t.d_out.type, row * t.values.width + c)) *
             static_cast<double>(element(t.forward.out.data, t.forward.out.dtype, row * t.values.width + c));
    for (int m = 4; m; m /= 2) dot += simt::shuffle_xor(dot, m);
    if (row >= rows || (simt::lane() & 7)) continue;
    const float lse = t.forward.lse.data[row], *const d_lse = t.forward.d_lse.data;
    const bool none = lse == -kInfinity;
    t.shift[row] = lse != lse ? lse : -base2(lse);
    SIMT_UNLESS_PLANTED(60, t.shift[row] = none ? -kInfinity : t.shift[row]);
    t.slope[row] = none ? 0.f : static_cast<float>((d_lse ? static_cast<double>(d_lse[row]) : 0.0) - dot);
  }
}

template <Pass kPass, int P>
SIMT_KERNEL(kThreads, kBlocks)
attend_tiles(SIMT_CONSTANT Task t) {
  AttendTile<kPass, P>(t).run();
}

/// Spans' sums in their order, in float64; a bias is all heads'.
SIMT_KERNEL(kWide) sum_spans(SIMT_CONSTANT Task t) {
  const int64_t key = int64_t{t.heads} * t.keys.width, value = int64_t{t.heads} * t.values.width;  // of a token
  const int64_t keys = t.tokens * key, each = t.slot_floats();
  const int64_t pieces = (each + kWide - 1) / kWide;
  for (int64_t i = simt::block(); i < t.spans.head->shared * pieces; i += simt::blocks()) {
    const SharedUser s = t.spans.shared[i / pieces];
    const int64_t e = i % pieces * kWide + simt::thread();
    const int64_t first = t.first_token(s.user), tokens = t.tokens_of(s.user);
    if (e < keys ? e >= tokens * key : e - keys >= tokens * value) continue;  // past the user's last token
    float* const out =
        e < keys ? t.gradients.keys.data + first * key + e : t.gradients.values.data + first * value + (e - keys);
    const float* const slots = t.slots + s.slot * each + e;
    double sum = static_cast<double>(*out);
    for (int64_t k = 0; k < s.count - 1; ++k) SIMT_UNLESS_PLANTED(59, sum += static_cast<double>(slots[k * each]));
    *out = static_cast<float>(sum);
  }
  const int64_t users = t.gradients.bias.data ? t.users : 0;
  for (int b = simt::block(); b < users; b += simt::blocks()) {
    const int64_t first = t.first_token(b);
    for (int m = simt::thread(); m < t.tokens_of(b); m += kWide) {
      double sum = 0;
      for (int h = 0; h < t.heads; ++h) sum += static_cast<double>(t.biases[h * t.token_rows + first + m]);
      for (int64_t k = t.spans.before[b] - b; k < t.spans.before[b + 1] - b - 1; ++k)  // slots
        for (int h = 0; h < t.heads; ++h) sum += static_cast<double>(t.slot_biases[(k * t.heads + h) * t.tokens + m]);
      t.gradients.bias.data[first + m] = static_cast<float>(sum);
    }
  }
}

// ---- host

/// Inputs of one part.
bool exact(const Task& t) { return t.q.type == DType::bfloat16 && (!t.d_out.data || t.d_out.type == DType::bfloat16); }

Task describe(const AttendInputs& in) {
  Task t;
  t.q = Matrix(in.q);
  t.keys = Matrix(in.keys);
  t.values = Matrix(in.values);
  static_cast<Spans&>(t) = in.candidates;
  t.rows = in.q.rows / std::max<int64_t>(1, in.heads);  // a workspace may be asked for before H is checked
  static_cast<Spans&>(t.token_spans) = in.tokens;
  t.token_rows = t.token_spans.rows = in.keys.rows / std::max<int64_t>(1, in.heads);
  t.tokens = static_cast<int>(in.agents);
  t.heads = static_cast<int>(in.heads);
  t.bias = in.bias.data;
  t.scale = in.scale;
  t.rate = in.scale * kLog2e;
  for (t.spread = 1; std::ldexp(1.0, static_cast<int>(t.spread)) < 2.0 * t.tokens;) ++t.spread;
  return t;
}

/// Warps of a block, as many as there is shared memory for, and where its arrays lie there.
Status lay_out(Task& t, const char* verb, bool gradients, const simt::Machine& machine) {
  const int64_t parts = exact(t) ? 1 : 2, depth[2] = {t.q.depth, t.values.depth};
  for (t.warps = kThreads / 32;; t.warps /= 2) {
    SharedLayout shared;
    for (int i = 0; i < 2; ++i) {
      t.offset.kept[i] = shared.take(i && !gradients ? 0 : (depth[i] + 8) * 16 * t.warps * 2 * parts);
      t.offset.streamed[i] = shared.take((std::min<int64_t>(depth[i], kChunk) + 8) * kRows * 2 * parts);
    }
    t.offset.kept_terms = shared.take(2 * 16 * t.warps * 4);
    t.offset.streamed_terms = shared.take(2 * kRows * 4);
    t.offset.work = shared.take(AttendTile<kForward, 1>::kWorkBytes);
    t.shared_bytes = static_cast<size_t>(shared.bytes());
    if (t.shared_bytes <= machine.shared) return {};
    if (t.warps == 1)
      return Status::error(Code::not_implemented,
                           "%s: expected d and V that need at most %zu bytes of shared memory a block on this device, "
                           "got %d and %d, which need %zu",
                           verb, machine.shared, t.q.width, t.values.width, t.shared_bytes);
  }
}

void carve(Task& t, Arena& arena, bool gradients) {
  const int64_t most = t.rows / kSpan;  // spans that are not a user's first; users of several
  t.tiles.head = arena.take<List::Head>(1);
  t.tiles.unit = arena.take<Unit>(t.rows / 16 + 2 * t.users + 1);
  if (!gradients) return;
  t.spans.head = arena.take<List::Head>(1);
  t.spans.unit = arena.take<Unit>(t.users + most);
  t.spans.before = arena.take<int32_t>(t.users + 1);
  t.spans.shared = arena.take<SharedUser>(most);
  t.shift = arena.take<float>(t.rows * t.heads);
  t.slope = arena.take<float>(t.rows * t.heads);
  t.slots = arena.take<float>(most * t.slot_floats());
  t.biases = arena.take<float>(t.bias ? t.token_rows * t.heads : 0);
  t.slot_biases = arena.take<float>(t.bias ? most * t.heads * t.tokens : 0);
}

Status check_limits(const char* verb, const AttendInputs& in) {
  const int64_t most = std::max({in.q.rows / in.heads, in.keys.rows / in.heads, in.candidates.users, in.agents,
                                 in.heads, in.q.width, in.values.width});
  if (most <= 1 << 30) return {};
  return Status::error(Code::not_implemented,
                       "%s: expected N, B, M, R, H, d and V up to 2^30 on CUDA, got one of %" PRId64, verb, most);
}

/// Both verbs: `run(launch)` gives each launch to `launch(kernel, blocks a processor, threads, shared bytes)`.
template <class Run>
Status launch_all(const Context& context, const char* verb, Task& t, bool gradients, Run run) {
  Launcher launch(verb, context);
  HISAC_TRY(launch.status());
  HISAC_TRY(lay_out(t, verb, gradients, launch.machine));
  Arena arena(context.workspace);
  carve(t, arena, gradients);
  HISAC_TRY(arena.check(verb));
  run([&](auto kernel, int per_processor, int threads, size_t shared_bytes) {
    launch(kernel, launch.machine.processors * per_processor, threads, shared_bytes, t);
  });
  return launch.status();
}

}  // namespace

size_t attend_workspace(const Context&, const AttendInputs& inputs) noexcept {
  Task t = describe(inputs);
  Arena arena;
  carve(t, arena, false);
  return arena.used();
}

Status attend(const Context& context, const AttendInputs& inputs, Attended out) noexcept {
  HISAC_TRY(check_limits("attend", inputs));
  Task t = describe(inputs);
  t.result = out;
  return launch_all(context, "attend", t, false, [&](auto launch) {
    launch(plan_units, 2, kWide, kFront);
    launch(exact(t) ? attend_tiles<kForward, 1> : attend_tiles<kForward, 2>, kBlocks, 32 * t.warps, t.shared_bytes);
  });
}

size_t attend_backward_workspace(const Context&, const AttendInputs& inputs) noexcept {
  Task t = describe(inputs);
  Arena arena;
  carve(t, arena, true);
  return arena.used();
}

Status attend_backward(const Context& context, const AttendInputs& inputs, const AttendForward& forward,
                       const AttendGradients& out) noexcept {
  HISAC_TRY(check_limits("attend_backward", inputs));
  Task t = describe(inputs);
  t.d_out = Matrix(forward.d_out);
  t.forward = forward;
  t.gradients = out;
  return launch_all(context, "attend_backward", t, true, [&](auto launch) {
    launch(plan_units, 2, kWide, kFront);
    launch(candidate_terms, 4, kWide, 0);
    launch(exact(t) ? attend_tiles<kOfCandidates, 1> : attend_tiles<kOfCandidates, 2>, kBlocks, 32 * t.warps,
           t.shared_bytes);
    if (t.tokens == 0) return;
    launch(exact(t) ? attend_tiles<kOfTokens, 1> : attend_tiles<kOfTokens, 2>, kBlocks, 32 * t.warps, t.shared_bytes);
    launch(sum_spans, 4, kWide, 0);
  });
}

}  // namespace hisac::cuda
