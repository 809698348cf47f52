// SPDX-License-Identifier: Apache-2.0
// Residual k-means, as passes over a source. Its result does not depend on how the work is divided, over threads,
// chunks or processes: codes are exact, sums are integers or exact, each row's random number follows from its index,
// and every choice is made in a fixed order.
//
// After a pass the processes sum `shared`, number by number; one process alone leaves it as it is. Then it holds
//
//   scan     rows by the exponent of their largest value, processes that want each round measured, rows of each process
//   weigh    rows by the exponent of their weight
//   first    rows by the exponent of their largest w |r|, processes whose rows are not those of `scan`
//   assign   of several processes: kDigits zeros, then what the round changes in `sums`
//   measure  the digits of the sum of w |r - c|^2
//   finish   these digits, and of several processes what the pass changes in `sums`
//   a turn   follows `first` and `measure`, for each of several processes: its seeds, as FirstDistinct tells them
//
// `sums` are those of all processes. One process alone adds to them where it reads rows; several add to `shared`, at
// changes(), and once the pass has ended, all of them add the total to their `sums`.
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

constexpr int64_t kPiece = 4096;  // rows of one unit of work
constexpr int64_t kPieces = 32;   // of each worker, in a block of rows
constexpr int64_t kColumns = 16;  // of the sums in one unit of work: a cache line of a row

/// What a pass over the rows is for.
enum class Pass {
  scan,     // which rows are usable, and how large they are
  weigh,    // no rows are read: weights of the rows that are not too large
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
  int level_number = 0, round = 0, turn = -1;  // turn: of the process whose seeds are shared
  int64_t cursor = 0;                          // rows of the pass that have been read
  uint64_t mark = 0;                           // of the rows of `scan`, less that of the rows of the first `first`
  bool settled = false, measured = false;      // measured: each round is
  int64_t n = 0, all_rows = 0, first_row = 0;  // rows that take part; all; the number of this process's first among all
  int bits = 0, weight_bits = 0;
  double total_weight = 0;

  const float* center[kMaxLevels] = {};
  Level level;
  KMeansBounds bounds;
  FirstDistinct seeds;              // rows that become centers: the first by priority, or (key ~distance) the farthest
  int32_t* codes = nullptr;         // [levels, rows]
  int32_t* previous = nullptr;      // [block] codes before the round
  double* largest_value = nullptr;  // [block] |r|, in `scan` and `first`; -1: not usable
  double* distance = nullptr;       // [block] to the code, in `measure` and `finish`, in the same memory; -1: no code
  int64_t* shared = nullptr;        // see above
  int64_t* sums = nullptr;          // [C, D] of rint(w r 2^bits), then [C] of rint(w 2^weight_bits)
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
  int64_t size() const noexcept { return params.sizes[level_number]; }
  int64_t tallies() const noexcept { return size() * (width + 1); }

  void carve(Arena& arena) noexcept {
    const int64_t wanted = several() ? largest : std::min(largest, rows);
    codes = arena.take<int32_t>(rows, params.levels);
    bounds.carve(arena, rows, largest);
    seeds.carve(arena, wanted, width);
    arena.take_into(block_rows, previous, largest_value);
    distance = largest_value;
    int64_t most = kExponents + 2 + params.processes;
    if (several())
      most = std::max({most, ExactSum::kDigits + largest * (width + 1), FirstDistinct::told_words(wanted, width)});
    shared = arena.take<int64_t>(most);
    sums = arena.take<int64_t>(largest, width + 1);
    new_centers = arena.take<float>(largest, width);
    level_memory = arena.take<float>(Level::floats(largest, width));
    four = arena.take<float>(4 * workers, width);
    worker = arena.take_each<KMeansBounds::Scratch>(
        workers, [&](KMeansBounds::Scratch& one) { one.carve(arena, width, largest); });
  }

  // ------------------------------------------------------------------------------------------- shared with processes

  Exponents exponents() const noexcept { return {shared}; }
  /// How many processes want each round measured, or have other rows than before; in `scan`, then the rows of each.
  int64_t& processes_flagged() const noexcept { return shared[kExponents + 1]; }
  int64_t* process_rows() const noexcept { return shared + kExponents + 2; }
  int64_t* changes() const noexcept { return several() ? shared + ExactSum::kDigits : sums; }

  /// How many numbers of `shared` the pass at hand adds to.
  int64_t shared_size() const noexcept {
    if (turn >= 0) return FirstDistinct::told_words(std::min(largest, size()), width);
    if (pass == Pass::scan) return kExponents + 2 + params.processes;
    if (pass == Pass::weigh || pass == Pass::first) return kExponents + 2;
    return ExactSum::kDigits + (several() && pass != Pass::measure ? tallies() : 0);
  }

  void begin(Pass next) noexcept {
    pass = next;
    cursor = 0;
    std::fill_n(shared, shared_size(), 0);
    if (pass == Pass::weigh)
      for (int64_t i = 0; i < rows; ++i)
        if (codes[i] != kLeftOut) exponents().add(weight(i));
    if (pass != Pass::scan) return;
    processes_flagged() = params.progress ? 1 : 0;
    process_rows()[params.process] = rows;
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
        double& found = largest_value[i - begin];
        found = -1;
        if (level_number > 0 && codes[i] == kLeftOut) continue;
        float* const row = four + 4 * w * width;
        r.load(i, row);
        const float value = largest_of(row, width);
        const double one = weight(i);
        if (level_number > 0 || (value < kFitLimit && one > 0 && one <= double(FLT_MAX))) found = double(value);
      }
    });
    const uint64_t seed = mix64(params.seed + static_cast<uint64_t>(level_number + 1) * kGolden);
    for (int64_t i = begin; i < end; ++i) {
      const double found = largest_value[i - begin];
      if (level_number == 0 && found >= 0) mark += pass == Pass::scan ? mark_of(i, found) : 0 - mark_of(i, found);
      // zero is as small as a value can be
      if (pass == Pass::scan) codes[i] = found < 0 ? kLeftOut : found > 0 ? exponent_of(found) + kExponents : 0;
      if (found < 0 || codes[i] == kLeftOut) continue;
      exponents().add(pass == Pass::scan ? found : found * weight(i));
      if (pass == Pass::scan || params.init) continue;
      const int64_t row = first_row + i;
      const uint64_t key = mix64(seed + (static_cast<uint64_t>(row) + 1) * kGolden);
      if (seeds.wants(key, row)) r.load(i, seeds.add(key, row));
    }
    if (end == rows && pass == Pass::first && level_number == 0) processes_flagged() = mark != 0;
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
    int64_t *const totals = changes(), *const weights = totals + level.size * width;
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
        distance[i - first] = -1;
        if (bounds.assigned[i] != kLeftOut) row[found++] = i;
        if (found == 4) measure_four(r, row, std::exchange(found, 0), first, four + 4 * w * width);
      }
      if (found > 0) measure_four(r, row, found, first, four + 4 * w * width);
    });
    for (int64_t i = first; i < end; ++i) {
      const double found = distance[i - first];
      if (found < 0) continue;
      ExactSum::add(shared, found * weight(i));
      uint64_t key;  // distances are ordered as their bits
      std::memcpy(&key, &found, 8);
      if (found > 0 && seeds.wants(~key, first_row + i)) r.load(i, seeds.add(~key, first_row + i));
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
    for (int j = 0; j < found; ++j) distance[row[j] - first] = square[j];
  }

  // ---------------------------------------------------------------------------------------------- between the passes

  /// Ends a pass whose shared numbers are the sums of all processes, and begins the next; *ended: whether a round did.
  Status next(bool* ended, bool* done) noexcept {
    if (turn >= 0 && turn != params.process) seeds.hear(shared);
    const bool choice = (pass == Pass::first && !params.init) || pass == Pass::measure;
    if (pass == Pass::first && turn < 0) HISAC_TRY(see_grid());
    if (pass == Pass::measure && turn < 0) report->error[level_number] = error();
    if (several() && choice && turn + 1 < params.processes) {
      ++turn;
      std::fill_n(shared, shared_size(), 0);
      if (turn == params.process) seeds.tell(shared);
      return {};
    }
    turn = -1;
    switch (pass) {
      case Pass::scan:
        HISAC_TRY(leave_out_large());
        begin(Pass::weigh);
        if (several()) return {};
        [[fallthrough]];
      case Pass::weigh:
        leave_out_light();
        begin_level();
        return {};
      case Pass::first:
        begin_rounds();
        return {};
      case Pass::assign:
        find_means();
        if (measured || empty_codes() > 0) {
          seeds.start(empty_codes());
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

  /// Leaves out rows that would make the unit of the sums coarser than 2^-16 of the median row. Zero rows stay.
  Status leave_out_large() noexcept {
    measured = processes_flagged() > 0;
    for (int p = 0; p < params.processes; ++p) {
      if (p < params.process) first_row += process_rows()[p];
      all_rows += process_rows()[p];
    }
    const Exponents found = exponents();
    if (found.total() == 0)
      return invalid("fit: x is [%" PRId64 ", %" PRId64 "] without a usable row, expected at least one", all_rows,
                     width);
    const int limit = found.median() + kFitRange - bits_of(static_cast<uint64_t>(found.total()));
    for (int64_t i = 0; i < rows; ++i)
      if (codes[i] > limit + kExponents) codes[i] = kLeftOut;
    return {};
  }

  /// Leaves out, of the others, rows whose weight has less than 2^4 units of the sums of weights.
  void leave_out_light() noexcept {
    const Exponents found = exponents();
    const int heaviest = found.largest(), counted = bits_of(static_cast<uint64_t>(found.total()));
    const int limit = heaviest + counted - kWeightRange;
    for (int64_t i = 0; i < rows; ++i)
      codes[i] = codes[i] == kLeftOut || exponent_of(weight(i)) < limit ? kLeftOut : -1;
    n = found.total() - found.up_to(limit - 1);
    weight_bits = params.weights ? 61 - heaviest - bits_of(static_cast<uint64_t>(n)) : 0;
    *report = {};
    report->rows = n;
    report->left_out = all_rows - n;
  }

  void begin_level() noexcept {
    for (int64_t i = 0; i < rows && level_number > 0; ++i)
      codes[level_number * rows + i] = codes[i] == kLeftOut ? kLeftOut : -1;
    seeds.start(params.init ? 0 : size());
    begin(Pass::first);
  }

  /// The bits for which units of 2^-bits keep every sum below 2^62.
  Status see_grid() noexcept {
    if (processes_flagged() > 0) return invalid("fit: x expected to have the same rows in every pass, got others");
    bits = 61 - exponents().largest() - bits_of(static_cast<uint64_t>(n));
    return {};
  }

  void begin_rounds() noexcept {
    float* const out = centers[level_number].data;
    if (params.init) {
      std::copy_n(params.init[level_number].data, size() * width, out);
    } else {
      const int64_t found = seeds.settle();
      for (int64_t c = 0; c < size(); ++c) std::copy_n(seeds.values(c < found ? c : 0), width, out + c * width);
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
    seeds.start(0);
    begin(last ? Pass::finish : Pass::assign);
  }

  const int64_t* weights() const noexcept { return sums + size() * width; }
  int64_t empty_codes() const noexcept { return std::count(weights(), weights() + size(), int64_t{0}); }

  void add_tallies() noexcept {
    for (int64_t i = 0; i < tallies() && several(); ++i) sums[i] += changes()[i];
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
    const int64_t found = seeds.settle();
    for (int64_t c = 0, j = 0; c < size(); ++c) {
      if (weights()[c] != 0) continue;
      std::copy_n(j < found ? seeds.values(j) : new_centers + used * width, width, new_centers + c * width);
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
  step->reads = fit.turn < 0 && fit.pass != Pass::weigh && !step->done;
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
