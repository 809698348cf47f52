// SPDX-License-Identifier: Apache-2.0
// Residual k-means whose result does not depend on how the work is cut: codes are exact, sums are integers, random
// numbers belong to rows, and every choice is made in a stated order.
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>

#include "base/parallel.h"
#include "base/radix_sort.h"
#include "cpu/kmeans_bounds.h"
#include "cpu/simd/pack.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

constexpr float kFitLimit = 0x1p100f;
constexpr int kFitRange = 46;
constexpr int64_t kChunk = 4096;  // rows of one unit of work
constexpr int64_t kSlice = 16;    // columns of one, a cache line of a row, where sums are shared

uint64_t mix64(uint64_t z) noexcept {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

struct Ranked {
  uint64_t key;  // priorities ascending, or distances descending by the bits of the (positive) double
  int64_t row;
  bool operator<(const Ranked& o) const noexcept { return key != o.key ? key < o.key : row < o.row; }
};

struct Worker {
  Tracker::Scratch scratch;
  int32_t biggest = 0;  // the bits of the largest |r|
};

struct Fit {
  const Context& context;
  const FitParams& params;
  int64_t rows, width, largest = 0;
  int workers;
  int64_t n = 0;              // rows that take part
  float* r = nullptr;         // [rows, D] their residuals
  int64_t* origin = nullptr;  // [rows] their numbers in x
  Tracker tracker;
  int32_t* previous = nullptr;  // [rows] their codes before the round
  int64_t* sums = nullptr;      // [C, D]
  int64_t* count = nullptr;     // [C] rows of each code
  double* distance = nullptr;   // [rows]
  Ranked* ranked = nullptr;     // [rows]
  int64_t* picked = nullptr;    // [C]
  int64_t* table = nullptr;     // hash of distinct rows
  int64_t slots = 0;
  float* level_memory = nullptr;
  float* fresh = nullptr;  // [C, D]
  Worker* worker = nullptr;

  Fit(const Context& c, const FitParams& p, int64_t rows_, int64_t width_) noexcept
      : context(c), params(p), rows(rows_), width(width_), workers(workers_of(c)) {
    for (int l = 0; l < p.levels; ++l) largest = std::max(largest, p.sizes[l]);
    for (slots = 16; slots < 2 * largest;) slots *= 2;
  }

  void carve(Arena& arena) noexcept {
    r = arena.take<float>(rows * width);
    origin = arena.take<int64_t>(rows);
    tracker.carve(arena, rows, largest);
    previous = arena.take<int32_t>(rows);
    sums = arena.take<int64_t>(largest * width);
    count = arena.take<int64_t>(largest);
    distance = arena.take<double>(rows);
    ranked = arena.take<Ranked>(rows);
    picked = arena.take<int64_t>(largest);
    table = arena.take<int64_t>(slots);
    level_memory = arena.take<float>(Level::floats(largest, width));
    fresh = arena.take<float>(largest * width);
    worker = arena.take<Worker>(workers);
    for (int w = 0; w < workers; ++w) {
      Worker one;
      one.scratch.carve(arena, width, largest);
      if (worker) worker[w] = one;
    }
  }

  template <class Work>
  void for_chunks(Work work) noexcept {
    parallel_for(context, (n + kChunk - 1) / kChunk, [&](int64_t begin, int64_t end, int w) {
      work(begin * kChunk, std::min(end * kChunk, n), worker[w]);
    });
  }

  /// r = the rows that take part: their values are below kFitLimit, and not so much larger than the median row's that
  /// the grid of the sums would be coarser than 2^-16 of that.
  void gather(Rows x) noexcept {
    const simd::Kernels& k = simd::kernels();
    const int64_t bytes = bytes_of(x.dtype);
    n = rows;
    for_chunks([&](int64_t begin, int64_t end, Worker&) {
      for (int64_t i = begin; i < end; ++i) {
        float* const row = r + i * width;
        k.load_row(static_cast<const std::byte*>(x.data) + i * width * bytes, x.dtype, width, row);
        float biggest = 0;
        bool usable = true;
        for (int64_t d = 0; d < width; ++d) {
          biggest = std::max(biggest, std::fabs(row[d]));
          usable &= std::fabs(row[d]) < kFitLimit;
        }
        distance[i] = usable ? biggest : INFINITY;
      }
    });
    const int most = most_exponent();
    n = 0;
    for (int64_t i = 0; i < rows; ++i) {
      if (distance[i] == INFINITY || exponent_of(distance[i]) > most) continue;
      if (n < i) std::memcpy(r + n * width, r + i * width, sizeof(float) * static_cast<size_t>(width));
      origin[n++] = i;
    }
  }

  static int exponent_of(double x) noexcept {
    int exponent = 0;
    std::frexp(x, &exponent);
    return exponent;
  }

  /// The largest binary exponent of a row that takes part: kFitRange above the upper median of the rows that are not
  /// zero, less the bits of the number of rows.
  int most_exponent() const noexcept {
    constexpr int kLeast = -148;  // of float32, 2^-149
    int64_t found[250] = {}, usable = 0, nonzero = 0;
    for (int64_t i = 0; i < rows; ++i) {
      usable += distance[i] < INFINITY;
      if (!(distance[i] > 0) || distance[i] == INFINITY) continue;
      ++found[exponent_of(distance[i]) - kLeast];
      ++nonzero;
    }
    int median = 0;
    for (int64_t below = 0; median < 249 && below + found[median] <= nonzero / 2; ++median) below += found[median];
    return nonzero ? median + kLeast + kFitRange - bits_of(static_cast<uint64_t>(usable)) : INT_MAX;
  }

  /// Nearest codes; sums of rint(r 2^bits) and counts follow the rows that change theirs.
  void assign(const Level& level, int bits) noexcept {
    for_chunks([&](int64_t begin, int64_t end, Worker& w) {
      std::copy(tracker.near + begin, tracker.near + end, previous + begin);
      for (int64_t at = begin; at < end; at += Tracker::kPart)
        tracker.assign(level, r, at, std::min(end, at + Tracker::kPart), w.scratch);
    });
    const int64_t slice = workers == 1 ? width : kSlice, slices = (width + slice - 1) / slice;
    const int64_t groups = workers == 1 ? 1 : std::min<int64_t>(level.size, (4 * workers + slices - 1) / slices);
    const int64_t codes = (level.size + groups - 1) / groups;
    parallel_for(context, slices * groups, [&](int64_t begin, int64_t end, int) {
      for (int64_t unit = begin; unit < end; ++unit)
        move_sums(unit % slices * slice, slice, unit / slices * codes, codes, std::ldexp(1.0, bits));
    });
  }

  /// The part of the sums' change in columns [first, first + columns) of the codes [code, code + codes): no two parts
  /// write the same memory, so the sums need no copy a worker.
  void move_sums(int64_t first, int64_t columns, int64_t code, int64_t codes, double unit) noexcept {
    const int64_t last = std::min(first + columns, width);
    const auto inside = [&](int32_t c) { return c >= code && c < code + codes; };
    for (int64_t i = 0; i < n; ++i) {
      const int32_t from = previous[i], to = tracker.near[i];
      if (from == to || !(inside(from) || inside(to))) continue;
      int64_t* const into = inside(to) ? sums + to * width : nullptr;
      int64_t* const out = inside(from) ? sums + from * width : nullptr;
      for (int64_t d = first; d < last; ++d) {
        const int64_t x = std::llrint(double(r[i * width + d]) * unit);
        if (into) into[d] += x;
        if (out) out[d] -= x;
      }
      if (first > 0) continue;
      if (into) ++count[to];
      if (out) --count[from];
    }
  }

  /// distance = from each row to its code; returns the mean, added in row order.
  double measure(const Level& level) noexcept {
    for_chunks([&](int64_t begin, int64_t end, Worker&) {
      for (int64_t i = begin; i < end; i += 4) {
        const float *row[4], *center[4];
        double square[4];
        for (int64_t j = 0; j < 4; ++j) {
          const int64_t at = std::min(i + j, end - 1);
          row[j] = r + at * width;
          center[j] = level.centers + tracker.near[at] * width;
        }
        square_distances(row, center, width, square);
        std::copy_n(square, std::min<int64_t>(4, end - i), distance + i);
      }
    });
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += distance[i];
    return total / static_cast<double>(n);
  }

  /// The first `most` rows of ranked[0, found_rows) that differ in value from those before; into picked.
  int64_t first_distinct(int64_t found_rows, int64_t most) noexcept {
    std::fill(table, table + slots, int64_t{-1});
    int64_t found = 0;
    for (int64_t i = 0; i < found_rows && found < most; ++i) {
      const float* const row = r + ranked[i].row * width;
      uint64_t hash = 0;
      for (int64_t d = 0; d < width; ++d) {
        const float x = row[d] + 0.f;  // -0 equals 0
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 29;
      }
      int64_t slot = static_cast<int64_t>(hash & static_cast<uint64_t>(slots - 1));
      while (table[slot] >= 0 && !std::equal(row, row + width, r + table[slot] * width))
        slot = (slot + 1) & (slots - 1);
      if (table[slot] >= 0) continue;
      table[slot] = ranked[i].row;
      picked[found++] = ranked[i].row;
    }
    return found;
  }

  void start(int l, float* centers) noexcept {
    constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
    const uint64_t key = mix64(params.seed + static_cast<uint64_t>(l + 1) * kGolden);
    for (int64_t i = 0; i < n; ++i) ranked[i] = {mix64(key + (static_cast<uint64_t>(origin[i]) + 1) * kGolden), i};
    // as few as are likely to be needed come in order first
    const int64_t few = std::min(n, 2 * params.sizes[l]);
    std::nth_element(ranked, ranked + few - 1, ranked + n);
    std::sort(ranked, ranked + few);
    int64_t found = first_distinct(few, params.sizes[l]);
    if (found < params.sizes[l] && few < n) {
      std::sort(ranked + few, ranked + n);
      found = first_distinct(n, params.sizes[l]);
    }
    for (int64_t c = 0; c < params.sizes[l]; ++c)
      std::memcpy(centers + c * width, r + picked[c < found ? c : 0] * width,
                  sizeof(float) * static_cast<size_t>(width));
  }

  /// Codes without rows: the worst-quantised rows first; then copies of the lowest used code, which never win.
  void revive(const Level& level, float* out) noexcept {
    int64_t dead = 0, used = 0;
    while (count[used] == 0) ++used;
    for (int64_t c = 0; c < level.size; ++c) dead += count[c] == 0;
    if (dead == 0) return;
    measure(level);
    int64_t far = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (!(distance[i] > 0)) continue;
      uint64_t bits;
      std::memcpy(&bits, &distance[i], 8);
      ranked[far++] = {~bits, i};
    }
    std::sort(ranked, ranked + far);
    const int64_t seeds = first_distinct(far, dead);
    for (int64_t c = 0, j = 0; c < level.size; ++c) {
      if (count[c] != 0) continue;
      const float* const from = j < seeds ? r + picked[j] * width : out + used * width;
      std::memcpy(out + c * width, from, sizeof(float) * static_cast<size_t>(width));
      ++j;
    }
  }

  /// |r| < 2^e and n rows: units of 2^-bits keep every sum below 2^62.
  int fixed_point_bits() noexcept {
    for (int w = 0; w < workers; ++w) worker[w].biggest = 0;
    for_chunks([&](int64_t begin, int64_t end, Worker& w) {
      int32_t most = 0;  // positive floats are ordered as their bits
      for (int64_t i = begin * width; i < end * width; ++i) {
        int32_t bits;
        std::memcpy(&bits, r + i, 4);
        most = std::max(most, bits & 0x7fffffff);
      }
      w.biggest = std::max(w.biggest, most);
    });
    int32_t bits = 0;
    for (int w = 0; w < workers; ++w) bits = std::max(bits, worker[w].biggest);
    float biggest;
    std::memcpy(&biggest, &bits, 4);
    return 61 - exponent_of(biggest) - bits_of(static_cast<uint64_t>(n));
  }

  Status run_level(int l, float* centers, FitReport* report) noexcept {
    const int64_t size = params.sizes[l];
    const int bits = fixed_point_bits();
    const double unit = std::ldexp(1.0, -bits);
    start(l, centers);
    Level level = Level::make(size, width, centers, level_memory);
    tracker.start(level, n);
    std::fill(sums, sums + size * width, int64_t{0});
    std::fill(count, count + size, int64_t{0});
    bool settled = false;
    for (int round = 1; round <= params.iterations; ++round) {
      assign(level, bits);
      for (int64_t c = 0; c < size; ++c)
        for (int64_t d = 0; d < width && count[c]; ++d)
          fresh[c * width + d] =
              static_cast<float>(static_cast<double>(sums[c * width + d]) * unit / static_cast<double>(count[c]));
      revive(level, fresh);
      report->iterations[l] = round;
      if ((params.progress && !params.progress(params.ctx, l, round, measure(level))) ||
          (params.keep_going && !params.keep_going(params.ctx)))
        return Status::error(Code::cancelled, "fit: cancelled at level %d, round %d", l, round);
      settled = std::equal(fresh, fresh + size * width, level.centers);
      if (settled) break;
      tracker.move(level, fresh);
      level = Level::make(size, width, fresh, level_memory);
    }
    if (!settled) assign(level, bits);
    report->error[l] = measure(level);
    for_chunks([&](int64_t begin, int64_t end, Worker&) {
      for (int64_t i = begin; i < end && l + 1 < params.levels; ++i)
        simd::kernels().add_row(width, level.centers + tracker.near[i] * width, -1.f, r + i * width);
    });
    report->unused[l] = std::count(count, count + size, int64_t{0});
    std::memcpy(centers, level.centers, sizeof(float) * static_cast<size_t>(size * width));
    return {};
  }
};

}  // namespace

size_t fit_workspace(const Context& context, const FitParams& params, int64_t rows, int64_t width) noexcept {
  Arena arena;
  Fit(context, params, rows, width).carve(arena);
  return arena.used();
}

Status fit(const Context& context, const FitParams& params, Rows x, const Array<float, 2>* centers,
           FitReport* report) noexcept {
  Arena arena(context.workspace);
  Fit state(context, params, x.rows, x.width);
  state.carve(arena);
  HISAC_TRY(arena.check("fit"));
  state.gather(x);
  if (state.n == 0)
    return Status::error(Code::invalid_argument,
                         "fit: x is [%" PRId64 ", %" PRId64 "] without a usable row, expected at least one", x.rows,
                         x.width);
  *report = {};
  report->rows = state.n;
  report->left_out = x.rows - state.n;
  for (int l = 0; l < params.levels; ++l) HISAC_TRY(state.run_level(l, centers[l].data, report));
  return {};
}

}  // namespace hisac::cpu
