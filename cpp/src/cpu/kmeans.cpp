// SPDX-License-Identifier: Apache-2.0
// Residual k-means, as passes over a source. Its result does not depend on how the work is divided, over threads,
// chunks or processes: codes are exact, sums are integers or exact, each row's random number follows from its index,
// and every choice is made in a fixed order.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <utility>

#include "base/exact_sum.h"
#include "base/parallel.h"
#include "base/radix_sort.h"
#include "cpu/kmeans_bounds.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

constexpr float kFitLimit = 0x1p100f;
constexpr int kFitRange = 46;
constexpr int64_t kPiece = 4096;  // rows of one unit of work
constexpr int64_t kPieces = 32;   // of each worker, in a block of rows
constexpr int64_t kColumns = 16;  // of the sums in one unit of work: a cache line of a row

/// What a pass over the rows is for.
enum class Pass {
  scan,     // which rows take part
  first,    // the first centers, and the grid of the sums
  assign,   // a round: codes and sums
  measure,  // a round: distances, and the rows farthest from their codes
  finish,   // codes and distances to the last centers
};

struct Fit {
  Context context;
  FitParams params;
  int64_t rows, width, largest = 0;
  int workers;
  int64_t block_rows;
  Array<float, 2> centers[kMaxLevels] = {};
  FitReport* report = nullptr;

  Pass pass = Pass::scan;
  int level_number = 0, round = 0, turn = -1;  // turn: of the process whose first distinct rows are shared
  int64_t cursor = 0;                          // rows of the pass that have been read
  bool settled = false, measured = false;      // measured: each round is
  int64_t n = 0, all_rows = 0, before = 0;     // rows that take part; rows; those of the processes before this one
  int limit = 0, bits = 0, weight_bits = 0;
  double total_weight = 0;

  const float* center[kMaxLevels] = {};
  Level level;
  KMeansBounds bounds;
  FirstDistinct distinct;
  int32_t* codes = nullptr;     // [levels, rows]
  int32_t* previous = nullptr;  // [block] codes before the round
  double* value = nullptr;      // [block] a row's largest |r|, or its distance; -1: none
  int64_t* shared = nullptr;    // what this process knows; see `clear`
  int64_t* sums = nullptr;      // [C, D] of rint(w r 2^bits), then [C] of rint(w 2^weight_bits)
  float* level_memory = nullptr;
  float* new_centers = nullptr;  // [C, D]
  KMeansBounds::Scratch* worker = nullptr;
  float* four = nullptr;  // [workers, 4, D] residuals

  Fit(const Context& c, const FitParams& p, int64_t rows_, int64_t width_) noexcept
      : context(c), params(p), rows(rows_), width(width_), workers(workers_of(c)) {
    for (int l = 0; l < p.levels; ++l) largest = std::max(largest, p.sizes[l]);
    block_rows = std::min(rows, kPiece * kPieces * workers);
  }

  bool several() const noexcept { return params.processes > 1; }
  int64_t entry_words() const noexcept { return 2 + (width + 1) / 2; }
  int64_t size() const noexcept { return params.sizes[level_number]; }
  int64_t tallies() const noexcept { return size() * (width + 1); }

  void carve(Arena& arena) noexcept {
    const int64_t wanted = several() ? largest : std::min(largest, rows);
    codes = arena.take<int32_t>(rows, params.levels);
    bounds.carve(arena, rows, largest);
    distinct.carve(arena, wanted, width);
    arena.take_into(block_rows, previous, value);
    int64_t most = 2 * (kExponents + 1) + params.processes;
    if (several()) most = std::max({most, ExactSum::kDigits + largest * (width + 1), 1 + wanted * entry_words()});
    shared = arena.take<int64_t>(most);
    sums = arena.take<int64_t>(largest, width + 1);
    new_centers = arena.take<float>(largest, width);
    level_memory = arena.take<float>(Level::floats(largest, width));
    four = arena.take<float>(4 * workers, width);
    worker = arena.take_each<KMeansBounds::Scratch>(
        workers, [&](KMeansBounds::Scratch& one) { one.carve(arena, width, largest); });
  }

  // ------------------------------------------------------------------------------------------- shared with processes

  Exponents exponents(int which) const noexcept { return {shared + which * (kExponents + 1)}; }
  /// The rows of each process, and how many of these ask for the distance of each round, by 2^41.
  int64_t* process_rows() const noexcept { return shared + kExponents + 1; }
  /// Where a pass adds what changes in the sums: to a part of `shared` if others add to it.
  int64_t* tally() const noexcept { return several() ? shared + ExactSum::kDigits : sums; }

  /// How many numbers of `shared` the pass at hand adds to.
  int64_t shared_size() const noexcept {
    if (turn >= 0) return 1 + std::min(largest, size()) * entry_words();
    if (pass == Pass::scan) return kExponents + 1 + params.processes;
    if (pass == Pass::first) return 2 * (kExponents + 1);
    return ExactSum::kDigits + (several() && pass != Pass::measure ? tallies() : 0);
  }

  void begin(Pass next) noexcept {
    pass = next;
    cursor = 0;
    std::fill_n(shared, shared_size(), 0);
    if (pass == Pass::scan) process_rows()[params.process] = rows + (params.progress ? int64_t{1} << 41 : 0);
  }

  /// Puts the first distinct rows of process `turn` where all processes find them, if it is this one.
  void show_distinct() noexcept {
    std::fill_n(shared, shared_size(), 0);
    if (turn != params.process) return;
    shared[0] = distinct.settle();
    for (int64_t i = 0; i < shared[0]; ++i) {
      int64_t* const words = shared + 1 + i * entry_words();
      std::memcpy(words, &distinct.entry(i).key, 8);
      words[1] = distinct.entry(i).row;
      std::memcpy(words + 2, distinct.values(i), static_cast<size_t>(width) * sizeof(float));
    }
  }

  void see_distinct() noexcept {
    for (int64_t i = 0; i < shared[0] && turn != params.process; ++i) {
      const int64_t* const words = shared + 1 + i * entry_words();
      uint64_t key;
      std::memcpy(&key, words, 8);
      if (distinct.wants(key, words[1]))
        std::memcpy(distinct.add(key, words[1]), words + 2, static_cast<size_t>(width) * sizeof(float));
    }
  }

  // ------------------------------------------------------------------------------------------------- rows of a chunk

  double weight(int64_t i) const noexcept { return params.weights ? double(params.weights.data[i]) : 1; }

  void add(Rows x) noexcept {
    const Residuals r{x, cursor, level_number, codes, rows, center};
    for (int64_t end = cursor + x.rows; cursor < end;) {
      const int64_t last = std::min(end, cursor + block_rows);
      if (pass == Pass::scan || pass == Pass::first)
        look(r, cursor, last);
      else if (pass == Pass::assign || (pass == Pass::finish && !settled))
        assign(r, cursor, last);
      if (pass == Pass::measure || pass == Pass::finish) measure(r, cursor, last);
      cursor = last;
    }
    if (pass == Pass::measure || pass == Pass::finish) ExactSum::carry(shared);
  }

  /// Counts exponents of the rows [begin, end); in `first`, of those that take part, and finds the first by priority.
  void look(const Residuals& r, int64_t begin, int64_t end) noexcept {
    parallel_pieces(context, end - begin, kPiece, [&](int64_t piece, int64_t piece_end, int w) {
      for (int64_t i = begin + piece; i < begin + piece_end; ++i) {
        double& found = value[i - begin];
        found = -1;
        if (pass == Pass::first && codes[i] == kLeftOut) continue;
        float* const row = four + 4 * w * width;
        r.load(i, row);
        const float largest_value = largest_of(row, width);
        const double one = weight(i);
        if (pass == Pass::first)
          found = double(largest_value) * one;
        else if (largest_value < kFitLimit && one > 0 && one <= double(FLT_MAX))
          found = double(largest_value);
      }
    });
    constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
    const uint64_t seed = mix64(params.seed + static_cast<uint64_t>(level_number + 1) * kGolden);
    for (int64_t i = begin; i < end; ++i) {
      const double found = value[i - begin];
      if (pass == Pass::scan) codes[i] = found < 0 ? kLeftOut : exponent_of(found) + kExponents;
      if (found < 0) continue;
      exponents(0).add(found);
      if (pass == Pass::scan) continue;
      exponents(1).add(weight(i));
      const int64_t row = before + i;
      const uint64_t key = mix64(seed + (static_cast<uint64_t>(row) + 1) * kGolden);
      if (!params.init && distinct.wants(key, row)) r.load(i, distinct.add(key, row));
    }
  }

  /// Assigns nearest codes. Rows whose code changes update the sums and the weights of both codes.
  void assign(const Residuals& r, int64_t first, int64_t end) noexcept {
    std::copy(bounds.assigned + first, bounds.assigned + end, previous);
    parallel_pieces(context, end - first, kPiece, [&](int64_t piece, int64_t piece_end, int w) {
      for (int64_t part = first + piece; part < first + piece_end; part += KMeansBounds::kPart)
        bounds.assign(level, r, part, std::min(first + piece_end, part + KMeansBounds::kPart), worker[w]);
    });
    const int64_t columns = workers == 1 ? width : kColumns, slices = (width + columns - 1) / columns;
    const int64_t groups = workers == 1 ? 1 : std::min<int64_t>(level.size, (4 * workers + slices - 1) / slices);
    const int64_t each = (level.size + groups - 1) / groups;
    parallel_each(context, slices * groups, [&](int64_t unit, int w) {
      update_sums(r, first, end, unit % slices * columns, columns, unit / slices * each, each, four + 4 * w * width);
    });
  }

  /// Updates columns [column, column + columns) of the sums of codes [first_code, first_code + each). Units of work
  /// write to different memory, so one array of sums serves all workers.
  void update_sums(const Residuals& r, int64_t first, int64_t end, int64_t column, int64_t columns, int64_t first_code,
                   int64_t each, float* row) noexcept {
    const int64_t count = std::min(columns, width - column);
    const auto inside = [&](int32_t code) { return code >= first_code && code < first_code + each; };
    int64_t *const totals = tally(), *const weights = totals + level.size * width;
    const double scale = std::ldexp(1.0, bits);
    for (int64_t i = first; i < end; ++i) {
      const int32_t old_code = previous[i - first], new_code = bounds.assigned[i];
      if (old_code == new_code || !(inside(old_code) || inside(new_code))) continue;
      int64_t* const added = inside(new_code) ? totals + new_code * width + column : nullptr;
      int64_t* const removed = inside(old_code) ? totals + old_code * width + column : nullptr;
      const double w = weight(i);
      r.load(i, column, count, row);
      for (int64_t d = 0; d < count; ++d) {
        const int64_t x = std::llrint(double(row[d]) * w * scale);
        if (added) added[d] += x;
        if (removed) removed[d] -= x;
      }
      if (column > 0) continue;
      const int64_t share = std::llrint(std::ldexp(w, weight_bits));
      if (added) weights[new_code] += share;
      if (removed) weights[old_code] -= share;
    }
  }

  /// Adds the square distances of rows to their codes, and finds the rows with the largest.
  void measure(const Residuals& r, int64_t first, int64_t end) noexcept {
    parallel_pieces(context, end - first, kPiece, [&](int64_t piece, int64_t piece_end, int w) {
      int64_t row[4];
      int found = 0;
      for (int64_t i = first + piece; i < first + piece_end; ++i) {
        value[i - first] = -1;
        if (bounds.assigned[i] != kLeftOut) row[found++] = i;
        if (found == 4) measure_four(r, row, std::exchange(found, 0), first, four + 4 * w * width);
      }
      if (found > 0) measure_four(r, row, found, first, four + 4 * w * width);
    });
    for (int64_t i = first; i < end; ++i) {
      const double distance = value[i - first];
      if (distance < 0) continue;
      ExactSum::add(shared, distance * weight(i));
      uint64_t key;
      std::memcpy(&key, &distance, 8);
      if (distance > 0 && distinct.wants(~key, before + i)) r.load(i, distinct.add(~key, before + i));
    }
  }

  void measure_four(const Residuals& r, const int64_t* row, int found, int64_t first, float* residual) noexcept {
    const float *x[4], *c[4];
    double square[4];
    for (int j = 0; j < 4; ++j) {
      const int at = std::min(j, found - 1);
      x[j] = residual + at * width;
      c[j] = level.centers + bounds.assigned[row[at]] * width;
      if (j < found) r.load(row[j], residual + j * width);
    }
    square_distances(x, c, width, square);
    for (int j = 0; j < found; ++j) value[row[j] - first] = square[j];
  }

  // ---------------------------------------------------------------------------------------------- between the passes

  /// Ends a pass whose shared numbers are the sums of all processes, and begins the next; *ended: whether a round did.
  Status next(bool* ended, bool* done) noexcept {
    if (turn >= 0) see_distinct();
    const bool choice = (pass == Pass::first && !params.init) || pass == Pass::measure;
    if (pass == Pass::first && turn < 0) see_grid();
    if (pass == Pass::measure && turn < 0) report->error[level_number] = error();
    if (several() && choice && turn + 1 < params.processes) {
      ++turn;
      show_distinct();
      return {};
    }
    turn = -1;
    switch (pass) {
      case Pass::scan:
        return begin_fit();
      case Pass::first:
        begin_rounds();
        return {};
      case Pass::assign:
        find_means();
        if (measured || empty_codes() > 0) {
          distinct.start(empty_codes());
          begin(Pass::measure);
        } else {
          end_round();
          *ended = true;
        }
        return {};
      case Pass::measure:
        seed_empty_codes();
        end_round();
        *ended = true;
        return {};
      case Pass::finish:
        *done = end_level();
        return {};
    }
    return {};
  }

  /// Decides which rows take part: those whose values are below kFitLimit, and not so much larger than the median row's
  /// that the unit of the sums would be coarser than 2^-16 of that row.
  Status begin_fit() noexcept {
    for (int p = 0; p < params.processes; ++p) {
      const int64_t found = process_rows()[p] & ((int64_t{1} << 41) - 1);
      measured |= process_rows()[p] != found;
      if (p < params.process) before += found;
      all_rows += found;
    }
    const Exponents found = exponents(0);
    if (found.total() == 0)
      return invalid("fit: x is [%" PRId64 ", %" PRId64 "] without a usable row, expected at least one", all_rows,
                     width);
    limit = found.above_zero() ? found.median() + kFitRange - bits_of(static_cast<uint64_t>(found.total())) : 0;
    n = found.up_to(limit);
    for (int64_t i = 0; i < rows; ++i) codes[i] = codes[i] == kLeftOut || codes[i] > limit + kExponents ? kLeftOut : -1;
    *report = {};
    report->rows = n;
    report->left_out = all_rows - n;
    begin_level();
    return {};
  }

  void begin_level() noexcept {
    for (int64_t i = 0; i < rows && level_number > 0; ++i)
      codes[level_number * rows + i] = codes[i] == kLeftOut ? kLeftOut : -1;
    distinct.start(params.init ? 0 : size());
    begin(Pass::first);
  }

  /// The bits for which units of 2^-bits keep every sum below 2^62.
  void see_grid() noexcept {
    const int counted = bits_of(static_cast<uint64_t>(n));
    bits = 61 - exponents(0).largest() - counted;
    weight_bits = params.weights ? 61 - exponents(1).largest() - counted : 0;
  }

  void begin_rounds() noexcept {
    float* const out = centers[level_number].data;
    if (params.init) {
      std::copy_n(params.init[level_number].data, size() * width, out);
    } else {
      const int64_t found = distinct.settle();
      for (int64_t c = 0; c < size(); ++c) std::copy_n(distinct.values(c < found ? c : 0), width, out + c * width);
    }
    center[level_number] = out;
    level = Level::make(size(), width, out, level_memory);
    bounds.start(level, rows, codes + level_number * rows);
    std::fill_n(sums, tallies(), 0);
    round = 0;
    settled = false;
    begin_pass();
  }

  void begin_pass() noexcept {
    const bool last = settled || round == params.iterations;
    distinct.start(0);
    begin(last ? Pass::finish : Pass::assign);
  }

  const int64_t* weights() const noexcept { return sums + size() * width; }
  int64_t empty_codes() const noexcept { return std::count(weights(), weights() + size(), int64_t{0}); }

  void add_tallies() noexcept {
    for (int64_t i = 0; i < tallies() && several(); ++i) sums[i] += tally()[i];
    int64_t total = 0;
    for (int64_t c = 0; c < size(); ++c) total += weights()[c];
    total_weight = std::ldexp(static_cast<double>(total), -weight_bits);
  }

  void find_means() noexcept {
    add_tallies();
    const double unit = std::ldexp(1.0, -bits), weight_unit = std::ldexp(1.0, -weight_bits);
    for (int64_t c = 0; c < size(); ++c)
      for (int64_t d = 0; d < width && weights()[c]; ++d)
        new_centers[c * width + d] = static_cast<float>(static_cast<double>(sums[c * width + d]) * unit /
                                                        (static_cast<double>(weights()[c]) * weight_unit));
  }

  double error() noexcept {
    ExactSum::carry(shared);
    return ExactSum::value(shared) / total_weight;
  }

  /// Gives codes without rows new centers: the rows farthest from theirs, then copies of the lowest used code, which
  /// are never assigned.
  void seed_empty_codes() noexcept {
    int64_t used = 0;
    while (weights()[used] == 0) ++used;
    const int64_t seeds = distinct.settle();
    for (int64_t c = 0, j = 0; c < size(); ++c) {
      if (weights()[c] != 0) continue;
      std::copy_n(j < seeds ? distinct.values(j) : new_centers + used * width, width, new_centers + c * width);
      ++j;
    }
  }

  void end_round() noexcept {
    report->iterations[level_number] = ++round;
    settled = std::equal(new_centers, new_centers + size() * width, level.centers);
    if (!settled) {
      bounds.move(level, new_centers);
      std::copy_n(new_centers, size() * width, centers[level_number].data);
      level = Level::make(size(), width, level.centers, level_memory);
    }
    begin_pass();
  }

  /// Returns whether it was the last.
  bool end_level() noexcept {
    add_tallies();
    report->error[level_number] = error();
    report->unused[level_number] = empty_codes();
    if (++level_number == params.levels) return true;
    begin_level();
    return false;
  }
};

Fit& fit_of(const FitStep& step) noexcept { return *static_cast<Fit*>(step.state); }

void describe(const Fit& fit, FitStep* step) noexcept {
  step->reads = fit.turn < 0 && !step->done;
  step->shared = {fit.shared, {step->done ? 0 : fit.shared_size()}};
}

}  // namespace

size_t fit_workspace(const Context& context, const FitParams& params, int64_t rows, int64_t width) noexcept {
  Arena arena;
  arena.take<Fit>(1);
  Fit(context, params, rows, width).carve(arena);
  return arena.used();
}

Status fit_begin(const Context& context, const FitParams& params, int64_t rows, int64_t width,
                 const Array<float, 2>* centers, FitReport* report, FitStep* step) noexcept {
  Arena arena(context.workspace);
  Fit* const place = arena.take<Fit>(1);
  Fit state(context, params, rows, width);
  state.carve(arena);
  HISAC_TRY(arena.check("fit"));
  std::copy_n(centers, params.levels, state.centers);
  state.report = report;
  state.begin(Pass::scan);
  *step = {};
  step->state = new (place) Fit(state);
  describe(state, step);
  return {};
}

Status fit_add(const Context& context, FitStep* step, Rows x) noexcept {
  Fit& fit = fit_of(*step);
  if (x.width != fit.width || x.rows > fit.rows - fit.cursor)
    return invalid("fit: a chunk expected [%" PRId64 ", %" PRId64 "] at most, got [%" PRId64 ", %" PRId64 "]",
                   fit.rows - fit.cursor, fit.width, x.rows, x.width);
  if (workers_of(context) > fit.workers)
    return invalid("fit: a context expected at most %d workers, got %d", fit.workers, workers_of(context));
  fit.context.executor = context.executor;
  fit.add(x);
  return {};
}

Status fit_next(const Context&, FitStep* step) noexcept {
  Fit& fit = fit_of(*step);
  if (step->reads && fit.cursor < fit.rows)
    return invalid("fit: a pass expected %" PRId64 " rows, got %" PRId64, fit.rows, fit.cursor);
  const int level = fit.level_number;
  bool ended = false;
  HISAC_TRY(fit.next(&ended, &step->done));
  describe(fit, step);
  const FitParams& params = fit.params;
  if (ended && ((params.progress && !params.progress(params.ctx, level, fit.round, fit.report->error[level])) ||
                (params.keep_going && !params.keep_going(params.ctx))))
    return Status::error(Code::cancelled, "fit: cancelled at level %d, round %d", level, fit.round);
  return {};
}

}  // namespace hisac::cpu
