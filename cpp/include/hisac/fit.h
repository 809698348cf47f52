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
  /// Called after each round, may be null; false stops the fit with Code::cancelled. `progress` gets the mean squared
  /// distance of the round, which costs a pass of its own.
  bool (*keep_going)(void* ctx) = nullptr;
  bool (*progress)(void* ctx, int level, int round, double error) = nullptr;
  void* ctx = nullptr;
};

/// Lloyd's rounds from distinct rows drawn by counter-based random numbers of (seed, level, row). A round assigns as
/// `encode` does and sums rint(x 2^k) in int64, so the result has the same bits for any number of threads. Codes
/// without rows take the worst-quantised rows.
///
/// Left out are rows with a NaN or with a magnitude of 2^100 or more. Of the other rows, those with e > m + 46 - b are
/// left out, since they would make the grid of the sums coarser than 2^-16 of the median row. Here e is the binary
/// exponent of a row's largest magnitude, m the upper median of e over the other rows that are not zero, and b the
/// number of bits in the count of the other rows.
///
/// x [T, D] -> the centers of each level, [C_l, D], and a report, which may not be null. Give both to Codebook::build.
Status fit(const Context& context, const FitParams& params, Rows x, const Array<float, 2>* centers,
           FitReport* report) noexcept;
size_t fit_workspace(const Context& context, const FitParams& params, int64_t rows, int64_t width) noexcept;

}  // namespace hisac
