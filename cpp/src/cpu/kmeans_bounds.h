// SPDX-License-Identifier: Apache-2.0
// Nearest codes of rows through rounds in which the centers move: what a round knows of the distances bounds them in
// the next, so that most products need not be made again. The codes are the definition's, whatever is skipped.
#pragma once
#include "cpu/nearest.h"

namespace hisac::cpu {

class Tracker {
 public:
  static constexpr int kGroups = 16;  // most groups of codes: whole panels, bounded together
  static constexpr int kPart = 512;   // most rows of a call

  /// A row of a part.
  struct Row {
    simd::Screen screen;
    double squares;   // a lower bound of its |r|^2
    double distance;  // to its best, squared
    int32_t best;
    uint32_t groups;  // a bit for each to look at
  };

  struct Scratch {
    Row* row = nullptr;            // [kPart]
    uint32_t* screened = nullptr;  // [kPart, screened_width]
    uint32_t* tile = nullptr;      // [rows, screened_width]
    float* scores = nullptr;       // [rows, pad(C)]
    int32_t* survivors = nullptr;  // [2 (C + 1)]
    void carve(Arena& arena, int64_t width, int64_t largest_size) noexcept;
  };

  void carve(Arena& arena, int64_t rows, int64_t largest_size) noexcept;
  /// Forgets all rows' codes: they are -1.
  void start(const Level& level, int64_t rows) noexcept;
  /// The centers go from level.centers to `fresh`; to be called before the next assign.
  void move(const Level& level, const float* fresh) noexcept;
  /// near of rows [begin, end) of r [rows, D], at most kPart.
  void assign(const Level& level, const float* r, int64_t begin, int64_t end, Scratch& s) noexcept {
    look(level, r, begin, end, s);
    for (int64_t i = begin; i < end; ++i) near[i] = s.row[i - begin].best;
  }

  int32_t* near = nullptr;  // [rows]

 private:
  void look(const Level& level, const float* r, int64_t begin, int64_t end, Scratch& s) noexcept;
  void look_at_group(const Level& level, const float* r, int g, const int64_t* at, int n, int64_t begin,
                     Scratch& s) noexcept;
  int group_of(int64_t code) const noexcept;

  int groups_ = 0;
  int64_t first_[kGroups + 1] = {};  // codes of the groups
  float* upper_ = nullptr;           // [rows] at least the distance to the row's code
  float* lower_ = nullptr;           // [rows, kGroups] at most the distance to any other code of the group
  float* drift_ = nullptr;           // [C] at least what the code's center moved
  float group_drift_[kGroups] = {};
};

}  // namespace hisac::cpu
