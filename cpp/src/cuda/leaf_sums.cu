// SPDX-License-Identifier: Apache-2.0
#include "cuda/leaf_sums.h"

#include <algorithm>

#include "base/radix_sort.h"
#include "codebook/checks.h"
#include "cuda/device/block.h"
#include "cuda/verbs.h"

namespace hisac::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPlacesAt = kFront + 16;  // in the sort's shared memory
constexpr int kRun = 64;                // rows whose weighted sum is float32
constexpr int kColumns = 128;
constexpr int kShort = 4 * kRun;  // rows of a leaf that one warp sums

SIMT_DEVICE int warps() { return simt::blocks() * kWarps; }

/// A warp has a behaviour.
SIMT_KERNEL(kThreads) mark_rows(SIMT_CONSTANT LeafTask t) {
  const int lane = simt::lane();
  if (simt::block() == 0 && simt::thread() == 0) *t.next = 0;
  for (int64_t b = int64_t{simt::block()} * kWarps + simt::warp(); b < t.rows; b += warps()) {
    const int64_t x_row = t.x_row(b), v_row = t.v_row(b);
    const float spread = t.spread ? t.spread[b] : 0.f;
    const int32_t* const codes = t.codes + (x_row < 0 ? 0 : x_row) * t.levels;
    bool here = x_row >= 0 && v_row >= 0 && t.valid_terms(t.bias ? t.bias[b] : 0.f, spread) && t.valid(codes);
    float squares = 0;
    for (int64_t d = lane; here && d < t.x.width; d += 32) {
      const float y = t.x_element(x_row, d);
      squares = simt::fused(y, y, squares);
    }
    for (int m = 16; m; m /= 2) squares += simt::shuffle_xor(squares, m);
    here = here && below_limit(squares, t.x.width, [&](int64_t d) { return t.x_element(x_row, d); });
    bool whole = v_row >= 0;
    for (int64_t c = lane; t.missing && !here && v_row >= 0 && c < t.v.width; c += 32)
      whole = whole && finite(t.v_element(v_row, c));
    whole = simt::ballot(!whole) == 0;
    uint64_t leaf = 0;
    for (int l = 0; here && l < t.levels; ++l)
      leaf = leaf * static_cast<uint64_t>(t.sizes[l]) + static_cast<uint64_t>(codes[l]);
    if (lane != 0) continue;
    t.norm[b] = here ? squares + spread : whole ? t.kAbsent : t.kNothing;
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

/// One block: where each user's sums go. All of them fit: there are at most as many as entries, and as leaves.
SIMT_KERNEL(kThreads) plan_sums(SIMT_CONSTANT LeafTask t) {
  const int64_t all = scan<int64_t>(
      t.users, [&](int64_t b) { return t.leaves[b]; },
      [&](int64_t b, int64_t place, int64_t) { t.out.offsets.data[b] = place; });
  if (simt::thread() == 0) t.out.offsets.data[t.users] = all;
}

/// By a block: a user's present rows by leaf, stably, least significant digit first; then where each leaf's begin.
SIMT_DEVICE void sort(const LeafTask& t, int64_t b) {
  const int64_t first = t.first[b], start = t.start(b);
  uint32_t n = static_cast<uint32_t>(t.first[b + 1] - first);
  SIMT_UNLESS_PLANTED(17, n = n < t.length(b) ? 0 : n);  // a history that does not fit whole has no sums
  const int32_t* from = nullptr;                         // null: the history as it stands
  const int passes = t.bits > kDigit ? (t.bits + kDigit - 1) / kDigit : 1;
  for (int p = 0; p < passes; ++p) {
    int32_t* const to = ((passes - p) % 2 ? t.entry : t.spare) + first;
    const auto item = [&](uint32_t e) {
      const int32_t row = from ? from[e] : static_cast<int32_t>(start + e);
      const bool present = from || t.norm[row] >= 0;
      return Keyed<int32_t>{present ? digit_of(t.leaf[row], kDigit * p) : -1, row};
    };
    n = radix_pass<int32_t>(n, shared<uint32_t>(kPlacesAt), item,
                            [&](uint32_t, int32_t row, uint32_t place) { to[place] = row; });
    from = to;
  }
  int32_t* const begin = t.begin + first + b;
  const int leaves = gather(
      n, [&](uint32_t e) { return e == 0 || t.leaf[from[e]] != t.leaf[from[e - 1]]; },
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
  /// The leaf whose sums are row `place`.
  SIMT_DEVICE Leaf(const LeafTask& task, int64_t place) : t(task), out(place) {
    int64_t b = 0;  // the last user whose sums begin there or before, one of 32 parts at a time
    for (int64_t left = t.users; left > 1;) {
      const int64_t step = (left + 31) / 32, probe = simt::lane() * step;
      const bool before = probe < left && t.out.offsets.data[b + probe] <= place;
      const int64_t skip = (simt::count_bits(simt::ballot(before)) - 1) * step;
      b += skip;
      left = left - skip < step ? left - skip : step;
    }
    const int32_t* const begin = t.begin + t.first[b] + b + (place - t.out.offsets.data[b]);
    rows = t.entry + t.first[b] + begin[0];
    weights = t.weight + t.first[b] + begin[0];
    n = begin[1] - begin[0];
  }
  SIMT_DEVICE int size() const { return n; }

  SIMT_DEVICE void sum() {
    const int lane = simt::lane();
    float max_bias = -kInfinity;
    each_run([&](int first, int last) {
      for (int e = first + lane; t.bias && e < last; e += 32) max_bias = larger(max_bias, t.bias[rows[e]]);
    });
    max_bias = t.bias ? over_parts(max_bias, Larger{}) : 0.f;
    float scale = 1;  // a run's weights are at most 1 together, so that no sum of large v overflows
    while (scale * static_cast<float>(n < kRun ? n : kRun) > 1) scale /= 2;
    double mass = 0, squares = 0;
    each_run([&](int first, int last) {
      for (int e = first + lane; e < last; e += 32) {
        const int32_t row = rows[e];
        const float w = t.bias ? scale * simt::exp2((t.bias[row] - max_bias) * kLog2e) : scale;
        weights[e] = w;
        mass += static_cast<double>(w);
        squares += static_cast<double>(w) * static_cast<double>(t.norm[row]);
      }
    });
    simt::sync_warp();
    mass = over_parts(mass, Add{});
    squares = over_parts(squares, Add{});
    double inverse = 1 / mass;
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
    t.out.spread.data[out] = static_cast<float>(spread > 0 ? (spread < kLargest ? spread : kLargest) : 0.0);
    t.out.bias.data[out] = static_cast<float>(static_cast<double>(max_bias) +
                                              kLn2 * static_cast<double>(simt::log2(static_cast<float>(mass / scale))));
    const int64_t first = t.x_row(rows[0]);
    for (int l = 0; t.out.codes.data && l < t.levels; ++l)
      t.out.codes.data[out * t.levels + l] = t.codes[first * t.levels + l];
  }

 private:
  SIMT_DEVICE bool stores() const { return !kBlock || simt::warp() == 0; }

  /// visit(first, last) for this warp's runs.
  template <class Visit>
  SIMT_DEVICE void each_run(Visit visit) const {
    for (int first = kBlock ? simt::warp() * kRun : 0; first < n; first += kParts * kRun)
      visit(first, first + kRun < n ? first + kRun : n);
  }

  /// `op` over the numbers of all lanes of all the leaf's warps.
  template <class T, class Op>
  SIMT_DEVICE T over_parts(T value, Op op) const {
    for (int m = 16; m; m /= 2) value = op(value, simt::shuffle_xor(value, m));
    if (!kBlock) return value;
    T* const all = shared<T>(0);
    simt::sync();
    if (simt::lane() == 0) all[simt::warp()] = value;
    SIMT_UNLESS_PLANTED(14, simt::sync());
    value = all[0];
    for (int w = 1; w < kWarps; ++w) value = op(value, all[w]);
    return value;
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
          const int64_t row = table_row(rows[e]);
          SIMT_EACH (j, kColumns / 32)
            if (const int d = first + j * 32 + lane; d < width)
              run[j] = simt::fused(weights[e], element(row, d), run[j]);
        }
        SIMT_EACH (j, kColumns / 32) sum[j] += static_cast<double>(run[j]);
      });
      if (kBlock) {
        double* const all = shared<double>(0);  // [kWarps, kColumns]
        simt::sync();
        SIMT_EACH (j, kColumns / 32) all[simt::warp() * kColumns + j * 32 + lane] = sum[j];
        simt::sync();
        SIMT_EACH (j, kColumns / 32) {
          sum[j] = all[j * 32 + lane];
          for (int w = 1; w < kWarps; ++w) sum[j] += all[w * kColumns + j * 32 + lane];
        }
      }
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
  int64_t out;
  const int32_t* rows = nullptr;
  float* weights = nullptr;
  int n = 0;
};

/// Eight leaves at a time: the short ones by a warp each, then the long ones by all.
SIMT_KERNEL(kThreads, 3) add_leaves(SIMT_CONSTANT LeafTask t) {
  const int64_t all = t.out.offsets.data[t.users];
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

struct AbsentTask {
  LeafTask leaves;
  void* tokens;  // [B, rows, V]
  float* lse;
  int64_t rows;
};

/// A block has a user and 64 columns.
SIMT_KERNEL(kThreads, 4) mean_absent(SIMT_CONSTANT AbsentTask a) {
  const LeafTask& t = a.leaves;
  const int lane = simt::lane(), warp = simt::warp();
  double* const sums = shared<double>(0);                    // [kWarps, 64]
  int64_t* const counts = shared<int64_t>(kWarps * 64 * 8);  // [kWarps]
  const int64_t tiles = (t.v.width + 63) / 64;
  for (int64_t i = simt::block(); i < t.users * tiles; i += simt::blocks()) {
    const int64_t b = i / tiles, column = i % tiles * 64 + lane, start = t.start(b), end = t.end(b);
    double sum[2] = {};
    int64_t count = 0;
    for (int64_t first = start + warp * 32; first < end; first += kThreads) {
      uint32_t absent = simt::ballot(first + lane < end && t.norm[first + lane] == t.kAbsent);
      count += simt::count_bits(absent);
      for (; absent; absent &= absent - 1) {
        const int64_t row = t.v_row(first + lowest(absent));
        SIMT_EACH (j, 2)
          if (column + 32 * j < t.v.width) sum[j] += static_cast<double>(t.v_element(row, column + 32 * j));
      }
    }
    SIMT_EACH (j, 2) sums[warp * 64 + 32 * j + lane] = sum[j];
    if (lane == 0) counts[warp] = count;
    SIMT_UNLESS_PLANTED(15, simt::sync());
    count = 0;
    for (int w = 0; w < kWarps; ++w) count += counts[w];
    const int64_t row = b * a.rows + a.rows - 1, d = i % tiles * 64 + simt::thread();
    if (count > 0 && simt::thread() < 64 && d < t.v.width) {
      double all = 0;
      for (int w = 0; w < kWarps; ++w) all += sums[w * 64 + simt::thread()];
      store(a.tokens, t.v.dtype, row * t.v.width + d, static_cast<float>(all / static_cast<double>(count)));
      if (d == 0) a.lse[row] = static_cast<float>(static_cast<double>(simt::log2(static_cast<float>(count))) * kLn2);
    }
    simt::sync();
  }
}

// ---- host

LeafTask leaf_task(const Codebook* book, const Histories& in, int64_t width) {
  LeafTask t;
  static_cast<Behaviours&>(t) = behaviours_of(book, in, width);
  uint64_t last = 0;
  for (int l = 0; l < t.levels; ++l)
    last = last * static_cast<uint64_t>(t.sizes[l]) + static_cast<uint64_t>(t.sizes[l] - 1);
  t.bits = bits_of(last);
  return t;
}

int64_t most_sums(const Codebook* book, int64_t users, int64_t entries) {
  int64_t most = std::min<int64_t>(1, entries);
  const auto times = [&](int64_t n) { most = most && n > entries / most ? entries : most * n; };
  for (int l = 0; book && l < book->levels(); ++l) times(book->size(l));
  times(users);
  return most;
}

void carve(LeafTask& t, Arena& arena) {
  t.next = arena.take<int>(1);
  t.norm = arena.take<float>(t.rows);
  t.leaf = arena.take<uint64_t>(t.rows);
  t.first = arena.take<int64_t>(t.users + 1);
  t.leaves = arena.take<int64_t>(t.users);
  t.entry = arena.take<int32_t>(t.capacity);
  t.spare = arena.take<int32_t>(t.capacity);
  t.begin = arena.take<int32_t>(t.capacity + t.users);
  t.weight = arena.take<float>(t.capacity);
}

}  // namespace

int64_t most_entries(const Histories& in, int64_t longest) {
  const Spans& h = in.offsets;
  const int64_t rows = in.behaviours();
  if (h.ends == static_cast<const std::byte*>(h.starts) + bytes_of(h.dtype)) return rows;
  return std::min<int64_t>(longest, rows) * h.users;
}

Histories carve_rows(const RouteCall& call, int64_t entries, Arena& arena, LeafTask* out) {
  LeafTask& t = *out;
  t = leaf_task(call.book, call.in, call.width());
  const int64_t users = t.users, width = t.x.width, sums = most_sums(call.book, users, entries);
  t.missing = call.params.missing == Missing::token;
  t.capacity = entries;
  t.sums = sums;
  carve(t, arena);
  static float placeholder;  // where bytes are counted
  const auto take = [&](int64_t n) {
    float* const p = arena.take<float>(n);
    return p ? p : &placeholder;
  };
  t.out.x = {take(sums * width), {sums, width}};
  t.out.v = {take(sums * t.v.width), {sums, t.v.width}};
  t.out.bias = {take(sums), {sums}};
  t.out.spread = {take(sums), {sums}};
  t.out.offsets = {arena.take<int64_t>(users + 1), {users + 1}};
  Histories kept;
  kept.x = {t.out.x.data, DType::float32, sums, width};
  kept.v = {t.out.v.data, DType::float32, sums, t.v.width};
  kept.offsets = {t.out.offsets.data, t.out.offsets.data + 1, DType::int64, users};
  kept.bias = {t.out.bias.data, {sums}};
  kept.spread = {t.out.spread.data, {sums}};
  return kept;
}

void sum_leaves(const LeafTask& t, Launcher& launch) {
  const int blocks = launch.machine.processors * 8;
  constexpr size_t kSort = kPlacesAt + kWarps * (4 << kDigit), kAdd = kWarps * (kColumns * 8 + 4);
  launch(mark_rows, least((t.rows + kWarps) / kWarps, blocks), kThreads, 0, t);
  launch(plan_entries, 1, kThreads, kFront, t);
  launch(sort_rows, least(t.users, blocks), kThreads, kSort, t);
  launch(plan_sums, 1, kThreads, kFront, t);
  launch(add_leaves, least((t.sums + kWarps - 1) / kWarps, blocks), kThreads, kAdd, t);
}

void absent_tokens(const LeafTask& t, Launcher& launch, const Tokens& out, int64_t rows) {
  const AbsentTask a{t, out.tokens.data, out.lse.data, rows};
  launch(mean_absent, least(t.users * ((t.v.width + 63) / 64), launch.machine.processors * 8), kThreads,
         kWarps * 65 * 8, a);
}

size_t leaf_sums_workspace(const Context&, const Codebook& book, const Histories& histories, int64_t longest) noexcept {
  LeafTask t = leaf_task(&book, histories, width_of(book, histories));
  t.capacity = most_entries(histories, longest);
  Arena arena;
  carve(t, arena);
  return arena.used();
}

Status leaf_sums(const Context& context, const Codebook& book, const Histories& histories,
                 const LeafSums& out) noexcept {
  HISAC_TRY(check_counts("leaf_sums", histories));
  LeafTask t = leaf_task(&book, histories, out.x.shape[1]);
  HISAC_TRY(place_centers("leaf_sums", context, &book, t));
  t.out = out;
  t.sums = std::min({out.x.shape[0], out.v.shape[0], out.bias.shape[0], out.spread.shape[0], out.codes.shape[0]});
  const int64_t most = most_entries(histories, std::min(t.rows, t.sums));
  t.capacity = entries_that_fit(context, histories, most, [&](int64_t entries, Arena& arena) {
    LeafTask other = t;
    other.capacity = entries;
    carve(other, arena);
  });
  t.capacity = std::min(t.capacity, t.sums);  // sums of more entries might not fit
  Arena arena(context.workspace);
  carve(t, arena);
  HISAC_TRY(arena.check("leaf_sums"));
  Launcher launch("leaf_sums", context);
  HISAC_TRY(launch.status());
  sum_leaves(t, launch);
  return launch.status();
}

}  // namespace hisac::cuda
