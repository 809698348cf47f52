// SPDX-License-Identifier: Apache-2.0
// Bounds after Elkan, Hamerly and Ding et al. (Yinyang k-means). By the triangle inequality a distance changes by at
// most what the center moved. A group whose lower bound is above the distance to the row's own code cannot hold a
// nearer code. Every bound is widened by 2^-20 relative. That is far more than the float64 sums of the definition and
// the bounds' float32 storage can err, so a skipped code is not the nearest by the definition either.
#include "cpu/kmeans_bounds.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "cpu/simd/pack.h"

namespace hisac::cpu {
namespace {

constexpr float kRoundUp = 1 + 0x1p-20f, kRoundDown = 1 - 0x1p-20f;

float upper_distance(double square) noexcept { return static_cast<float>(std::sqrt(square)) * kRoundUp; }
float lower_distance(double square) noexcept {
  return static_cast<float>(std::sqrt(std::max(square, 0.0))) * kRoundDown;
}

}  // namespace

void KMeansBounds::Scratch::carve(Arena& arena, int64_t width, int64_t largest_size) noexcept {
  row = arena.take<Row>(kPart);
  slot = arena.take<int>(kSlots);
  residual = arena.take<float>(kSlots, width);
  screened = arena.take<uint32_t>(kSlots * screened_width(width));
  tile = arena.take<uint32_t>(kScreenRows * screened_width(width));
  scores = arena.take<float>(kScreenRows * simd::pad(largest_size));
  survivors = arena.take<int32_t>(2 * (largest_size + 1));
}

void KMeansBounds::carve(Arena& arena, int64_t rows, int64_t largest_size) noexcept {
  upper_ = arena.take<float>(rows);
  lower_ = arena.take<float>(rows, kGroups);
  drift_ = arena.take<float>(largest_size);
}

void KMeansBounds::start(const Level& level, int64_t rows, int32_t* codes) noexcept {
  assigned = codes;
  std::fill(lower_, lower_ + rows * kGroups, 0.f);
  std::fill(group_drift_, group_drift_ + kGroups, 0.f);
  const int64_t panels = (level.size + simd::kPanel - 1) / simd::kPanel;
  const int64_t panels_per_group = (panels + kGroups - 1) / kGroups;
  groups_ = 0;
  for (int64_t first = 0, panel = 0; first < level.size; first += simd::panel_width(level.size, first))
    if (panel++ % panels_per_group == 0) first_[groups_++] = first;
  first_[groups_] = level.size;
}

void KMeansBounds::move(const Level& level, const float* new_centers) noexcept {
  const simd::Kernels& k = simd::kernels();
  for (int g = 0; g < groups_; ++g) {
    group_drift_[g] = 0;
    for (int64_t c = first_[g]; c < first_[g + 1]; ++c) {
      drift_[c] = upper_distance(
          k.square_distance(level.width, level.centers + c * level.width, new_centers + c * level.width));
      // a copy of another center was never compared
      group_drift_[g] = std::max(group_drift_[g], std::isinf(level.half[c]) ? INFINITY : drift_[c]);
    }
  }
}

int64_t KMeansBounds::group_of(int64_t code) const noexcept {
  return std::upper_bound(first_, first_ + groups_, code) - first_ - 1;
}

void KMeansBounds::assign(const Level& level, const Residuals& residuals, int64_t begin, int64_t end,
                          Scratch& s) noexcept {
  const simd::Kernels& k = simd::kernels();
  const int64_t width = level.width, row_width = screened_width(width);
  const double shrink = 1 - static_cast<double>(width + 8) * 0x1p-24, underflow = static_cast<double>(width) * 0x1p-120;
  int undecided[kPart], rows = 0;  // rows with a group that their bounds do not exclude
  for (int64_t i = begin; i < end; ++i) {
    Row& row = s.row[i - begin];
    float* const lower = lower_ + i * kGroups;
    row.best = assigned[i];
    if (row.best == kLeftOut) continue;
    row.groups = row.best < 0 ? (1u << groups_) - 1 : 0;
    if (row.best >= 0) upper_[i] = (upper_[i] + drift_[row.best]) * kRoundUp;
    for (int g = 0; g < groups_ && row.best >= 0; ++g) {
      lower[g] = (lower[g] - group_drift_[g]) * kRoundDown;
      row.groups |= static_cast<uint32_t>(!(lower[g] > upper_[i])) << g;
    }
    undecided[rows] = static_cast<int>(i - begin);
    rows += row.groups != 0;
  }
  int slots = 0;
  for (int j = 0; j < rows; ++j) {
    const int64_t i = begin + undecided[j];
    Row& row = s.row[undecided[j]];
    float* const lower = lower_ + i * kGroups;
    float* const x = s.residual + slots * width;
    residuals.load(i, x);
    if (j + 4 < rows) residuals.prefetch(begin + undecided[j + 4]);
    if (row.best >= 0) {
      row.distance = k.square_distance(width, x, level.centers + row.best * width);
      upper_[i] = upper_distance(row.distance);
      for (int g = 0; g < groups_; ++g)
        if (lower[g] > upper_[i]) row.groups &= ~(1u << g);
      if (row.groups == 0) continue;
    }
    const simd::Rounded sums = screened(level, x, s.screened + slots * row_width);
    row.squares = double(sums.squares) * shrink - underflow;
    if (screen_of(level, sums, &row.screen)) {
      s.slot[slots++] = undecided[j];
      if (slots == kSlots) scan(level, begin, std::exchange(slots, 0), s);
      continue;
    }
    std::iota(s.survivors, s.survivors + level.size, 0);
    row.best = closest(level, x, s.survivors, level.size);
    upper_[i] = INFINITY;
    std::fill_n(lower, groups_, 0.f);
  }
  scan(level, begin, slots, s);
  for (int64_t i = begin; i < end; ++i) assigned[i] = s.row[i - begin].best;
}

void KMeansBounds::scan(const Level& level, int64_t begin, int slots, Scratch& s) noexcept {
  const int64_t row_width = screened_width(level.width);
  for (int g = 0; g < groups_; ++g) {
    int tile_slot[kScreenRows], n = 0;
    for (int j = 0; j < slots; ++j) {
      if (s.row[s.slot[j]].groups >> g & 1) {
        std::copy_n(s.screened + j * row_width, row_width, s.tile + n * row_width);
        tile_slot[n++] = j;
      }
      if (n == kScreenRows || (n > 0 && j + 1 == slots)) scan_group(level, g, tile_slot, std::exchange(n, 0), begin, s);
    }
  }
  for (int j = 0; j < slots; ++j) upper_[begin + s.slot[j]] = upper_distance(s.row[s.slot[j]].distance);
}

void KMeansBounds::scan_group(const Level& level, int g, const int* tile_slot, int n, int64_t begin,
                              Scratch& s) noexcept {
  const int64_t first = first_[g], size = first_[g + 1] - first, ld = simd::pad(size);
  products(level, n, s.tile, first, size, s.scores, ld);
  for (int j = 0; j < n; ++j) {
    Row& row = s.row[s.slot[tile_slot[j]]];
    float* const z = s.scores + j * ld;
    simd::Screen screen = row.screen;
    screen.half += first;
    screen.norm += first;
    if (row.best >= 0) {
      if (row.best >= first && row.best < first + size) z[row.best - first] = -INFINITY;
      const double limit = (row.distance * (1 + 0x1p-30) - row.squares) / 2 + double(screen.slack);
      screen.threshold = static_cast<float>(limit + std::fabs(limit) * 0x1p-23);
    }
    const int64_t found = simd::kernels().screen(size, z, screen, s.survivors);
    float* const lower = lower_ + (begin + s.slot[tile_slot[j]]) * kGroups;
    for (int64_t c = 0; c < found; ++c) {
      z[s.survivors[c]] = -INFINITY;
      s.survivors[c] += static_cast<int32_t>(first);
    }
    if (found > 0) {  // the bound of the other codes
      screen.threshold = -INFINITY;
      simd::kernels().screen(size, z, screen, s.survivors + found);
    }
    lower[g] = lower_distance(2 * double(screen.low) + row.squares);
    if (found == 0) continue;
    int64_t candidates = found;
    if (row.best >= 0) s.survivors[candidates++] = row.best;
    const float* const x = s.residual + tile_slot[j] * level.width;
    std::copy_n(s.survivors, candidates, s.survivors + candidates);
    row.best = closest(level, x, s.survivors + candidates, candidates);
    for (int64_t c = 0; c < candidates; ++c) {
      const int32_t code = s.survivors[c];
      const double d = simd::kernels().square_distance(level.width, x, level.centers + code * level.width);
      if (code == row.best)
        row.distance = d;
      else
        lower[group_of(code)] = std::min(lower[group_of(code)], lower_distance(d));
    }
  }
}

}  // namespace hisac::cpu
