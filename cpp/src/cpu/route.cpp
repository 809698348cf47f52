// SPDX-License-Identifier: Apache-2.0
// Forward of route, which reads x and v once. A block of 64 rows meets a panel of at most 48 agents at a time: products
// with the packed prototypes, one step of the online softmax over rows, and weights times v, all in the L1 cache. In
// agents mode the logits of all panels are computed first, and each row's log-sum-exp over agents is subtracted from
// them. From there on both modes are one softmax over rows, so agents far from every row keep exact tokens too.
//
// Of a user that is routed sparsely, a group with a panel of its own, and the masked rows of a tile, are summed up in a
// state as that of a dense tile. These are added to the state of the tile, which has the numerators of an agent in one
// row.
#include <cmath>

#include "base/checks.h"
#include "cpu/route_call.h"
#include "cpu/simd/pack.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

/// The online softmax of a range of rows over the m agents of a panel (simd::RouteWeights).
struct State {
  float* max_logit = nullptr;    // [pad(m)] base 2
  float* denominator = nullptr;  // [pad(m)]
  float* numerator = nullptr;    // [pad(columns), pad(m)]: agents side by side. In a sparse tile [m, pad(columns)]
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
  bool sparse = false;
  Groups groups;
  AgentPanel list;      // the agents of one group
  State sum;            // of one group, or of the masked rows of a tile
  bool masked = false;  // sum has masked rows, not yet added
};

class Router : RouteCall {
 public:
  Router(const Context& context, const Codebook* book, const RouteParams& params, const Histories& in,
         const RouteAgents& to, const Tokens& out) noexcept
      : RouteCall(context, book, params, in, to, out.tokens.data, static_cast<bool>(out.mean_x), true), out_(out) {}

  void carve(Arena& arena) noexcept {
    units_.carve(arena, in_.offsets.users);
    carve_order(arena);
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
      if (!params_.sparse) return;
      one.groups.carve(arena, agents_, width_);
      one.list.carve(arena, agents_, width_, operands_, operands_ == Operands::bf16);
      carve_state(arena, one.sum);
    });
  }

  /// Reads every history once.
  void run() noexcept {
    for (int w = 0; w < workers_; ++w) worker_[w].block.clear_padding(width_, columns_);
    sort_rows();
    run_units(*this, nullptr, in_.offsets.users, slots_, worker_);
  }

 private:
  friend RouteCall;

  State* carve_states(Arena& arena, int64_t n) noexcept {
    return arena.take_each<State>(n, [&](State& s) { carve_state(arena, s); });
  }
  void carve_state(Arena& arena, State& s) noexcept {
    arena.take_into(simd::pad(agents_), s.max_logit, s.denominator);
    s.numerator = arena.take<float>(ldv_ * simd::pad(agents_));
  }

  void begin(const Unit& unit, Worker& w) const noexcept {
    w.user = unit.user;
    load_user(unit.user, w);
  }

  void block(Worker& w, State& state) const noexcept { add_block(w, w.panel, state); }

  /// Routes the block's rows to the agents of a panel, as far as they are not masked.
  void add_block(Worker& w, const AgentPanel& panel, State& state, bool masked = false) const noexcept {
    const int n = w.block.n, pairs = (n + 1) / 2;
    const int64_t m = panel.m, ld = simd::pad(m);
    if (n == 0 || m == 0) return;
    if (w.block.last) prefetch_next_user(w);
    w.block.prefetcher.distribute(n, m);
    const bool softmax_over_agents = params_.normalize == Normalize::agents;
    if (softmax_over_agents) {
      products(w, panel, masked, 0, m, ld);
      k_.distance_logits(n, m, w.z, ld, w.block.norm, panel.norm, panel.rate);
      k_.row_lse(n, m, w.z, ld, w.lse);
    }
    for (int i = 0; i < n; ++i)
      w.shift[i] = row_shift_of(w.block.bias[i], softmax_over_agents && w.lse[i] > -INFINITY ? w.lse[i] : 0.f);
    if (operands_ != Operands::float32) round_values(w);
    for (int64_t first = 0, width; first < m; first += width) {
      width = simd::panel_width(m, first);
      if (!softmax_over_agents) products(w, panel, masked, first, width, width);
      const float* const z = softmax_over_agents ? w.z + first : w.z;
      const int64_t ldz = softmax_over_agents ? ld : width;
      const simd::RouteWeights p{softmax_over_agents ? nullptr : w.block.norm,
                                 w.shift,
                                 panel.norm + first,
                                 panel.rate + first,
                                 state.max_logit + first,
                                 state.denominator + first,
                                 w.factor};
      float* const sum = state.numerator + first;
      const bool changed = operands_ == Operands::float32
                               ? k_.route_weights(n, width, z, ldz, p, w.e, width)
                               : k_.route_weights_bf16(n, width, z, ldz, p, w.e_bf16.hi, w.e_bf16.lo, width);
      if (changed) scale_rows(sum, ld, width, w.factor);
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
  void products(Worker& w, const AgentPanel& p, bool masked, int64_t first, int64_t m, int64_t ldz) const noexcept {
    const int64_t k2 = simd::pairs_of(width_), ld2 = simd::pad(k2);
    const Block& b = w.block;
    switch (operands_) {
      case Operands::float32:
        k_.matmul(b.n, width_, m, b.x, simd::pad(width_), p.packed + width_ * first, w.z, ldz, &w.block.prefetcher);
        break;
      case Operands::bf16:
        k_.matmul_bf16(b.n, k2, m, b.x_bf16.hi, ld2, p.packed_bf16.hi + k2 * first, w.z, ldz, &w.block.prefetcher);
        break;
      case Operands::bf16x3:
        k_.matmul_bf16x3(b.n, k2, m, b.x_bf16.hi, b.x_bf16.lo, ld2, p.packed_bf16.hi + k2 * first,
                         p.packed_bf16.lo + k2 * first, w.z, ldz, &w.block.prefetcher);
    }
    if (masked) w.groups.hide(b, first, std::min(m, p.m - first), w.z, ldz);
  }

  void scale_rows(float* sum, int64_t ld, int64_t agents, const float* factor) const noexcept {
    for (int64_t d = 0; d < columns_; ++d, sum += ld)
      for (int64_t a = 0; a < agents; ++a) sum[a] *= factor[a];
  }

  void reset(State& s, const Worker& w) const noexcept {
    if (w.sparse)
      std::fill_n(s.max_logit, w.panel.m, -INFINITY);
    else
      clear(s, w.panel.m);
  }
  void clear(State& s, int64_t m) const noexcept {
    std::fill_n(s.max_logit, simd::pad(m), -INFINITY);
    std::fill_n(s.denominator, simd::pad(m), 0.f);
    std::fill_n(s.numerator, ldv_ * simd::pad(m), 0.f);
  }

  void tile(const int64_t* rows, int64_t n, Worker& w, State& state) const noexcept {
    w.groups.visit(
        loader_, rows, n,
        [&](const int64_t* own, int64_t size, int64_t next, const int32_t* columns, int64_t m) {
          add_masked(w, state);
          w.list.select(w.panel, columns, m, width_);
          clear(w.sum, m);
          each_block(own, size, next, w, [&] { add_block(w, w.list, w.sum); });
          add_sum(w, m, columns, state);
        },
        [&](const int64_t* masked, int64_t size) {
          if (!w.masked) clear(w.sum, w.panel.m);
          w.masked = true;
          each_block(masked, size, 0, w, [&] { add_block(w, w.panel, w.sum, true); });
        });
    add_masked(w, state);
  }

  void add_masked(Worker& w, State& state) const noexcept {
    if (w.masked) add_sum(w, w.panel.m, nullptr, state);
    w.masked = false;
  }

  /// Adds the sums over m agents to the state of a tile. columns: where they are in the tile's; null: j.
  void add_sum(Worker& w, int64_t m, const int32_t* columns, State& state) const noexcept {
    for (int64_t j = 0; j < m; ++j) {
      if (j % simd::kLanes == 0) k_.transpose(ldv_, w.sum.numerator + j, simd::pad(m), w.rows, ldv_);
      add_row(w.sum, j, w.rows + j % simd::kLanes * ldv_, columns ? columns[j] : j, state);
    }
  }

  /// Adds agent j of `from`, whose numerators are in `row`, to agent `to` of the state of a tile.
  void add_row(const State& from, int64_t j, const float* row, int64_t to, State& state) const noexcept {
    const float theirs = from.max_logit[j], own = state.max_logit[to];
    float* const sum = state.numerator + to * ldv_;
    if (theirs == -INFINITY) return;
    if (own == -INFINITY) {
      std::copy_n(row, ldv_, sum);
      state.denominator[to] = from.denominator[j];
      state.max_logit[to] = theirs;
      return;
    }
    const float factor = std::exp2(-std::fabs(own - theirs));
    const float f = own < theirs ? factor : 1, g = own < theirs ? 1 : factor;
    k_.blend_row(ldv_, f, row, g, sum);
    state.denominator[to] = state.denominator[to] * f + from.denominator[j] * g;
    state.max_logit[to] = std::max(own, theirs);
  }

  /// Adds a later state. Its denominator and max_logit then hold the factors of the numerators of both.
  void merge(State& state, State& later, const Worker& w) const noexcept {
    const int64_t m = w.panel.m, ld = simd::pad(m);
    for (int64_t j = 0; w.sparse && j < m; ++j) add_row(later, j, later.numerator + j * ldv_, j, state);
    if (w.sparse) return;
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
      const float* const row = w.sparse ? s.numerator + j * ldv_ : w.rows + j % simd::kLanes * ldv_;
      if (!w.sparse && j % simd::kLanes == 0) k_.transpose(ldv_, s.numerator + j, simd::pad(panel.m), w.rows, ldv_);
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
