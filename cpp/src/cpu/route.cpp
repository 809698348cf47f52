// SPDX-License-Identifier: Apache-2.0
// Forward of route, which reads x and v once. A block of 64 rows meets a panel of at most 48 agents at a time: products
// with the packed prototypes, one step of the online softmax over rows, and weights times v, all in the L1 cache. In
// agents mode the logits of all panels are computed first, and each row's log-sum-exp over agents is subtracted from
// them. From there on both modes are one softmax over rows, so agents far from every row keep exact tokens too.
#include <cmath>

#include "base/checks.h"
#include "cpu/route_call.h"
#include "cpu/simd/pack.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

/// The online softmax of a range of rows, by present agent (simd::RouteWeights).
struct State {
  float* max_logit = nullptr;    // [pad(M)] base 2
  float* denominator = nullptr;  // [pad(M)]
  float* numerator = nullptr;    // [pad(columns), pad(M)]: agents side by side
};

struct Worker {
  int64_t user = 0;
  AgentPanel panel;
  Block block;
  float* z = nullptr;                      // [kBlock, 48], in agents mode [kBlock, pad(M)]
  float* e = nullptr;                      // [kBlock, 48]
  float *lse = nullptr, *shift = nullptr;  // [kBlock]
  float* factor = nullptr;                 // [48]
  float* rows = nullptr;                   // [kLanes, pad(columns)] numerators of 16 agents
  Bf16Operand values_bf16;                 // [kBlock / 2, pad(columns)] two rows an element
  Bf16Operand e_bf16;                      // [kBlock / 2, kPanel] in place of e
  float* remainders = nullptr;             // [2, pad(columns)]
  State* stack = nullptr;
};

class Router : RouteCall {
 public:
  Router(const Context& context, const Codebook* book, const RouteParams& params, const Histories& in,
         const RouteAgents& to, const Tokens& out) noexcept
      : RouteCall(context, book, params, in, to, out.tokens.data, static_cast<bool>(out.mean_x), true), out_(out) {}

  void carve(Arena& arena) noexcept {
    units_.carve(arena, in_.offsets.users);
    slots_ = carve_states(arena, Units::most_slots(workers_));
    worker_ = arena.take_each<Worker>(workers_, [&](Worker& one) {
      one.panel.carve(arena, agents_, width_, operands_, operands_ == Operands::bf16);
      one.block.carve(arena, width_, columns_, operands_);
      one.z = arena.take<float>(simd::kBlock * std::max(simd::pad(agents_), simd::kPanel));
      one.e = arena.take<float>(simd::kBlock * simd::kPanel);
      arena.take_into(simd::kBlock, one.lse, one.shift);
      one.factor = arena.take<float>(simd::kPanel);
      one.rows = arena.take<float>(simd::kLanes * ldv_);
      one.values_bf16.carve(arena, simd::kBlock / 2 * ldv_, operands_);
      one.e_bf16.carve(arena, simd::kBlock / 2 * simd::kPanel, operands_);
      if (operands_ == Operands::bf16x3) one.remainders = arena.take<float>(2 * ldv_);
      one.stack = carve_states(arena, fold_depth(tiles_of(in_.longest)));
    });
  }

  /// Reads every history once.
  void run() noexcept {
    for (int w = 0; w < workers_; ++w) worker_[w].block.clear_padding(width_, columns_);
    run_units(*this, nullptr, in_.offsets.users, slots_, worker_);
  }

 private:
  friend RouteCall;

  State* carve_states(Arena& arena, int64_t n) noexcept {
    return arena.take_each<State>(n, [&](State& s) {
      arena.take_into(simd::pad(agents_), s.max_logit, s.denominator);
      s.numerator = arena.take<float>(ldv_ * simd::pad(agents_));
    });
  }

  void begin(const Unit& unit, Worker& w) const noexcept {
    w.user = unit.user;
    load_panel(unit.user, w.panel);
  }

  void block(Worker& w, State& state) noexcept {
    const int n = w.block.n, pairs = (n + 1) / 2;
    const int64_t m = w.panel.m, ld = simd::pad(agents_);
    if (n == 0 || m == 0) return;
    if (w.block.last) prefetch_next_user(w);
    w.block.prefetcher.distribute(n, m);
    const bool softmax_over_agents = params_.normalize == Normalize::agents;
    if (softmax_over_agents) {
      products(w, 0, m, ld);
      k_.distance_logits(n, m, w.z, ld, w.block.norm, w.panel.norm, w.panel.rate);
      k_.row_lse(n, m, w.z, ld, w.lse);
    }
    for (int i = 0; i < n; ++i)
      w.shift[i] = row_shift_of(w.block.bias[i], softmax_over_agents && w.lse[i] > -INFINITY ? w.lse[i] : 0.f);
    if (operands_ != Operands::float32) round_values(w);
    for (int64_t first = 0, width; first < m; first += width) {
      width = simd::panel_width(m, first);
      if (!softmax_over_agents) products(w, first, width, width);
      const float* const z = softmax_over_agents ? w.z + first : w.z;
      const int64_t ldz = softmax_over_agents ? ld : width;
      const simd::RouteWeights p{softmax_over_agents ? nullptr : w.block.norm,
                                 w.shift,
                                 w.panel.norm + first,
                                 w.panel.rate + first,
                                 state.max_logit + first,
                                 state.denominator + first,
                                 w.factor};
      float* const sum = state.numerator + first;
      const bool changed = operands_ == Operands::float32
                               ? k_.route_weights(n, width, z, ldz, p, w.e, width)
                               : k_.route_weights_bf16(n, width, z, ldz, p, w.e_bf16.hi, w.e_bf16.lo, width);
      if (changed) scale_rows(sum, width, w.factor);
      switch (operands_) {
        case Operands::float32:
          k_.accumulate(n, columns_, width, w.block.values, ldv_, w.e, width, sum, ld);
          break;
        case Operands::bf16:
          k_.accumulate_bf16(pairs, columns_, width, w.values_bf16.hi, ldv_, w.e_bf16.hi, width, sum, ld);
          break;
        case Operands::bf16x3:
          k_.accumulate_bf16x3(pairs, columns_, width, w.values_bf16.hi, w.values_bf16.lo, ldv_, w.e_bf16.hi,
                               w.e_bf16.lo, width, sum, ld);
      }
    }
  }

  /// After a user's last block: queues its tokens and the next user's prototypes, of present agents alone.
  void prefetch_next_user(Worker& w) const noexcept {
    const int64_t users = in_.offsets.users, next = w.user + 1, p = width_ * int64_t(sizeof(float));
    const int64_t token = value_width_ * bytes_of(in_.v.dtype), first = w.user * agents_ * token;
    w.block.prefetcher.add(out_.tokens.data, first, first + count_of(to_, w.user) * token);
    if (next < users)
      w.block.prefetcher.add(to_.prototypes.data, next * agents_ * p, (next * agents_ + count_of(to_, next)) * p);
  }

  /// Rounds the block's values to bfloat16, two rows an element.
  void round_values(Worker& w) const noexcept {
    for (int i = 0; i < w.block.n; i += 2) {
      const bool unpaired = i + 1 == w.block.n;
      const float *const even = w.block.values + i * ldv_, *const odd = even + ldv_;
      k_.pair_rows_bf16(ldv_, even, unpaired ? nullptr : odd, w.values_bf16.hi + i / 2 * ldv_);
      if (!w.remainders) continue;
      k_.bf16_remainder(ldv_, even, w.remainders);
      if (!unpaired) k_.bf16_remainder(ldv_, odd, w.remainders + ldv_);
      k_.pair_rows_bf16(ldv_, w.remainders, unpaired ? nullptr : w.remainders + ldv_, w.values_bf16.lo + i / 2 * ldv_);
    }
  }

  /// z [n, ldz] = x . p for the agents [first, first + m).
  void products(Worker& w, int64_t first, int64_t m, int64_t ldz) const noexcept {
    const int64_t k2 = simd::pairs_of(width_), ld2 = simd::pad(k2);
    const Block& b = w.block;
    const AgentPanel& p = w.panel;
    switch (operands_) {
      case Operands::float32:
        return k_.matmul(b.n, width_, m, b.x, simd::pad(width_), p.packed + width_ * first, w.z, ldz,
                         &w.block.prefetcher);
      case Operands::bf16:
        return k_.matmul_bf16(b.n, k2, m, b.x_bf16.hi, ld2, p.packed_bf16.hi + k2 * first, w.z, ldz,
                              &w.block.prefetcher);
      case Operands::bf16x3:
        return k_.matmul_bf16x3(b.n, k2, m, b.x_bf16.hi, b.x_bf16.lo, ld2, p.packed_bf16.hi + k2 * first,
                                p.packed_bf16.lo + k2 * first, w.z, ldz, &w.block.prefetcher);
    }
  }

  void scale_rows(float* sum, int64_t agents, const float* factor) const noexcept {
    for (int64_t d = 0; d < columns_; ++d, sum += simd::pad(agents_))
      for (int64_t a = 0; a < agents; ++a) sum[a] *= factor[a];
  }

  void reset(State& s) const noexcept {
    std::fill(s.max_logit, s.max_logit + simd::pad(agents_), -INFINITY);
    std::fill(s.denominator, s.denominator + simd::pad(agents_), 0.f);
    std::fill(s.numerator, s.numerator + ldv_ * simd::pad(agents_), 0.f);
  }

  /// Adds a later state. Its denominator and max_logit then hold the factors of the numerators of both.
  void merge(State& state, State& later, const Worker& w) const noexcept {
    const int64_t m = w.panel.m, ld = simd::pad(agents_);
    for (int64_t a = 0; a < m; ++a) {
      const float max_logit = std::max(state.max_logit[a], later.max_logit[a]);
      const float safe = max_logit == -INFINITY ? 0.f : max_logit;
      const float f = std::exp2(state.max_logit[a] - safe), g = std::exp2(later.max_logit[a] - safe);
      state.denominator[a] = state.denominator[a] * f + later.denominator[a] * g;
      state.max_logit[a] = max_logit;
      later.denominator[a] = f;
      later.max_logit[a] = g;
    }
    const float *const factor = later.denominator, *const later_factor = later.max_logit;
    for (int64_t d = 0; d < columns_; ++d)
      for (int64_t a = 0; a < m; ++a)
        state.numerator[d * ld + a] =
            state.numerator[d * ld + a] * factor[a] + later.numerator[d * ld + a] * later_factor[a];
  }

  /// Writes the tokens of user b.
  void finish(int64_t b, const State& s, const Worker& w) const noexcept {
    const AgentPanel& panel = w.panel;
    const int64_t token = value_width_ * bytes_of(in_.v.dtype);
    std::byte* const tokens = static_cast<std::byte*>(out_.tokens.data) + b * agents_ * token;
    float* const mean_x = out_.mean_x ? out_.mean_x.data + b * agents_ * width_ : nullptr;
    float* const lse = out_.lse.data + b * agents_;
    if (token) std::fill_n(tokens, agents_ * token, std::byte{0});
    if (mean_x) std::fill_n(mean_x, agents_ * width_, 0.f);
    std::fill_n(lse, agents_, -INFINITY);
    for (int64_t j = 0; j < panel.m; ++j) {
      const int64_t a = panel.index[j];
      const float* const row = w.rows + j % simd::kLanes * ldv_;
      if (j % simd::kLanes == 0) k_.transpose(ldv_, s.numerator + j, simd::pad(agents_), w.rows, ldv_);
      if (s.max_logit[j] == -INFINITY) continue;
      const float inverse = 1.f / s.denominator[j];
      if (token) k_.store_row(tokens + a * token, in_.v.dtype, value_width_, row, inverse);
      if (mean_x) k_.store_row(mean_x + a * width_, DType::float32, width_, row + value_width_, inverse);
      lse[a] = static_cast<float>((double(s.max_logit[j]) + std::log2(double(s.denominator[j]))) * 0.69314718055994531);
    }
  }

  const Tokens& out_;
  const int64_t ldv_ = simd::pad(columns_);
  State* slots_ = nullptr;
  Worker* worker_ = nullptr;
};

}  // namespace

size_t route_workspace(const Context& context, const Codebook* book, const RouteParams& params,
                       const Histories& histories, const RouteAgents& agents, const Tokens& out) noexcept {
  return workspace_of(Router(context, book, params, histories, agents, out));
}

Status route(const Context& context, const Codebook* book, const RouteParams& params, const Histories& histories,
             const RouteAgents& agents, Tokens out) noexcept {
  return run_call("route", context, Router(context, book, params, histories, agents, out));
}

}  // namespace hisac::cpu
