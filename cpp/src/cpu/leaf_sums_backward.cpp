// SPDX-License-Identifier: Apache-2.0
// What the gradients of leaf sums give to behaviours. Each behaviour finds the sum of its leaf by a binary search,
// since a user's sums are sorted by leaf. Histories that overlap are processed one after another (Waves).
#include <cmath>

#include "base/checks.h"
#include "base/parallel.h"
#include "codebook/checks.h"
#include "cpu/histories.h"
#include "cpu/row_gradient.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

class Backward {
 public:
  Backward(const Context& context, const Codebook& book, const Histories& in, const LeafSumsForward* forward,
           const LeafSumsGradients& out) noexcept
      : context_(context), book_(book), in_(in), forward_(forward), out_(out) {}

  void carve(Arena& arena) noexcept {
    waves_.carve(arena, in_.offsets.users);
    units_.carve(arena, in_.offsets.users);
    v_gradient_.carve(arena);
    x_ = arena.take<float>(workers_of(context_), width_);
    v_ = arena.take<float>(workers_of(context_), value_width_);
  }

  void run() noexcept {
    waves_.plan(in_.offsets);
    v_gradient_.clear(context_, waves_);
    fill(context_, out_.bias.data, in_.behaviours());
    for (int64_t wave = 0; wave < waves_.count(); ++wave) {
      units_.plan(in_.offsets, waves_.users(wave), waves_.size(wave), workers_of(context_));
      units_.run(context_, [&](const Unit& unit, int w) {
        const auto [first, last] = unit.rows(in_.offsets);
        v_gradient_.note(first, last, waves_.gap(unit.user));
        for (int64_t i = first; i < last; ++i) give(unit.user, i, x_ + w * width_, v_ + w * value_width_);
      });
    }
    v_gradient_.finish(context_, waves_);
  }

 private:
  /// The row of the sum of a leaf; -1 where the user has none.
  int64_t find(int64_t user, uint64_t leaf) const noexcept {
    const Histories& sums = forward_->sums;
    const auto leaf_of = [&](int64_t s) { return book_.leaf(sums.codes.data + s * sums.codes.shape[1]); };
    int64_t first = sums.offsets.start(user), last = sums.offsets.end(user);
    while (last - first > 1) {
      const int64_t middle = first + (last - first) / 2;
      (leaf_of(middle) <= leaf ? first : last) = middle;
    }
    return first < last && leaf_of(first) == leaf ? first : -1;
  }

  /// Adds what behaviour i of a user gets. x [D], v [V]: scratch.
  void give(int64_t user, int64_t i, float* x, float* v) const noexcept {
    const LeafSumsForward& f = *forward_;
    float norm;
    if (!loader_.load_x(i, x, &norm)) return;
    const int64_t s = find(user, book_.leaf(loader_.codes_of(i)));
    if (s < 0) return;
    const float share = std::exp(loader_.bias_of(i) - f.sums.bias.data[s]);
    const float* const dv = f.d_v ? f.d_v.data + s * value_width_ : nullptr;
    if (v_gradient_ && dv) k_.add_row(value_width_, dv, share, v_gradient_.row(i, waves_.gap(user)));
    if (!out_.bias) return;
    double sum = f.d_bias ? double(f.d_bias.data[s]) : 0, squares = 0;
    const auto difference = [](const float* a, const float* b, int64_t d) { return double(a[d]) - double(b[d]); };
    if (dv) {
      const float* const mean = static_cast<const float*>(f.sums.v.data) + s * value_width_;
      loader_.v_source.load(i, v);
      for (int64_t c = 0; c < value_width_; ++c) sum += double(dv[c]) * difference(v, mean, c);
    }
    const float* const mean = static_cast<const float*>(f.sums.x.data) + s * width_;
    if (f.d_x)
      for (int64_t d = 0; d < width_; ++d) sum += double(f.d_x.data[s * width_ + d]) * difference(x, mean, d);
    if (f.d_spread) {
      for (int64_t d = 0; d < width_; ++d) squares += difference(x, mean, d) * difference(x, mean, d);
      sum += double(f.d_spread.data[s]) * (double(loader_.spread_of(i)) + squares - double(f.sums.spread.data[s]));
    }
    out_.bias.data[i] += static_cast<float>(double(share) * sum);
  }

  const Context& context_;
  const Codebook& book_;
  const Histories& in_;
  const LeafSumsForward* forward_;
  const LeafSumsGradients& out_;
  const simd::Kernels& k_ = simd::kernels();
  const int64_t width_ = width_of(&book_, in_), value_width_ = in_.v.width;
  const RowLoader loader_{&book_, in_, width_};
  RowGradient v_gradient_ = gradient_of_v(in_, out_.v_rows, out_.v);
  Waves waves_;
  Units units_;
  float *x_ = nullptr, *v_ = nullptr;  // [workers, D], [workers, V]
};

}  // namespace

size_t leaf_sums_backward_workspace(const Context& context, const Codebook& book, const Histories& histories,
                                    const LeafSumsGradients& out) noexcept {
  return workspace_of(Backward(context, book, histories, nullptr, out));
}

Status leaf_sums_backward(const Context& context, const Codebook& book, const Histories& histories,
                          const LeafSumsForward& forward, const LeafSumsGradients& out) noexcept {
  return run_call("leaf_sums_backward", context, Backward(context, book, histories, &forward, out));
}

}  // namespace hisac::cpu
