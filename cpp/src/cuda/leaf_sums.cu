// SPDX-License-Identifier: Apache-2.0
// `leaf_sums`: first every behaviour is marked (present, its norm, its leaf), then each user's rows that are present or
// vote are sorted by leaf, then leaves are summed, in float64 over runs of rows that are summed in float32. Histories
// that overlap have entries each.
#include "hisac/leaf_sums.h"

#include <algorithm>

#include "base/arena.h"
#include "codebook/checks.h"
#include "cuda/device/block.h"
#include "cuda/device/launcher.h"
#include "cuda/histories.h"
#include "cuda/row_votes.h"
#include "cuda/verbs.h"

namespace hisac::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPlacesAt = kFront + 16;  // in the sort's shared memory
constexpr int kRun = 64;                // rows whose weighted sum is float32
constexpr int kColumns = 128;
constexpr int kShort = 4 * kRun;                  // rows of a leaf that one warp sums
constexpr float kAbsent = -1, kWithoutLeaf = -2;  // in the place of a norm

struct LeafTask : Behaviours {
  Weights weights;
  int64_t capacity = 0;  // entries, the rows of all histories; users whose rows do not fit have none
  int64_t sums = 0;      // rows of results
  int bits = 0;          // of a leaf's number
  // workspace
  int* next = nullptr;                         // the next user to take
  float* norm = nullptr;                       // [T] |x|^2 + spread, kAbsent or kWithoutLeaf
  uint64_t* leaf = nullptr;                    // [T]
  int64_t* first = nullptr;                    // [B + 1] a user's entries
  int64_t* leaves = nullptr;                   // [B + 1] how many a user has, then how many all users before it have
  int32_t *entry = nullptr, *spare = nullptr;  // [capacity] by leaf: a present row, or ~row of one that only votes
  int32_t* begin = nullptr;                    // [capacity + B] where a leaf's entries begin, then where all end
  float* weight = nullptr;                     // [capacity] of an entry
  VoteScale* scale_of_user = nullptr;          // [B]
  // results
  LeafSums out;

  /// Row number i of a user, which has a leaf.
  SIMT_DEVICE uint64_t votes(const VoteScale& user_scale, int64_t i, int64_t row) const {
    if (i >= kMostVoters) return 0;
    return weights.data ? votes_of(weights, user_scale, row) : 1;
  }
};

SIMT_DEVICE int row_of(int32_t entry) { return entry < 0 ? ~entry : entry; }
SIMT_DEVICE int warps() { return simt::blocks() * kWarps; }

/// A warp has a behaviour.
SIMT_KERNEL(kThreads) mark_rows(SIMT_CONSTANT LeafTask t) {
  if (simt::block() == 0 && simt::thread() == 0) *t.next = 0;
  for (int64_t b = int64_t{simt::block()} * kWarps + simt::warp(); b < t.rows; b += warps()) {
    const float norm = t.norm_of(b);
    const int64_t item = t.x_row(b);
    const int32_t* const codes = t.codes + item * t.levels;
    const bool has_leaf = item >= 0 && t.valid(codes);
    uint64_t leaf = 0;
    for (int l = 0; has_leaf && l < t.levels; ++l)
      leaf = leaf * static_cast<uint64_t>(t.sizes[l]) + static_cast<uint64_t>(codes[l]);
    if (simt::lane() != 0) continue;
    t.norm[b] = norm >= 0 ? norm : has_leaf ? kAbsent : kWithoutLeaf;
    t.leaf[b] = leaf;
  }
}

/// One block: where each user's entries go.
SIMT_KERNEL(kThreads) plan_entries(SIMT_CONSTANT LeafTask t) {
  const auto capped = [&](int64_t n) { return n < t.capacity ? n : t.capacity; };
  const int64_t all = scan<int64_t>(
      t.users, [&](int64_t b) { return t.length(b); },
      [&](int64_t b, int64_t place, int64_t) { t.first[b] = capped(place); });
  if (simt::thread() == 0) t.first[t.users] = capped(all);
}

/// One block: where each user's sums go. All of them fit: a user has at most as many as entries.
SIMT_KERNEL(kThreads) plan_sums(SIMT_CONSTANT LeafTask t) {
  const MutableSpans& out = t.out.offsets;
  const bool ragged = out.ends == out.starts + 1;
  const int64_t all = scan<int64_t>(
      t.users, [&](int64_t b) { return t.leaves[b]; },
      [&](int64_t b, int64_t before, int64_t leaves) {
        const int64_t start = ragged ? before : t.first[b];
        out.starts[b] = start;
        if (!ragged) out.ends[b] = start + leaves;
        t.leaves[b] = before;
      });
  if (simt::thread() != 0) return;
  t.leaves[t.users] = all;
  if (ragged) out.starts[t.users] = all;
}

/// By a block, where there are weights: those of a user's rows that are present or vote; returns how many.
SIMT_DEVICE uint32_t with_votes(const LeafTask& t, int64_t b, uint32_t n, int32_t* to) {
  const int32_t start = static_cast<int32_t>(t.start(b));
  const auto has_leaf = [&](int64_t row) { return t.norm[row] > kWithoutLeaf; };
  const VoteScale scale = scale_of_votes(t.weights, start, least(n, kMostVoters), has_leaf);
  if (simt::thread() == 0) t.scale_of_user[b] = scale;
  SIMT_UNLESS_PLANTED(18, simt::sync());
  const auto row_at = [&](uint32_t i) { return start + static_cast<int32_t>(i); };
  const auto stays = [&](uint32_t i) {
    const int32_t row = row_at(i);
    return t.norm[row] >= 0 || (has_leaf(row) && t.votes(t.scale_of_user[b], i, row) > 0);
  };
  const int kept = gather(n, stays, [&](uint32_t i, int place) {
    const int32_t row = row_at(i);
    to[place] = t.norm[row] >= 0 ? row : ~row;
  });
  return static_cast<uint32_t>(kept);
}

/// By a block: a user's rows that are present or vote, by leaf, stably, least significant digit first; then where each
/// leaf's begin.
SIMT_DEVICE void sort(const LeafTask& t, int64_t b) {
  const int64_t first = t.first[b];
  uint32_t n = static_cast<uint32_t>(t.first[b + 1] - first);
  SIMT_UNLESS_PLANTED(17, n = n < t.length(b) ? 0 : n);  // a history that does not fit whole has no sums
  const int32_t* from = nullptr;                         // null: the history as it stands
  const int passes = t.bits > kDigit ? (t.bits + kDigit - 1) / kDigit : 1;
  if (t.weights.data) {
    int32_t* const to = (passes % 2 ? t.spare : t.entry) + first;
    n = with_votes(t, b, n, to);
    from = to;
  }
  const int32_t start = static_cast<int32_t>(t.start(b));
  for (int p = 0; p < passes; ++p) {
    int32_t* const to = ((passes - p) % 2 ? t.entry : t.spare) + first;
    const auto item = [&](uint32_t e) {
      if (from) return Keyed<int32_t>{digit_of(t.leaf[row_of(from[e])], kDigit * p), from[e]};
      const int32_t row = start + static_cast<int32_t>(e);
      const float norm = t.norm[row];
      const bool stays = norm >= 0 || (norm > kWithoutLeaf && e < kMostVoters);
      return Keyed<int32_t>{stays ? digit_of(t.leaf[row], kDigit * p) : -1, norm >= 0 ? row : ~row};
    };
    n = radix_pass<int32_t>(n, shared<uint32_t>(kPlacesAt), item,
                            [&](uint32_t, int32_t entry, uint32_t place) { to[place] = entry; });
    from = to;
  }
  int32_t* const begin = t.begin + first + b;
  const int leaves = gather(
      n, [&](uint32_t e) { return e == 0 || t.leaf[row_of(from[e])] != t.leaf[row_of(from[e - 1])]; },
      [&](uint32_t e, int place) { begin[place] = static_cast<int32_t>(e); });
  if (simt::thread() != 0) return;
  begin[leaves] = static_cast<int32_t>(n);
  t.leaves[b] = leaves;
}
SIMT_KERNEL(kThreads, 6) sort_rows(SIMT_CONSTANT LeafTask t) {
  int32_t* const user = shared<int32_t>(kFront);
  for (;;) {
    if (simt::thread() == 0) *user = simt::atomic_add(t.next, 1);
    simt::sync();
    const int64_t b = *user;
    if (b >= t.users) return;
    sort(t, b);
    simt::sync();
  }
}

/// One leaf's row of sums: by a warp, or by all warps of the block, each with every eighth run.
template <bool kBlock>
class Leaf {
  static constexpr int kParts = kBlock ? kWarps : 1;

 public:
  /// Leaf `place` of all users' leaves.
  SIMT_DEVICE Leaf(const LeafTask& task, int64_t place) : t(task) {
    b = last_of(t.users, [&](int64_t user) { return t.leaves[user] <= place; });
    const int64_t g = place - t.leaves[b];
    const int32_t* const begin = t.begin + t.first[b] + b + g;
    out = t.out.offsets.starts[b] + g;
    entries = t.entry + t.first[b] + begin[0];
    weights = t.weight + t.first[b] + begin[0];
    n = begin[1] - begin[0];
  }
  SIMT_DEVICE int size() const { return n; }

  SIMT_DEVICE void sum() {
    const int lane = simt::lane();
    float max_bias = -kInfinity;
    each_run([&](int first, int last) {
      for (int e = first + lane; t.bias && e < last; e += 32)
        if (entries[e] >= 0) max_bias = larger(max_bias, t.bias[entries[e]]);
    });
    max_bias = t.bias ? over_warps<kParts>(max_bias, Larger{}) : 0.f;
    float scale = 1;  // a run's weights are at most 1 together, so that no sum of large v overflows
    while (scale * static_cast<float>(n < kRun ? n : kRun) > 1) scale /= 2;
    double mass = 0, squares = 0;
    uint64_t votes = 0;
    const int64_t start = t.start(b);
    each_run([&](int first, int last) {
      for (int e = first + lane; e < last; e += 32) {
        const int32_t row = row_of(entries[e]);
        votes += t.votes(t.scale_of_user[b], row - start, row);
        if (entries[e] < 0) continue;
        const float w = t.bias ? scale * simt::exp2((t.bias[row] - max_bias) * kLog2e) : scale;
        weights[e] = w;
        mass += static_cast<double>(w);
        squares += static_cast<double>(w) * static_cast<double>(t.norm[row]);
      }
    });
    simt::sync_warp();
    mass = over_warps<kParts>(mass, Add{});
    squares = over_warps<kParts>(squares, Add{});
    votes = over_warps<kParts>(votes, Add{});
    double inverse = mass > 0 ? 1 / mass : 0;
    means(
        static_cast<int>(t.v.width), inverse, t.out.v.data, [&](int64_t v_row, int d) { return t.v_element(v_row, d); },
        [&](int32_t row) { return t.v_row(row); });
    double square = means(
        static_cast<int>(t.x.width), inverse, t.out.x.data, [&](int64_t x_row, int d) { return t.x_element(x_row, d); },
        [&](int32_t row) { return t.x_row(row); });
    if (!stores()) return;
    if (square > 0x1.fffff0p99) {  // every row is below 2^100: rounding shall not take their mean there
      inverse *= 1 - 0x1p-20;
      square = 0;
      for (int64_t d = lane; d < t.x.width; d += 32) {
        float& y = t.out.x.data[out * t.x.width + d];
        y *= 1 - 0x1p-20f;
        square += static_cast<double>(y) * static_cast<double>(y);
      }
      for (int m = 16; m; m /= 2) square += simt::shuffle_xor(square, m);
    }
    if (lane != 0) return;
    const double spread = squares * inverse - square;
    t.out.votes.data[out] = static_cast<int64_t>(votes);
    t.out.spread.data[out] = static_cast<float>(spread > 0 ? (spread < kLargest ? spread : kLargest) : 0.0);
    t.out.bias.data[out] = static_cast<float>(static_cast<double>(max_bias) +
                                              kLn2 * static_cast<double>(simt::log2(static_cast<float>(mass / scale))));
    const int64_t first = t.x_row(row_of(entries[0]));
    for (int l = 0; l < t.levels; ++l) t.out.codes.data[out * t.levels + l] = t.codes[first * t.levels + l];
  }

 private:
  SIMT_DEVICE bool stores() const { return !kBlock || simt::warp() == 0; }

  /// visit(first, last) for this warp's runs.
  template <class Visit>
  SIMT_DEVICE void each_run(Visit visit) const {
    for (int first = kBlock ? simt::warp() * kRun : 0; first < n; first += kParts * kRun)
      visit(first, first + kRun < n ? first + kRun : n);
  }

  /// to[out, :] = the weighted means; returns the sum of their squares. table_row(row): where a behaviour's row lies.
  template <class Element, class TableRow>
  SIMT_DEVICE double means(int width, double inverse, float* to, Element element, TableRow table_row) const {
    const int lane = simt::lane();
    double square = 0;
    for (int first = 0; first < width; first += kColumns) {
      double sum[kColumns / 32] = {};
      each_run([&](int begin, int end) {
        float run[kColumns / 32] = {};
        for (int e = begin; e < end; ++e) {
          if (entries[e] < 0) continue;  // it only votes
          const int64_t row = table_row(entries[e]);
          SIMT_EACH (j, kColumns / 32)
            if (const int d = first + j * 32 + lane; d < width)
              run[j] = simt::fused(weights[e], element(row, d), run[j]);
        }
        SIMT_EACH (j, kColumns / 32) sum[j] += static_cast<double>(run[j]);
      });
      add_warps<kParts>(sum);
      SIMT_EACH (j, kColumns / 32) {
        const int d = first + j * 32 + lane;
        const float y = static_cast<float>(sum[j] * inverse);
        if (d >= width) continue;
        if (stores()) to[out * width + d] = y;
        square += static_cast<double>(y) * static_cast<double>(y);
      }
    }
    for (int m = 16; m; m /= 2) square += simt::shuffle_xor(square, m);
    return square;
  }

  const LeafTask& t;
  int64_t b = 0, out = 0;  // the user, the row of the sums
  const int32_t* entries = nullptr;
  float* weights = nullptr;
  int n = 0;
};

/// Eight leaves at a time: the short ones by a warp each, then the long ones by all.
SIMT_KERNEL(kThreads, 3) add_leaves(SIMT_CONSTANT LeafTask t) {
  const int64_t all = t.leaves[t.users];
  int* const sizes = shared<int>(kWarps * kColumns * 8);  // [kWarps]
  for (int64_t first = int64_t{simt::block()} * kWarps; first < all; first += warps()) {
    const bool has_leaf = first + simt::warp() < all;
    int size = 0;
    if (has_leaf) {
      Leaf<false> leaf(t, first + simt::warp());
      size = leaf.size();
      if (size <= kShort) leaf.sum();
    }
    if (simt::lane() == 0) sizes[simt::warp()] = size;
    simt::sync();
    for (int w = 0; w < kWarps; ++w)
      if (sizes[w] > kShort) Leaf<true>(t, first + w).sum();
    SIMT_UNLESS_PLANTED(16, simt::sync());
  }
}

// ---- host

LeafTask leaf_task(const Codebook& book, const Histories& in) {
  LeafTask t;
  static_cast<Behaviours&>(t) = behaviours_of(&book, in, width_of(&book, in));
  t.weights = in.weights;
  uint64_t last = 0;
  for (int l = 0; l < t.levels; ++l)
    last = last * static_cast<uint64_t>(t.sizes[l]) + static_cast<uint64_t>(t.sizes[l] - 1);
  t.bits = bits_of(last);
  return t;
}

void carve(LeafTask& t, int64_t capacity, Arena& arena) {
  t.capacity = capacity;
  t.next = arena.take<int>(1);
  t.norm = arena.take<float>(t.rows);
  t.leaf = arena.take<uint64_t>(t.rows);
  t.first = arena.take<int64_t>(t.users + 1);
  t.leaves = arena.take<int64_t>(t.users + 1);
  t.entry = arena.take<int32_t>(capacity);
  t.spare = arena.take<int32_t>(capacity);
  t.begin = arena.take<int32_t>(capacity + t.users);
  t.weight = arena.take<float>(capacity);
  t.scale_of_user = arena.take<VoteScale>(t.users);
}

}  // namespace

size_t leaf_sums_workspace(const Context&, const Codebook& book, const Histories& histories) noexcept {
  LeafTask t = leaf_task(book, histories);
  Arena arena;
  carve(t, histories.rows, arena);
  return arena.used();
}

Status leaf_sums(const Context& context, const Codebook& book, const Histories& histories,
                 const LeafSums& out) noexcept {
  HISAC_TRY(check_counts("leaf_sums", histories));
  LeafTask t = leaf_task(book, histories);
  HISAC_TRY(place_centers("leaf_sums", context, &book, t));
  t.out = out;
  t.sums = std::min(
      {out.x.shape[0], out.v.shape[0], out.bias.shape[0], out.spread.shape[0], out.votes.shape[0], out.codes.shape[0]});
  Arena arena(context.workspace);
  carve(t, histories.rows, arena);
  t.capacity = std::min(t.capacity, t.sums);  // the sums of more might not fit
  HISAC_TRY(arena.check("leaf_sums"));
  Launcher launch("leaf_sums", context);
  HISAC_TRY(launch.status());
  const int blocks = launch.machine.processors * 8;
  constexpr size_t kSort = kPlacesAt + kWarps * (4 << kDigit), kAdd = kWarps * (kColumns * 8 + 4);
  launch(mark_rows, least((t.rows + kWarps) / kWarps, blocks), kThreads, 0, t);
  launch(plan_entries, 1, kThreads, kFront, t);
  launch(sort_rows, least(t.users, blocks), kThreads, kSort, t);
  launch(plan_sums, 1, kThreads, kFront, t);
  launch(add_leaves, least((t.sums + kWarps - 1) / kWarps, blocks), kThreads, kAdd, t);
  return launch.status();
}

}  // namespace hisac::cuda
