// SPDX-License-Identifier: Apache-2.0
// How many votes each row of a user has, where there are weights (the definition is in hisac/vote.h). A block first
// reads all weights of the user, then a row's votes follow from its own.
#pragma once
#include "base/radix_sort.h"
#include "cuda/device/block.h"
#include "hisac/histories.h"

namespace hisac::cuda {

/// What turns a user's weights into votes.
struct VoteScale {
  float largest, most;  // float32: of the weights; the votes of that row
  int shift;            // int64
};

/// A weight within its limits, as an integer: of float32, whose order is that of its bits, these. 0: no vote.
SIMT_DEVICE uint64_t limited_weight(const Weights& weights, int64_t row) {
  if (weights.dtype == DType::int64) {
    const int64_t w = static_cast<const int64_t*>(weights.data)[row];
    return w < 0 ? 0 : static_cast<uint64_t>(w) < kMostVotes ? static_cast<uint64_t>(w) : kMostVotes;
  }
  const float w = static_cast<const float*>(weights.data)[row];
  return w > 0 ? simt::bits_of(smaller(w, kLargest)) : 0;  // not of NaN
}

/// The votes of a row that has a leaf.
SIMT_DEVICE uint64_t votes_of(const Weights& weights, const VoteScale& scale, int64_t row) {
  const uint64_t limited = limited_weight(weights, row);
  if (weights.dtype == DType::int64) return limited >> scale.shift;
  if (!limited) return 0;
  const float votes = simt::float_of(static_cast<uint32_t>(limited)) / scale.largest * scale.most;
  return static_cast<uint64_t>(votes < 0x1p23f ? votes + 0x1p23f - 0x1p23f : votes);  // floats from 2^23 on are whole
}

/// By a block: the scale of a user's rows [first, first + rows), of which has_leaf(row) tells which may vote.
template <class HasLeaf>
SIMT_DEVICE VoteScale scale_of_votes(const Weights& weights, int64_t first, int rows, HasLeaf has_leaf) {
  const bool integers = weights.dtype == DType::int64;
  uint64_t own = 0, all = 0;  // the sum of integers, or the largest float
  int own_voters = 0, voters = 0;
  for (int i = simt::thread(); i < rows; i += simt::threads()) {
    const uint64_t limited = has_leaf(first + i) ? limited_weight(weights, first + i) : 0;
    own = integers ? own + limited : Larger{}(own, limited);
    own_voters += limited != 0;
  }
  if (integers)
    scan_threads(own, &all, Add{});
  else
    scan_threads(own, &all, Larger{});
  scan_threads(own_voters, &voters, Add{});
  const auto bits = [](uint64_t n) {
    int count = 0;
    SIMT_ROLLED for (; n; n /= 2)++ count;
    return count;
  };
  const int float_bits = least(kWeightBits, kVoteBits - bits(static_cast<uint64_t>(voters)));
  const int excess = integers ? bits(all) - kVoteBits : 0;
  return {simt::float_of(static_cast<uint32_t>(all)), static_cast<float>(1 << float_bits), excess > 0 ? excess : 0};
}

}  // namespace hisac::cuda
