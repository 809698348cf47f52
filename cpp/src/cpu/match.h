// SPDX-License-Identifier: Apache-2.0
// The nodes of the code tree that a user's candidates ask for. The user's sums are sorted by code, so a node is a range
// of them, which is named by its level and its first sum. Sums are counted from the user's first.
#pragma once
#include "base/arena.h"
#include "cpu/simd/kernels.h"
#include "hisac/match.h"

namespace hisac::cpu {

/// One user's sums and nodes, in one worker's scratch.
class MatchUser {
 public:
  /// node [N, L], next [N, L]: of all users, shared by all workers. next null: there are no chains.
  void carve(Arena& arena, const Codebook& book, const MatchInputs& in, int64_t* node, int64_t* next) noexcept;

  /// Finds the nodes of all candidates of user b.
  void load(const MatchInputs& in, int64_t b) noexcept;

  int64_t start() const noexcept { return start_; }
  /// The biases of sums from `first` on; -inf: absent.
  const float* bias(int64_t first) const noexcept { return bias_ + first; }

  /// The first sum of the node of a candidate and level; -1: there are no sums.
  int64_t first(int64_t n, int64_t level) const noexcept { return node_[n * levels_ + level]; }
  /// The end of the node of a level that begins with sum `first`.
  int64_t last(int64_t first, int64_t level) const noexcept;
  /// The first candidate of a node; and the one after n of the same node, or -1.
  int64_t owner(int64_t first, int64_t level) const noexcept { return owner_[level * size_ + first]; }
  int64_t next(int64_t n, int64_t level) const noexcept { return next_[n * levels_ + level]; }

 private:
  /// The number of a leaf; false where a code is invalid.
  bool leaf_of(const int32_t* code, uint64_t* leaf) const noexcept;
  void load_sums(const Histories& sums) noexcept;
  void find_nodes(const MatchInputs& in, int64_t n) noexcept;
  /// The first sum whose leaf is not below `leaf`.
  int64_t find(uint64_t leaf) const noexcept;

  uint32_t codes_[kMaxLevels] = {};   // of a level
  uint64_t stride_[kMaxLevels] = {};  // leaves below a node of a level
  int all_bits_ = 0, shift_ = 0;      // of all leaves; of a leaf's number, less those of its bucket
  uint64_t most_ = 0;                 // the largest power of two that the sums of a bucket reach
  int64_t levels_ = 0, start_ = 0, size_ = 0;
  float* bias_ = nullptr;
  uint64_t* leaf_ = nullptr;  // of a sum
  int64_t* begin_ = nullptr;  // the first sum of a bucket of leaves
  int64_t* owner_ = nullptr;  // [L, size]
  int64_t *node_ = nullptr, *next_ = nullptr;
};

}  // namespace hisac::cpu
