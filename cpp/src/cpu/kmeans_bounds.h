// SPDX-License-Identifier: Apache-2.0
// Nearest codes of rows over the rounds of k-means. The distances of one round bound those of the next, in which the
// centers have moved, so that most products are skipped. The codes are the definition's, whatever is skipped.
#pragma once
#include "cpu/kmeans_rows.h"
#include "cpu/nearest.h"

namespace hisac::cpu {

class KMeansBounds {
 public:
  static constexpr int kGroups = 16;  // most groups of codes; a group is whole panels with one lower bound
  static constexpr int kPart = 1024;  // most rows of a call
  static constexpr int kSlots = 256;  // most of these that are scanned at once

  /// The state of one row in a call.
  struct Row {
    simd::Screen screen;
    double squares;   // a lower bound of its |r|^2
    double distance;  // square distance to `best`
    int32_t best;
    uint32_t groups;  // a bit for each group that is to be scanned
  };

  struct Scratch {
    Row* row = nullptr;            // [kPart]
    int* slot = nullptr;           // [kSlots] the rows that are to be scanned, from `begin` on
    float* residual = nullptr;     // [kSlots, D]
    uint32_t* screened = nullptr;  // [kSlots, screened_width]
    uint32_t* tile = nullptr;      // [rows, screened_width]
    float* scores = nullptr;       // [rows, pad(C)]
    int32_t* survivors = nullptr;  // [2 (C + 1)]
    void carve(Arena& arena, int64_t width, int64_t largest_size) noexcept;
  };

  void carve(Arena& arena, int64_t rows, int64_t largest_size) noexcept;
  /// Begins a level. codes [rows], to be kept, hold -1, or kLeftOut where a row takes no part.
  void start(const Level& level, int64_t rows, int32_t* codes) noexcept;
  /// Notes that the centers move from level.centers to new_centers; to be called before the next assign.
  void move(const Level& level, const float* new_centers) noexcept;
  /// Sets `assigned` of rows [begin, end) of a chunk, at most kPart.
  void assign(const Level& level, const Residuals& residuals, int64_t begin, int64_t end, Scratch& s) noexcept;

  int32_t* assigned = nullptr;  // [rows] the nearest code

 private:
  void scan(const Level& level, int64_t begin, int slots, Scratch& s) noexcept;
  void scan_group(const Level& level, int g, const int* tile_slot, int n, int64_t begin, Scratch& s) noexcept;
  int64_t group_of(int64_t code) const noexcept;

  int groups_ = 0;
  int64_t first_[kGroups + 1] = {};  // codes of the groups
  float* upper_ = nullptr;           // [rows] at least the distance to the row's code
  float* lower_ = nullptr;           // [rows, kGroups] at most the distance to any other code of the group
  float* drift_ = nullptr;           // [C] at least what the code's center moved
  float group_drift_[kGroups] = {};
};

}  // namespace hisac::cpu
