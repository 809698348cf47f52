// SPDX-License-Identifier: Apache-2.0
// Residual k-means. Its result does not depend on how the work is divided: codes are exact, sums are integers, each
// row's random number follows from its index, and every choice is made in a fixed order.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/parallel.h"
#include "base/radix_sort.h"
#include "cpu/kmeans_bounds.h"
#include "cpu/rows.h"
#include "cpu/simd/pack.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

constexpr float kFitLimit = 0x1p100f;
constexpr int kFitRange = 46;
constexpr int64_t kChunk = 4096;  // rows of one unit of work
constexpr int64_t kColumns = 16;  // of the sums in one unit of work: a cache line of a row

uint64_t mix64(uint64_t z) noexcept {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

struct KeyedRow {
  uint64_t key;  // priorities ascending, or distances descending by the bits of the (positive) double
  int64_t row;
  bool operator<(const KeyedRow& o) const noexcept { return key != o.key ? key < o.key : row < o.row; }
};

/// The largest |x|, or NaN if one is. Positive floats are ordered as their bits.
float largest_of(const float* x, int64_t n) noexcept {
  int32_t largest_bits = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    largest_bits = std::max(largest_bits, bits & 0x7fffffff);
  }
  float largest;
  std::memcpy(&largest, &largest_bits, 4);
  return largest;
}

struct Fit {
  const Context& context;
  const FitParams& params;
  int64_t rows, width, largest = 0;
  int workers;
  int64_t n = 0;              // rows that take part
  float* r = nullptr;         // [rows, D] their residuals
  int64_t* origin = nullptr;  // [rows] their numbers in x
  KMeansBounds bounds;
  int32_t* previous = nullptr;  // [rows] their codes before the round
  int64_t* sums = nullptr;      // [C, D] of rint(r 2^bits)
  int64_t* count = nullptr;     // [C] rows of each code
  double* distance = nullptr;   // [rows] to their codes, or their largest |r|
  KeyedRow* keyed = nullptr;    // [rows]
  int64_t* picked = nullptr;    // [C]
  int64_t* table = nullptr;     // hash table of distinct rows
  int64_t slots = 0;
  float* level_memory = nullptr;
  float* new_centers = nullptr;  // [C, D]
  KMeansBounds::Scratch* worker = nullptr;

  Fit(const Context& c, const FitParams& p, int64_t rows_, int64_t width_) noexcept
      : context(c), params(p), rows(rows_), width(width_), workers(workers_of(c)) {
    for (int l = 0; l < p.levels; ++l) largest = std::max(largest, p.sizes[l]);
    for (slots = 16; slots < 2 * largest;) slots *= 2;
  }

  void carve(Arena& arena) noexcept {
    r = arena.take<float>(rows * width);
    bounds.carve(arena, rows, largest);
    arena.take_into(rows, origin, previous, distance, keyed);
    arena.take_into(largest * width, sums, new_centers);
    arena.take_into(largest, count, picked);
    table = arena.take<int64_t>(slots);
    level_memory = arena.take<float>(Level::floats(largest, width));
    worker = arena.take_each<KMeansBounds::Scratch>(
        workers, [&](KMeansBounds::Scratch& one) { one.carve(arena, width, largest); });
  }

  /// r = the rows that take part. Their values are below kFitLimit, and not so much larger than the median row's that
  /// the unit of the sums would be coarser than 2^-16 of that row.
  void gather(Rows x) noexcept {
    n = rows;
    parallel_pieces(context, n, kChunk, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        float* const row = r + i * width;
        load_row(x, i, row);
        const float largest_value = largest_of(row, width);
        distance[i] = largest_value < kFitLimit ? largest_value : INFINITY;
      }
    });
    const int limit = exponent_limit();
    n = 0;
    for (int64_t i = 0; i < rows; ++i) {
      if (distance[i] == INFINITY || exponent_of(distance[i]) > limit) continue;
      if (n < i) std::copy_n(r + i * width, width, r + n * width);
      origin[n++] = i;
    }
  }

  static int exponent_of(double x) noexcept {
    int exponent = 0;
    std::frexp(x, &exponent);
    return exponent;
  }

  /// The largest binary exponent of a row that takes part: kFitRange above the upper median of the rows that are not
  /// zero, less the bits of the number of rows. `distance` holds each row's largest value, or infinity.
  int exponent_limit() noexcept {
    int32_t *const exponent = previous, *end = exponent;
    int64_t usable = 0;
    for (int64_t i = 0; i < rows; ++i) {
      if (distance[i] == INFINITY) continue;
      ++usable;
      if (distance[i] > 0) *end++ = exponent_of(distance[i]);
    }
    if (end == exponent) return 0;
    int32_t* const median = exponent + (end - exponent) / 2;
    std::nth_element(exponent, median, end);
    return *median + kFitRange - bits_of(static_cast<uint64_t>(usable));
  }

  /// Assigns nearest codes. Rows whose code changes update the sums and the counts of both codes.
  void assign(const Level& level, int bits) noexcept {
    parallel_pieces(context, n, kChunk, [&](int64_t begin, int64_t end, int w) {
      std::copy(bounds.assigned + begin, bounds.assigned + end, previous + begin);
      for (int64_t part = begin; part < end; part += KMeansBounds::kPart)
        bounds.assign(level, r, part, std::min(end, part + KMeansBounds::kPart), worker[w]);
    });
    const int64_t columns = workers == 1 ? width : kColumns, slices = (width + columns - 1) / columns;
    const int64_t groups = workers == 1 ? 1 : std::min<int64_t>(level.size, (4 * workers + slices - 1) / slices);
    const int64_t codes = (level.size + groups - 1) / groups;
    parallel_each(context, slices * groups, [&](int64_t unit, int) {
      update_sums(unit % slices * columns, columns, unit / slices * codes, codes, std::ldexp(1.0, bits));
    });
  }

  /// Updates columns [first, first + columns) of the sums of codes [first_code, first_code + codes). Units of work
  /// write to different memory, so one array of sums serves all workers.
  void update_sums(int64_t first, int64_t columns, int64_t first_code, int64_t codes, double scale) noexcept {
    const int64_t last = std::min(first + columns, width);
    const auto inside = [&](int32_t code) { return code >= first_code && code < first_code + codes; };
    for (int64_t i = 0; i < n; ++i) {
      const int32_t old_code = previous[i], new_code = bounds.assigned[i];
      if (old_code == new_code || !(inside(old_code) || inside(new_code))) continue;
      int64_t* const added = inside(new_code) ? sums + new_code * width : nullptr;
      int64_t* const removed = inside(old_code) ? sums + old_code * width : nullptr;
      for (int64_t d = first; d < last; ++d) {
        const int64_t x = std::llrint(double(r[i * width + d]) * scale);
        if (added) added[d] += x;
        if (removed) removed[d] -= x;
      }
      if (first > 0) continue;
      if (added) ++count[new_code];
      if (removed) --count[old_code];
    }
  }

  /// distance = the square distance of each row to its code; returns the mean, summed in row order.
  double measure_distances(const Level& level) noexcept {
    parallel_pieces(context, n, kChunk, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; i += 4) {
        const float *row[4], *center[4];
        double square[4];
        for (int64_t j = 0; j < 4; ++j) {
          const int64_t row_index = std::min(i + j, end - 1);
          row[j] = r + row_index * width;
          center[j] = level.centers + bounds.assigned[row_index] * width;
        }
        square_distances(row, center, width, square);
        std::copy_n(square, std::min<int64_t>(4, end - i), distance + i);
      }
    });
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += distance[i];
    return total / static_cast<double>(n);
  }

  /// The first `wanted` rows of keyed[0, candidates) that differ in value from those before; into picked.
  int64_t pick_distinct(int64_t candidates, int64_t wanted) noexcept {
    std::fill(table, table + slots, int64_t{-1});
    int64_t found = 0;
    for (int64_t i = 0; i < candidates && found < wanted; ++i) {
      const float* const row = r + keyed[i].row * width;
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
      table[slot] = keyed[i].row;
      picked[found++] = keyed[i].row;
    }
    return found;
  }

  void start(int l, float* centers) noexcept {
    constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
    const uint64_t key = mix64(params.seed + static_cast<uint64_t>(l + 1) * kGolden);
    for (int64_t i = 0; i < n; ++i) keyed[i] = {mix64(key + (static_cast<uint64_t>(origin[i]) + 1) * kGolden), i};
    // first only as many rows are sorted as are likely to be needed
    const int64_t sorted = std::min(n, 2 * params.sizes[l]);
    std::nth_element(keyed, keyed + sorted - 1, keyed + n);
    std::sort(keyed, keyed + sorted);
    int64_t found = pick_distinct(sorted, params.sizes[l]);
    if (found < params.sizes[l] && sorted < n) {
      std::sort(keyed + sorted, keyed + n);
      found = pick_distinct(n, params.sizes[l]);
    }
    for (int64_t c = 0; c < params.sizes[l]; ++c)
      std::copy_n(r + picked[c < found ? c : 0] * width, width, centers + c * width);
  }

  /// Gives codes without rows new centers: the rows farthest from theirs, then copies of the lowest used code, which
  /// are never assigned.
  void reseed_empty_codes(const Level& level, float* out) noexcept {
    const int64_t empty = std::count(count, count + level.size, int64_t{0});
    int64_t used = 0;
    while (count[used] == 0) ++used;
    if (empty == 0) return;
    measure_distances(level);
    int64_t candidates = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (!(distance[i] > 0)) continue;
      uint64_t bits;
      std::memcpy(&bits, &distance[i], 8);
      keyed[candidates++] = {~bits, i};
    }
    std::sort(keyed, keyed + candidates);
    const int64_t seeds = pick_distinct(candidates, empty);
    for (int64_t c = 0, j = 0; c < level.size; ++c) {
      if (count[c] != 0) continue;
      const float* const source = j < seeds ? r + picked[j] * width : out + used * width;
      std::copy_n(source, width, out + c * width);
      ++j;
    }
  }

  /// The bits for which units of 2^-bits keep every sum below 2^62, given |r| < 2^exponent and n rows.
  int fixed_point_bits() noexcept {
    parallel_pieces(context, n, kChunk, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) distance[i] = largest_of(r + i * width, width);
    });
    return 61 - exponent_of(*std::max_element(distance, distance + n)) - bits_of(static_cast<uint64_t>(n));
  }

  Status run_level(int l, float* centers, FitReport* report) noexcept {
    const int64_t size = params.sizes[l];
    const int bits = fixed_point_bits();
    const double unit = std::ldexp(1.0, -bits);
    start(l, centers);
    Level level = Level::make(size, width, centers, level_memory);
    bounds.start(level, n);
    std::fill_n(sums, size * width, 0);
    std::fill_n(count, size, 0);
    bool settled = false;
    for (int round = 1; round <= params.iterations; ++round) {
      assign(level, bits);
      for (int64_t c = 0; c < size; ++c)
        for (int64_t d = 0; d < width && count[c]; ++d)
          new_centers[c * width + d] =
              static_cast<float>(static_cast<double>(sums[c * width + d]) * unit / static_cast<double>(count[c]));
      reseed_empty_codes(level, new_centers);
      report->iterations[l] = round;
      if ((params.progress && !params.progress(params.ctx, l, round, measure_distances(level))) ||
          (params.keep_going && !params.keep_going(params.ctx)))
        return Status::error(Code::cancelled, "fit: cancelled at level %d, round %d", l, round);
      settled = std::equal(new_centers, new_centers + size * width, level.centers);
      if (settled) break;
      bounds.move(level, new_centers);
      std::copy_n(new_centers, size * width, centers);
      level = Level::make(size, width, centers, level_memory);
    }
    if (!settled) assign(level, bits);
    report->error[l] = measure_distances(level);
    parallel_pieces(context, n, kChunk, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end && l + 1 < params.levels; ++i)
        simd::kernels().add_row(width, level.centers + bounds.assigned[i] * width, -1.f, r + i * width);
    });
    report->unused[l] = std::count(count, count + size, int64_t{0});
    return {};
  }
};

}  // namespace

size_t fit_workspace(const Context& context, const FitParams& params, int64_t rows, int64_t width) noexcept {
  return workspace_of(Fit(context, params, rows, width));
}

Status fit(const Context& context, const FitParams& params, Rows x, const Array<float, 2>* centers,
           FitReport* report) noexcept {
  Arena arena(context.workspace);
  Fit state(context, params, x.rows, x.width);
  state.carve(arena);
  HISAC_TRY(arena.check("fit"));
  state.gather(x);
  if (state.n == 0)
    return invalid("fit: x is [%" PRId64 ", %" PRId64 "] without a usable row, expected at least one", x.rows, x.width);
  *report = {};
  report->rows = state.n;
  report->left_out = x.rows - state.n;
  for (int l = 0; l < params.levels; ++l) HISAC_TRY(state.run_level(l, centers[l].data, report));
  return {};
}

}  // namespace hisac::cpu
