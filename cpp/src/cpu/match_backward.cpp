// SPDX-License-Identifier: Apache-2.0
// The gradients of tree match. The gradients of a node's candidates are added in float64, in the order of the
// candidates, and then shared out among the node's sums, level by level. Users whose sums overlap are processed one
// after another (Waves).
#include <algorithm>
#include <cmath>

#include "base/checks.h"
#include "base/parallel.h"
#include "base/schedule.h"
#include "cpu/match.h"
#include "cpu/row_gradient.h"
#include "cpu/rows.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

/// a . b, in eight sums that do not wait for one another.
double dot(const double* a, const float* b, int64_t width) noexcept {
  double sum[8] = {};
  int64_t c = 0;
  for (; c + 8 <= width; c += 8)
    for (int i = 0; i < 8; ++i) sum[i] += a[c + i] * double(b[c + i]);
  for (; c < width; ++c) sum[0] += a[c] * double(b[c]);
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

struct Worker {
  MatchUser user;
  float *row = nullptr, *d_v = nullptr;      // [V] each
  double* sum = nullptr;                     // [V] the gradients of a node's v
  double *weight = nullptr, *dot = nullptr;  // [longest] of a node's sums
};

class Backward {
 public:
  Backward(const Context& context, const Codebook& book, const MatchInputs& in, const MatchForward* forward,
           const MatchGradients* out) noexcept
      : context_(context),
        book_(book),
        in_(in),
        forward_(forward),
        out_(out),
        levels_(book.levels()),
        width_(in.sums.v.width) {}

  void carve(Arena& arena) noexcept {
    waves_.carve(arena, in_.sums.offsets.users);
    int64_t* const node = arena.take<int64_t>(in_.size(), levels_);
    int64_t* const next = arena.take<int64_t>(in_.size(), levels_);
    worker_ = arena.take_each<Worker>(workers_of(context_), [&](Worker& one) {
      one.user.carve(arena, book_, in_, node, next);
      arena.take_into(width_, one.row, one.d_v, one.sum);
      arena.take_into(in_.sums.longest, one.weight, one.dot);
    });
  }

  void run() noexcept {
    fill(context_, out_->v.data, out_->v ? in_.sums.v.rows * width_ : 0);
    fill(context_, out_->bias.data, out_->bias ? in_.sums.v.rows : 0);
    waves_.plan(in_.sums.offsets);
    for (int64_t wave = 0; wave < waves_.count(); ++wave)
      parallel_for(context_, waves_.size(wave), [&](int64_t begin, int64_t end, int w) {
        for (int64_t i = begin; i < end; ++i) user(waves_.users(wave)[i], worker_[w]);
      });
  }

 private:
  void user(int64_t b, Worker& w) noexcept {
    if (in_.candidates.start(b) == in_.candidates.end(b)) return;
    w.user.load(in_, b);
    for (int64_t l = 0; l < levels_; ++l)
      for (int64_t n = in_.candidates.start(b); n < in_.candidates.end(b); ++n)
        if (const int64_t first = w.user.first(n, l); first >= 0 && w.user.owner(first, l) == n) node(n, l, first, w);
  }

  /// Shares out the gradients of the node of candidate n, its first one.
  void node(int64_t n, int64_t level, int64_t first, Worker& w) noexcept {
    const MatchUser& u = w.user;
    const int64_t size = u.last(first, level) - first;
    const float* const bias = u.bias(first);
    const float largest = k_.largest(size, bias);
    if (largest == -INFINITY) return;
    const double d_lse = add_candidates(n, level, w);
    double total = 0, mean = 0;
    for (int64_t s = 0; s < size; ++s) total += w.weight[s] = double(std::exp(bias[s] - largest));
    const bool moves_bias = out_->bias && forward_->d_v.data;
    for (int64_t s = 0; s < size; ++s) {
      w.weight[s] /= total;
      w.dot[s] = 0;
      if (!moves_bias || bias[s] == -INFINITY) continue;
      load_row(in_.sums.v, u.start() + first + s, w.row);
      w.dot[s] = dot(w.sum, w.row, width_);
      mean += w.weight[s] * w.dot[s];
    }
    for (int64_t s = 0; s < size; ++s) {
      if (bias[s] == -INFINITY) continue;
      const int64_t row = u.start() + first + s;
      if (out_->v && forward_->d_v.data)
        k_.add_row(width_, w.d_v, static_cast<float>(w.weight[s]), out_->v.data + row * width_);
      if (out_->bias) out_->bias.data[row] += static_cast<float>(w.weight[s] * (d_lse + w.dot[s] - mean));
    }
  }

  /// The gradients of v, into sum and d_v, and of lse of all candidates from n on that share its node.
  double add_candidates(int64_t n, int64_t level, Worker& w) const noexcept {
    double d_lse = 0;
    std::fill_n(w.sum, width_, 0.0);
    for (; n >= 0; n = w.user.next(n, level)) {
      const int64_t row = n * levels_ + level;
      if (forward_->d_lse) d_lse += double(forward_->d_lse.data[row]);
      if (!forward_->d_v.data) continue;
      load_row(forward_->d_v, row, w.row);
      for (int64_t c = 0; c < width_; ++c) w.sum[c] += double(w.row[c]);
    }
    for (int64_t c = 0; c < width_; ++c) w.d_v[c] = static_cast<float>(w.sum[c]);
    return d_lse;
  }

  const Context& context_;
  const Codebook& book_;
  const MatchInputs& in_;
  const MatchForward* forward_;
  const MatchGradients* out_;
  const simd::Kernels& k_ = simd::kernels();
  int64_t levels_, width_;
  Waves waves_;
  Worker* worker_ = nullptr;
};

}  // namespace

size_t match_backward_workspace(const Context& context, const Codebook& book, const MatchInputs& inputs) noexcept {
  return workspace_of(Backward(context, book, inputs, nullptr, nullptr));
}

Status match_backward(const Context& context, const Codebook& book, const MatchInputs& inputs,
                      const MatchForward& forward, const MatchGradients& out) noexcept {
  return run_call("match_backward", context, Backward(context, book, inputs, &forward, &out));
}

}  // namespace hisac::cpu
