// SPDX-License-Identifier: Apache-2.0
// Forward: for blocks of 64 rows and panels of at most 48 agents, products with the packed prototypes, one step of the
// online softmax over rows, and the weights times v, all in the first cache; reads x and v once. In agents mode the
// logits of all panels come first and lose their log-sum-exp over agents; from there on both readings of the paper are
// one softmax over rows, so far agents keep exact tokens too.
#include <cmath>
#include <utility>

#include "base/checks.h"
#include "base/parallel.h"
#include "cpu/histories.h"
#include "cpu/leaf_sums.h"
#include "cpu/simd/pack.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

/// Running sums of a range of rows: per agent (reference, denominator, numerator), and the absent rows' sum.
struct State {
  float* top = nullptr;   // [pad(M)] base 2
  float* mass = nullptr;  // [pad(M)]
  float* sum = nullptr;   // [sums, pad(M)]: agents side by side
  Absent absent;
};

struct Worker {
  int64_t user = 0;
  AgentPanel panel;
  Block block;
  float* z = nullptr;                      // [kBlock, 48], in agents mode [kBlock, pad(M)]
  float* e = nullptr;                      // [kBlock, 48]
  float *lse = nullptr, *shift = nullptr;  // [kBlock]
  float* factor = nullptr;                 // [48]
  float* rows = nullptr;                   // [kLanes, sums]
  Halves values;                           // [kBlock / 2, sums] v or x in pairs of rows
  Halves weights;                          // [kBlock / 2, kPanel] in place of e
  float* rests = nullptr;                  // [2, sums]
  State* stack = nullptr;
};

class Router {
 public:
  Router(const Context& context, const RouteParams& params, const RouteInputs& in, const Tokens* out,
         int64_t longest) noexcept
      : context_(context),
        params_(params),
        in_(in),
        out_(out),
        rows_(in),
        leaves_(in, longest, workers_of(context)),
        operands_(operands_of(params, true)),
        k_(simd::kernels()),
        agents_(in.prototypes.shape[1]),
        width_(in.prototypes.shape[2]),
        value_width_(in.v.width),
        longest_(longest),
        sums_(simd::pad(params.refine ? std::max(width_, value_width_) : value_width_)),
        workers_(workers_of(context)) {}

  void carve(Arena& arena) noexcept {
    units_.carve(arena, in_.histories.users);
    if (leaf()) leaf_input_.carve(arena, leaves_, in_);
    slots_ = carve_states(arena, Units::most_slots(workers_));
    worker_ = arena.take<Worker>(workers_);
    for (int w = 0; w < workers_; ++w) {
      Worker one;
      one.panel.carve(arena, agents_, width_, operands_, operands_ == Operands::rounded);
      one.block.carve(arena, width_, value_width_, operands_);
      one.z = arena.take<float>(simd::kBlock * std::max(simd::pad(agents_), simd::kPanel));
      one.e = arena.take<float>(simd::kBlock * simd::kPanel);
      one.lse = arena.take<float>(simd::kBlock);
      one.shift = arena.take<float>(simd::kBlock);
      one.factor = arena.take<float>(simd::kPanel);
      one.rows = arena.take<float>(simd::kLanes * sums_);
      one.values.carve(arena, simd::kBlock / 2 * sums_, operands_);
      one.weights.carve(arena, simd::kBlock / 2 * simd::kPanel, operands_);
      if (operands_ == Operands::split) one.rests = arena.take<float>(2 * sums_);
      one.stack = carve_states(arena, fold_depth(tiles_of(longest_)));
      if (worker_) worker_[w] = one;
    }
  }

  void run() noexcept {
    for (int w = 0; w < workers_; ++w) worker_[w].block.clear_padding(width_, value_width_);
    prototypes_ = in_.prototypes.data;
    if (params_.refine) {
      std::copy_n(prototypes_, in_.histories.users * agents_ * width_, out_->refined.data);
      prototypes_ = out_->refined.data;
    }
    const int64_t users = in_.histories.users;
    if (!leaf()) return rounds(nullptr, users);
    for (int64_t first = 0, n; first < users; first += n) {
      const int64_t* const list = leaf_input_.users + first;
      n = leaves_.fit(list, users - first);
      leaf_input_.load(context_, leaves_, list, n, &rows_);
      rounds(list, n);
    }
  }

 private:
  State* carve_states(Arena& arena, int64_t n) noexcept {
    State* const states = arena.take<State>(n);
    for (int64_t i = 0; i < n; ++i) {
      State s;
      s.top = arena.take<float>(simd::pad(agents_));
      s.mass = arena.take<float>(simd::pad(agents_));
      s.sum = arena.take<float>(sums_ * simd::pad(agents_));
      if (params_.missing == Missing::token) s.absent.sum = arena.take<float>(simd::pad(value_width_));
      if (states) states[i] = s;
    }
    return states;
  }

  bool leaf() const noexcept { return params_.method == Method::leaf; }

  /// The tokens of the listed users; null: of 0 .. n - 1.
  void rounds(const int64_t* users, int64_t n) noexcept {
    units_.plan(rows_.histories, users, n, workers_);
    for (int round = 0; round <= params_.refine; ++round) pass(round < params_.refine);
    if (!leaf() || params_.missing == Missing::drop) return;
    parallel_for(context_, n, [&](int64_t begin, int64_t end, int w) {
      float* const v = worker_[w].block.v;
      for (int64_t i = begin; i < end; ++i) finish_absent(users[i], leaves_.absent(i, w, v), v, 1.f);
    });
  }

  /// One reading of every history; `refining`: the values are x, and the results new prototypes.
  void pass(bool refining) noexcept {
    units_.run(
        context_, slots_, [&](const Unit& u, int w) { unit(u, refining, worker_[w]); },
        [&](int64_t b, State* states, int64_t shared, int w) {
          load_agents(b, worker_[w]);
          fold_all(shared, states, [&](State& into, State& from) { merge(into, from, worker_[w].panel.m); });
          finish(b, states[0], refining, worker_[w]);
        });
  }

  void load_agents(int64_t b, Worker& w) const noexcept {
    w.user = b;
    w.panel.load(params_, prototypes_ + b * agents_ * width_, agents_, width_, count_of(in_, b));
  }

  void unit(const Unit& unit, bool refining, Worker& w) noexcept {
    load_agents(unit.user, w);
    if (unit.slot >= 0) std::swap(w.stack[0], slots_[unit.slot]);
    fold_rows(
        RowLoader(rows_, operands_), rows_.histories, unit, w.block, w.stack, [&](State& s) { reset(s); },
        [&](State& s) { return leaf() ? nullptr : &s.absent; }, [&](State& s) { block(refining, w, s); },
        [&](State& into, State& from) { merge(into, from, w.panel.m); });
    if (unit.slot >= 0)
      std::swap(w.stack[0], slots_[unit.slot]);
    else
      finish(unit.user, w.stack[0], refining, w);
  }

  void block(bool refining, Worker& w, State& state) noexcept {
    const int n = w.block.n;
    const int64_t m = w.panel.m, ld = simd::pad(agents_);
    if (n == 0 || m == 0) return;
    if (w.block.last) look_ahead(w);
    w.block.ahead.spread(n, m);
    const bool shares = params_.normalize == Normalize::agents;
    if (shares) {
      products(w, 0, m, ld);
      k_.distance_logits(n, m, w.z, ld, w.block.norm, w.panel.norm, w.panel.rate);
      k_.row_lse(n, m, w.z, ld, w.lse);
    }
    for (int i = 0; i < n; ++i)
      w.shift[i] = row_shift_of(w.block.bias[i], shares && w.lse[i] > -INFINITY ? w.lse[i] : 0.f);
    const int64_t value_width = refining ? width_ : value_width_, ldv = simd::pad(value_width);
    const float* const values = refining ? w.block.x : w.block.v;
    if (operands_ != Operands::floats) pair_values(w, values, ldv);
    simd::for_panels(m, [&](int64_t at, int64_t width) {
      if (!shares) products(w, at, width, width);
      const float* const z = shares ? w.z + at : w.z;
      const int64_t ldz = shares ? ld : width;
      const simd::RouteWeights p{shares ? nullptr : w.block.norm,
                                 w.shift,
                                 w.panel.norm + at,
                                 w.panel.rate + at,
                                 state.top + at,
                                 state.mass + at,
                                 w.factor};
      float* const sum = state.sum + at;
      bool changed = false;
      switch (operands_) {
        case Operands::floats:
          changed = k_.route_weights(n, width, z, ldz, p, w.e, width);
          break;
        case Operands::rounded:
          changed = k_.route_weights_pairs(n, width, z, ldz, p, w.weights.hi, width);
          break;
        case Operands::split:
          changed = k_.route_weights_split(n, width, z, ldz, p, w.weights.hi, w.weights.lo, width);
      }
      if (changed) scale(sum, value_width, width, w.factor);
      switch (operands_) {
        case Operands::floats:
          k_.accumulate(n, value_width, width, values, ldv, w.e, width, sum, ld);
          break;
        case Operands::rounded:
          k_.accumulate_pairs(simd::pairs_of(n), value_width, width, w.values.hi, ldv, w.weights.hi, width, sum, ld);
          break;
        case Operands::split:
          k_.accumulate_split(simd::pairs_of(n), value_width, width, w.values.hi, w.values.lo, ldv, w.weights.hi,
                              w.weights.lo, width, sum, ld);
      }
    });
  }

  /// After a user's last block: its tokens, and the next user's prototypes; of present agents, others are not read.
  void look_ahead(Worker& w) const noexcept {
    const int64_t users = in_.histories.users, next = w.user + 1, p = width_ * int64_t(sizeof(float));
    const int64_t token = value_width_ * bytes_of(in_.v.dtype), first = w.user * (out_->tokens.rows / users) * token;
    w.block.ahead.add(out_->tokens.data, first, first + count_of(in_, w.user) * token);
    if (next < users) w.block.ahead.add(prototypes_, next * agents_ * p, (next * agents_ + count_of(in_, next)) * p);
  }

  /// The block's values in pairs of rows.
  void pair_values(Worker& w, const float* values, int64_t ldv) const noexcept {
    for (int i = 0; i < w.block.n; i += 2) {
      const bool alone = i + 1 == w.block.n;
      const float *const even = values + i * ldv, *const odd = even + ldv;
      k_.pair_rows(ldv, even, alone ? nullptr : odd, w.values.hi + i / 2 * ldv);
      if (!w.rests) continue;
      k_.remainder(ldv, even, w.rests);
      if (!alone) k_.remainder(ldv, odd, w.rests + ldv);
      k_.pair_rows(ldv, w.rests, alone ? nullptr : w.rests + ldv, w.values.lo + i / 2 * ldv);
    }
  }

  /// z [n, ldz] = x . p for the agents [at, at + m).
  void products(Worker& w, int64_t at, int64_t m, int64_t ldz) const noexcept {
    const int64_t k2 = simd::pairs_of(width_), ld2 = simd::pad(k2);
    const Block& b = w.block;
    const AgentPanel& p = w.panel;
    switch (operands_) {
      case Operands::floats:
        return k_.matmul(b.n, width_, m, b.x, simd::pad(width_), p.packed + width_ * at, w.z, ldz, &w.block.ahead);
      case Operands::rounded:
        return k_.matmul_pairs(b.n, k2, m, b.pairs.hi, ld2, p.pairs.hi + k2 * at, w.z, ldz, &w.block.ahead);
      case Operands::split:
        return k_.matmul_split(b.n, k2, m, b.pairs.hi, b.pairs.lo, ld2, p.pairs.hi + k2 * at, p.pairs.lo + k2 * at, w.z,
                               ldz, &w.block.ahead);
    }
  }

  void scale(float* sum, int64_t rows, int64_t columns, const float* factor) const noexcept {
    for (int64_t d = 0; d < rows; ++d, sum += simd::pad(agents_))
      for (int64_t a = 0; a < columns; ++a) sum[a] *= factor[a];
  }

  void reset(State& s) const noexcept {
    std::fill(s.top, s.top + simd::pad(agents_), -INFINITY);
    std::fill(s.mass, s.mass + simd::pad(agents_), 0.f);
    std::fill(s.sum, s.sum + sums_ * simd::pad(agents_), 0.f);
    s.absent.count = 0;
    if (s.absent.sum) std::fill(s.absent.sum, s.absent.sum + simd::pad(value_width_), 0.f);
  }

  /// Adds a later state; its references become factors on the way.
  void merge(State& into, State& from, int64_t m) const noexcept {
    const int64_t ld = simd::pad(agents_);
    for (int64_t a = 0; a < m; ++a) {
      const float top = std::max(into.top[a], from.top[a]), safe = top == -INFINITY ? 0.f : top;
      const float f = std::exp2(into.top[a] - safe), g = std::exp2(from.top[a] - safe);
      into.mass[a] = into.mass[a] * f + from.mass[a] * g;
      into.top[a] = top;
      from.mass[a] = f;
      from.top[a] = g;
    }
    for (int64_t d = 0; d < sums_; ++d)
      for (int64_t a = 0; a < m; ++a)
        into.sum[d * ld + a] = into.sum[d * ld + a] * from.mass[a] + from.sum[d * ld + a] * from.top[a];
    into.absent.count += from.absent.count;
    for (int64_t d = 0; into.absent.sum && d < value_width_; ++d) into.absent.sum[d] += from.absent.sum[d];
  }

  void finish(int64_t b, const State& s, bool refining, const Worker& w) const noexcept {
    const AgentPanel& panel = w.panel;
    const int64_t extra = params_.missing == Missing::token, rows = agents_ + extra;
    const int64_t bytes = value_width_ * bytes_of(in_.v.dtype);
    std::byte* const tokens = static_cast<std::byte*>(out_->tokens.data) + b * rows * bytes;
    float* const lse = out_->lse.data + b * rows;
    if (!refining) {
      std::fill_n(tokens, rows * bytes, std::byte{0});
      std::fill(lse, lse + rows, -INFINITY);
    }
    for (int64_t j = 0; j < panel.m; ++j) {
      const int64_t a = panel.index[j];
      const float* const row = w.rows + j % simd::kLanes * sums_;
      if (j % simd::kLanes == 0) k_.transpose(sums_, s.sum + j, simd::pad(agents_), w.rows, sums_);
      if (s.top[j] == -INFINITY) continue;
      const float inverse = 1.f / s.mass[j];
      if (refining) {
        k_.store_row(out_->refined.data + (b * agents_ + a) * width_, DType::float32, width_, row, inverse);
      } else {
        k_.store_row(tokens + a * bytes, in_.v.dtype, value_width_, row, inverse);
        lse[a] = static_cast<float>((double(s.top[j]) + std::log2(double(s.mass[j]))) * 0.69314718055994531);
      }
    }
    if (!refining && extra) finish_absent(b, s.absent.count, s.absent.sum, 1.f / static_cast<float>(s.absent.count));
  }

  /// The token of the absent behaviours: scale times v.
  void finish_absent(int64_t b, int64_t count, const float* v, float scale) const noexcept {
    if (count == 0) return;
    const int64_t row = b * (agents_ + 1) + agents_, bytes = value_width_ * bytes_of(in_.v.dtype);
    k_.store_row(static_cast<std::byte*>(out_->tokens.data) + row * bytes, in_.v.dtype, value_width_, v, scale);
    out_->lse.data[row] = static_cast<float>(std::log(static_cast<double>(count)));
  }

  const Context& context_;
  const RouteParams& params_;
  const RouteInputs& in_;
  const Tokens* out_;
  RouteInputs rows_;  // what is routed: in_, or its leaf sums
  LeafSummer leaves_;
  LeafInput leaf_input_;
  Operands operands_;
  const simd::Kernels& k_;
  int64_t agents_, width_, value_width_, longest_, sums_;
  int workers_;
  const float* prototypes_ = nullptr;
  Units units_;
  State* slots_ = nullptr;
  Worker* worker_ = nullptr;
};

}  // namespace

size_t route_workspace(const Context& context, const RouteParams& params, const RouteInputs& inputs,
                       int64_t longest) noexcept {
  Arena arena;
  Router(context, params, inputs, nullptr, longest).carve(arena);
  return arena.used();
}

Status route(const Context& context, const RouteParams& params, const RouteInputs& inputs, Tokens out) noexcept {
  Router router(context, params, inputs, &out, longest_of(inputs.histories));
  Arena arena(context.workspace);
  router.carve(arena);
  HISAC_TRY(arena.check("route"));
  router.run();
  return {};
}

}  // namespace hisac::cpu
