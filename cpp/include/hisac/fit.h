// SPDX-License-Identifier: Apache-2.0
// Learns a codebook: residual k-means, level by level.
#pragma once
#include "codebook.h"
#include "context.h"

namespace hisac {

struct FitParams {
  int levels = 0;
  int64_t sizes[kMaxLevels] = {};  // C_l, 1 to 2^20
  int iterations = 20;
  uint64_t seed = 0;
  /// The centers to begin with, [C_l, D] of each level, below 2^110; null: distinct rows. So a codebook is refitted,
  /// and keeps the order of its codes.
  const Array<const float, 2>* init = nullptr;
  /// [T] of the rows of this process; none: 1 each. A row whose weight is not above 0 and finite takes no part, nor
  /// does one whose weight is nothing beside the largest; see `fit`.
  Array<const float, 1> weights{};
  /// Of a fit by several processes: how many they are, and the number of this one. Each has its own rows, and the fit
  /// is that of one process over these rows one after another.
  int processes = 1, process = 0;
  /// Called after each round, may be null; false stops the fit with Code::cancelled. `progress` gets the mean squared
  /// distance of the round, which costs a pass of its own.
  bool (*keep_going)(void* ctx) = nullptr;
  bool (*progress)(void* ctx, int level, int round, double error) = nullptr;
  void* ctx = nullptr;
};

/// Lloyd's rounds from distinct rows drawn by counter-based random numbers of (seed, level, row). A round assigns as
/// `encode` does and sums rint(w x 2^k) in int64, so the result has the same bits for any number of threads, chunks and
/// processes. Codes without rows take the worst-quantised rows. A row's weight w counts in means and in errors alone,
/// not in the choice of rows.
///
/// Left out are rows with a NaN or with a magnitude of 2^100 or more. Of the other rows, those with e > m + 46 - b are
/// left out, since they would make the grid of the sums coarser than 2^-16 of the median row. Here e is the binary
/// exponent of a row's largest magnitude, m the upper median of e over the other rows that are not zero, and b the
/// number of bits in the count of the other rows. Zero rows stay. Of the rows that are left then, those with
/// f < F + c - 56 are left out, since the grid of the weights would have fewer than 2^4 units for them. Here f is the
/// binary exponent of a row's weight, F the largest f, and c the number of bits in the count of these rows.
///
/// x [T, D] -> the centers of each level, [C_l, D], and a report, which may not be null. Give both to Codebook::build.
Status fit(const Context& context, const FitParams& params, Rows x, const Array<float, 2>* centers,
           FitReport* report) noexcept;
/// In bytes, at most 2^14 more than T (68 + 4 levels) + C (24 D + 150) + W (72 C + 2,100 D + 70,000)
/// + 12 min(T, 131,072 W), with C the largest C_l and W workers; C (8 D + 8) more for several processes. No residuals
/// are kept.
size_t fit_workspace(const Context& context, const FitParams& params, int64_t rows, int64_t width) noexcept;

/// The same fit over rows that come in chunks, where the rows of a process are read again in every pass:
///
///     FitStep step;
///     fit_begin(context, params, T, D, centers, &report, &step);
///     while (!step.done) {
///       for (Rows chunk : source) if (step.reads) fit_add(context, &step, chunk);
///       // here several processes replace step.shared by its sum over all of them
///       fit_next(context, &step);
///     }
///
/// A pass reads all rows once, in order; chunks may be of any size, and differ from pass to pass. Rows must not: the
/// second pass compares each row's largest magnitude with that of the first, and fit_next fails in all processes where
/// one has others; later passes compare nothing. A level takes a pass
/// to begin, one a round, one more for a round in which codes lose their rows or which `progress` sees, and one to end.
struct FitStep {
  bool reads = false;          // whether the pass reads rows
  bool done = false;           // then centers and report are there
  Array<int64_t, 1> shared{};  // in the workspace: what processes have to sum, element by element
  void* state = nullptr;       // in the workspace
};

/// Begins a fit in the context's workspace, of fit_workspace(context, params, rows, width) bytes, which is the fit's
/// until it is done. So are centers, report, and what params points to. rows: those of this process.
Status fit_begin(const Context& context, const FitParams& params, int64_t rows, int64_t width,
                 const Array<float, 2>* centers, FitReport* report, FitStep* step) noexcept;
/// chunk [n, D], the next rows of the pass. The context lends threads, no more than the one of fit_begin; an error
/// where rows are too many or D differs.
Status fit_add(const Context& context, FitStep* step, Rows chunk) noexcept;
/// Ends a pass; an error where rows are missing or not those of the pass before, or where no row of any process can be
/// used. Calls keep_going and progress where a round ends.
Status fit_next(const Context& context, FitStep* step) noexcept;

}  // namespace hisac
