// SPDX-License-Identifier: Apache-2.0
// Backward of route. It recomputes a block's weights from the log-sum-exp that the forward returned, so nothing of size
// T x M is kept. Gradients of rows (v, x, bias) are local to a block. Gradients of agents (prototypes, temperature) are
// sums over rows, in the tiles and the reduction tree of the forward. Histories that overlap are processed one after
// another (Waves), so there are no atomics and the bits are the same every time. Gradients of tables are summed from
// those of their rows at the end (RowGradient).
#include <cfloat>
#include <cmath>

#include "base/checks.h"
#include "cpu/route_call.h"
#include "cpu/row_gradient.h"
#include "cpu/simd/pack.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

/// Sums over a range of rows, by agent of a panel: [pad(M)] of dlogit times logit, [pad(M)] of gradients of distances
/// and, where prototypes have a gradient, [pad(M), pad(D)] of gradients of distances times x.
using Sums = float*;

/// The agents of a panel, and what rows need of them.
struct Side {
  AgentPanel panel;
  float *lse = nullptr, *offset = nullptr, *rate = nullptr;  // [pad(M)]
  float* d_tokens = nullptr;                                 // [M, columns]
  float* packed_d_tokens = nullptr;                          // [columns, M]
  float* packed_rows = nullptr;                              // [M, V], for dv
  float* packed_prototypes = nullptr;                        // [M, D], for dx
};

struct Worker : Side {  // of all present agents
  int64_t gap = 0;      // of the user (Waves)
  Block block;
  float *z = nullptr, *g = nullptr, *row_lse = nullptr, *shift = nullptr, *d_bias = nullptr, *row_sum = nullptr;
  float* token = nullptr;  // [columns] of the values
  float* out = nullptr;    // [kBlock, pad(max(V, D))]
  Sums* stack = nullptr;
  bool sparse = false;
  Groups groups;
  Side list;           // the agents of one group
  Sums sum = nullptr;  // of one group
};

class Backward : RouteCall {
 public:
  Backward(const Context& context, const Codebook* book, const RouteParams& params, const Histories& in,
           const RouteAgents& to, const RouteForward& forward, const RouteGradients& out) noexcept
      : RouteCall(context, book, params, in, to, forward.d_tokens.data, static_cast<bool>(forward.d_mean_x), false),
        forward_(forward),
        out_(out) {}

  void carve(Arena& arena) noexcept {
    waves_.carve(arena, in_.offsets.users);
    units_.carve(arena, in_.offsets.users);
    carve_order(arena);
    x_.carve(arena);
    v_.carve(arena);
    user_temperature_ = arena.take<float>(out_.temperature ? in_.offsets.users : 0, agents_);
    slots_ = carve_sums(arena, Units::most_slots(workers_));
    const int64_t columns = simd::pad(agents_), block = simd::kBlock;
    worker_ = arena.take_each<Worker>(workers_, [&](Worker& one) {
      carve_side(arena, one);
      one.block.carve(arena, width_, columns_, operands_);
      arena.take_into(block * columns, one.z, one.g);
      arena.take_into(block, one.row_lse, one.shift, one.d_bias, one.row_sum);
      one.token = arena.take<float>(columns_);
      one.out = arena.take<float>(block * simd::pad(std::max(width_, value_width_)));
      one.stack = carve_sums(arena, fold_depth(tiles_of(in_.longest)));
      if (!params_.sparse) return;
      one.groups.carve(arena, agents_, width_);
      carve_side(arena, one.list);
      one.sum = arena.take<float>(sum_floats());
    });
  }

  void run() noexcept {
    const int64_t users = in_.offsets.users;
    for (int w = 0; w < workers_; ++w) worker_[w].block.clear_padding(width_, columns_);
    sort_rows();
    waves_.plan(in_.offsets);
    x_.clear(context_, waves_);
    v_.clear(context_, waves_);
    if (!v_) fill(context_, out_.v.data, out_.v.shape[0] * out_.v.shape[1]);
    fill(context_, out_.bias.data, in_.behaviours());
    fill(context_, out_.spread.data, in_.behaviours());
    fill(context_, out_.prototypes.data, users * agents_ * width_);
    if (out_.temperature) std::fill_n(user_temperature_, users * agents_, 0.f);
    for (int64_t wave = 0; wave < waves_.count(); ++wave)
      run_units(*this, waves_.users(wave), waves_.size(wave), slots_, worker_);
    x_.finish(context_, waves_);
    v_.finish(context_, waves_);
    if (out_.temperature) reduce_temperature();
  }

 private:
  friend RouteCall;

  void carve_side(Arena& arena, Side& side) noexcept {
    side.panel.carve(arena, agents_, width_, Operands::float32, operands_ == Operands::bf16);
    arena.take_into(simd::pad(agents_), side.lse, side.offset, side.rate);
    side.d_tokens = arena.take<float>(agents_ * columns_);
    side.packed_d_tokens = arena.take<float>(simd::packed_size(columns_, agents_));
    side.packed_rows = arena.take<float>(v_ ? simd::packed_size(agents_, value_width_) : 0);
    side.packed_prototypes = arena.take<float>(out_.x ? simd::packed_size(agents_, width_) : 0);
  }

  Sums* carve_sums(Arena& arena, int64_t n) noexcept {
    return arena.take_each<Sums>(n, [&](Sums& sums) { sums = arena.take<float>(sum_floats()); });
  }

  /// to [columns] = row `row` of v's part and of x's, as far as they have gradients.
  void load_values(const Rows& v, const Array<const float, 3>& x, int64_t row, float* to) const noexcept {
    if (value_width_) load_row(v, row, to);
    if (columns_ > value_width_) std::copy_n(x.data + row * width_, width_, to + value_width_);
  }

  /// Loads and packs what the user's rows need of its agents.
  void load_agents(int64_t b, Worker& w) const noexcept {
    load_user(b, w);
    const AgentPanel& p = w.panel;
    std::fill_n(w.lse, p.m, INFINITY);
    std::fill_n(w.offset, p.m, 0.f);
    std::fill_n(w.rate, p.m, 0.f);
    for (int64_t j = 0; j < p.m; ++j) {
      const int64_t a = p.index[j], row = b * agents_ + a;
      float* const d = w.d_tokens + j * columns_;
      const float lse = forward_.lse.data[row];
      load_values(forward_.d_tokens, forward_.d_mean_x, row, d);
      load_values(forward_.tokens, forward_.mean_x, row, w.token);
      if (!(std::fabs(lse) < INFINITY)) continue;
      double dot = 0;
      for (int64_t c = 0; c < columns_; ++c) dot += double(d[c]) * w.token[c];
      w.lse[j] = simd::base2(lse);
      w.offset[j] = static_cast<float>((forward_.d_lse ? double(forward_.d_lse.data[row]) : 0.0) - dot);
      w.rate[j] = std::min(2 / temperature_of(params_, a), FLT_MAX);
    }
    pack(w);
  }

  /// Takes m of the user's agents.
  void select(const Side& all, const int32_t* columns, int64_t m, Side& side) const noexcept {
    side.panel.select(all.panel, columns, m, width_);
    for (int64_t j = 0; j < m; ++j) {
      const int32_t from = columns[j];
      std::copy_n(all.d_tokens + from * columns_, columns_, side.d_tokens + j * columns_);
      side.lse[j] = all.lse[from];
      side.offset[j] = all.offset[from];
      side.rate[j] = all.rate[from];
    }
    pack(side);
  }

  void pack(Side& side) const noexcept {
    const int64_t m = side.panel.m;
    std::fill(side.lse + m, side.lse + simd::pad(m), INFINITY);
    std::fill(side.offset + m, side.offset + simd::pad(m), 0.f);
    std::fill(side.rate + m, side.rate + simd::pad(m), 0.f);
    k_.pack_columns(columns_, m, side.d_tokens, columns_, side.packed_d_tokens);
    if (v_) k_.pack_rows(m, value_width_, side.d_tokens, columns_, side.packed_rows);
    if (x_) k_.pack_rows(m, width_, side.panel.rows, width_, side.packed_prototypes);
  }

  void begin(const Unit& unit, Worker& w) noexcept {
    const auto [first, last] = unit.rows(in_.offsets);
    w.gap = waves_.gap(unit.user);
    x_.note(first, last, w.gap);
    v_.note(first, last, w.gap);
    load_agents(unit.user, w);
  }

  void reset(Sums sums, const Worker&) const noexcept { std::fill_n(sums, sum_floats(), 0.f); }
  void merge(Sums sums, Sums later, const Worker&) const noexcept { k_.add_row(sum_floats(), later, 1.f, sums); }
  void block(Worker& w, Sums sums) noexcept { add_block(w, w, sums); }

  void tile(const int64_t* rows, int64_t n, Worker& w, Sums sums) noexcept {
    w.groups.visit(
        loader_, rows, n,
        [&](const int64_t* own, int64_t size, int64_t next, const int32_t* columns, int64_t m) {
          select(w, columns, m, w.list);
          std::fill_n(w.sum, simd::pad(m), 0.f);
          std::fill_n(d_distance_of(w.sum), simd::pad(m), 0.f);
          if (out_.prototypes) std::fill_n(d_distance_x_of(w.sum), simd::pad(m) * simd::pad(width_), 0.f);
          each_block(own, size, next, w, [&] { add_block(w, w.list, w.sum); });
          for (int64_t j = 0; j < m; ++j) {
            const int64_t to = columns[j], row = simd::pad(width_);
            sums[to] += w.sum[j];
            d_distance_of(sums)[to] += d_distance_of(w.sum)[j];
            if (out_.prototypes)
              k_.add_row(width_, d_distance_x_of(w.sum) + j * row, 1.f, d_distance_x_of(sums) + to * row);
          }
        },
        [&](const int64_t* masked, int64_t size) {
          each_block(masked, size, 0, w, [&] { add_block(w, w, sums, true); });
        });
  }

  /// Adds what the block's rows and a side's agents are to one another, as far as the rows are not masked.
  void add_block(Worker& w, const Side& side, Sums sums, bool masked = false) noexcept {
    const int n = w.block.n;
    const int64_t gap = w.gap;
    const int64_t m = side.panel.m, ldz = simd::pad(m), ldx = simd::pad(width_), ldv = simd::pad(columns_);
    if (n == 0 || m == 0) return;
    simd::Prefetcher& prefetcher = w.block.prefetcher;
    if (v_ && !w.sparse)
      prefetcher.add(v_.row(w.block.row[0], gap), 0, (w.block.row[n - 1] + 1 - w.block.row[0]) * value_width_ * 4);
    for (int i = 0; v_ && w.sparse && i < n; ++i) prefetcher.add(v_.row(w.block.row[i], gap), 0, value_width_ * 4);
    prefetcher.distribute(n, 2 * m);
    k_.matmul(n, width_, m, w.block.x, ldx, side.panel.packed, w.z, ldz, &prefetcher);
    if (masked) w.groups.hide(w.block, 0, m, w.z, ldz);
    k_.distance_logits(n, m, w.z, ldz, w.block.norm, side.panel.norm, side.panel.rate);
    const bool softmax_over_agents = params_.normalize == Normalize::agents;
    if (softmax_over_agents) k_.row_lse(n, m, w.z, ldz, w.row_lse);
    for (int i = 0; i < n; ++i) {
      if (softmax_over_agents && w.row_lse[i] == -INFINITY) w.row_lse[i] = 0;
      w.shift[i] = row_shift_of(w.block.bias[i], softmax_over_agents ? w.row_lse[i] : 0.f);
    }
    k_.matmul(n, columns_, m, w.block.values, ldv, side.packed_d_tokens, w.g, ldz, &prefetcher);
    k_.route_gradient(n, m, w.z, w.g, ldz,
                      {w.shift, softmax_over_agents ? w.row_lse : nullptr, side.lse, side.offset, side.rate, w.d_bias,
                       w.row_sum, sums, d_distance_of(sums)});
    if (v_) {
      const int64_t ldo = simd::pad(value_width_);
      k_.matmul(n, m, value_width_, w.z, ldz, side.packed_rows, w.out, ldo, nullptr);
      for (int i = 0; i < n; ++i) k_.add_row(value_width_, w.out + i * ldo, 1.f, v_.row(w.block.row[i], gap));
    }
    if (out_.bias)
      for (int i = 0; i < n; ++i) out_.bias.data[w.block.row[i]] += w.d_bias[i];
    if (out_.spread)
      for (int i = 0; i < n; ++i) out_.spread.data[w.block.row[i]] -= w.row_sum[i] / 2;
    if (x_) {
      k_.matmul(n, m, width_, w.g, ldz, side.packed_prototypes, w.out, ldx, nullptr);
      for (int i = 0; i < n; ++i) {
        float* const dx = x_.row(w.block.row[i], gap);
        k_.add_row(width_, w.out + i * ldx, 1.f, dx);
        k_.add_row(width_, w.block.x + i * ldx, -w.row_sum[i], dx);
      }
    }
    if (out_.prototypes) k_.accumulate(n, m, width_, w.g, ldz, w.block.x, ldx, d_distance_x_of(sums), ldx);
  }

  float* d_distance_of(Sums sums) const noexcept { return sums + simd::pad(agents_); }
  float* d_distance_x_of(Sums sums) const noexcept { return sums + 2 * simd::pad(agents_); }
  int64_t sum_floats() const noexcept { return simd::pad(agents_) * (out_.prototypes ? 2 + simd::pad(width_) : 2); }

  /// Writes the gradients of the agents of user b.
  void finish(int64_t b, Sums sums, const Worker& w) const noexcept {
    if (!out_.temperature && !out_.prototypes) return;
    const AgentPanel& panel = w.panel;
    const float *const d_distance = d_distance_of(sums), *const d_distance_x = d_distance_x_of(sums);
    for (int64_t j = 0; j < panel.m; ++j) {
      const int64_t a = panel.index[j];
      if (out_.temperature) user_temperature_[b * agents_ + a] = -simd::kLn2 * sums[j] / temperature_of(params_, a);
      if (!out_.prototypes) continue;
      float* const dp = out_.prototypes.data + (b * agents_ + a) * width_;
      k_.add_row(width_, d_distance_x + j * simd::pad(width_), 1.f, dp);
      k_.add_row(width_, panel.rows + j * width_, -d_distance[j], dp);
    }
  }

  void reduce_temperature() noexcept {
    const int64_t entries = out_.temperature.shape[0], per_entry = entries == 1 ? agents_ : 1;
    for (int64_t e = 0; e < entries; ++e) {
      double total = 0;
      for (int64_t b = 0; b < in_.offsets.users; ++b)
        for (int64_t j = 0; j < per_entry; ++j) total += user_temperature_[b * agents_ + e + j];
      out_.temperature.data[e] = static_cast<float>(total);
    }
  }

  const RouteForward& forward_;
  const RouteGradients& out_;
  RowGradient x_ = gradient_of_x(in_, out_.x_rows, out_.x);
  RowGradient v_ = gradient_of_v(in_, out_.v_rows, forward_.d_tokens.data ? out_.v : Array<float, 2>{});
  Waves waves_;
  float* user_temperature_ = nullptr;
  Sums* slots_ = nullptr;
  Worker* worker_ = nullptr;
};

}  // namespace

size_t route_backward_workspace(const Context& context, const Codebook* book, const RouteParams& params,
                                const Histories& histories, const RouteAgents& agents, const RouteForward& forward,
                                const RouteGradients& out) noexcept {
  return workspace_of(Backward(context, book, params, histories, agents, forward, out));
}

Status route_backward(const Context& context, const Codebook* book, const RouteParams& params,
                      const Histories& histories, const RouteAgents& agents, const RouteForward& forward,
                      const RouteGradients& out) noexcept {
  return run_call("route_backward", context, Backward(context, book, params, histories, agents, forward, out));
}

}  // namespace hisac::cpu
