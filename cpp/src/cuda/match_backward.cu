// SPDX-License-Identifier: Apache-2.0
// `match_backward` in six launches. As `match` it finds the nodes of all cells; a warp, or a block for a long node,
// adds the gradients of the cells that have a node, in float64, and takes the mean of the node's sums. Then a warp has
// 32 sums and takes, in their order, the users that have some of them: it searches for the nodes that hold each sum,
// and gives it its share of their gradients. A gradient is written once, and nothing is added by two.
//
// The limit is memory. The gradients of the N L cells are read once; a node's are kept in the workspace, V float32, and
// read once for each of its sums, mostly from the L2 cache; v is read once for a sum's own gradient, and, where that of
// a bias is wanted, once more for each level; the S V gradients are written once. To find the cells of a node that
// several have, a warp reads 4 bytes for each candidate of the user.
#include "cuda/chunks.h"
#include "cuda/match_task.h"
#include "cuda/verbs.h"

namespace hisac::cuda {
namespace {

constexpr int kTogether = 4;  // sums that a warp gives to at once

/// Of a node: the gradient of lse, less that of v times the mean v; of its weights, 1 / their sum and the largest bias.
struct NodeTerms {
  double d_lse, inverse;
  float largest;
};

struct MatchBackTask : MatchTask {
  MatchForward forward;
  MatchGradients out;
  Chunks chunks;               // of 32 sums
  float* d_v = nullptr;        // [cells, V] a node's, at its owner
  NodeTerms* terms = nullptr;  // [cells] likewise
};

template <bool kBlock>
SIMT_DEVICE void add_cells(const MatchBackTask& t, int64_t cell) {
  using Mean = NodeMean<kBlock>;
  const int place = t.place[cell];
  if (place < 0) return;
  const Mean mean(t, t.node[cell]);
  if (mean.largest == -kInfinity) return;
  const int64_t n = cell / t.levels, level = cell % t.levels;
  Node range{static_cast<int32_t>(n), static_cast<int32_t>(n + 1)};  // of candidates
  if (t.asking[place] > 1) {
    const int64_t user = t.user_of(n);
    range = {static_cast<int32_t>(t.first_candidate(user)), t.ended[user]};
  }
  const auto shares = [&](int64_t candidate) {
    return candidate < range.last && t.place[candidate * t.levels + level] == place;
  };
  double d_lse = 0;
  Mean::each_part(range, [&](int64_t, int64_t candidate) {
    if (t.forward.d_lse.data && shares(candidate))
      d_lse += static_cast<double>(t.forward.d_lse.data[candidate * t.levels + level]);
  });
  d_lse = over_warps<Mean::kParts>(d_lse, Add{});
  double dot = 0;
  SIMT_ROLLED for (int64_t column = 0; t.forward.d_v.data && column < t.v.width; column += kNodeColumns) {
    double d_v[2] = {}, v[2] = {};
    Mean::each_part(range, [&](int64_t first, int64_t candidate) {
      add_rows(t.forward.d_v, first * t.levels + level, t.levels, shares(candidate) ? 1.f : -1.f, column, d_v);
    });
    add_warps<Mean::kParts>(d_v);
    if (t.out.bias.data) mean.at(column, v);
    SIMT_EACH (i, 2) {
      const int64_t c = column + 32 * i + simt::lane();
      const float rounded = static_cast<float>(d_v[i]);
      if (c >= t.v.width) continue;
      if (Mean::writes()) t.d_v[cell * t.v.width + c] = rounded;
      dot += static_cast<double>(rounded) * v[i];
    }
  }
  dot = over_warps<1>(dot, Add{});
  if (simt::lane() == 0 && Mean::writes()) t.terms[cell] = {d_lse - dot, 1 / mean.total, mean.largest};
}

SIMT_KERNEL(kMatchThreads, 3) add_gradients(SIMT_CONSTANT MatchBackTask t) {
  each_owner(t, [&](int64_t cell, auto in_block) { add_cells<decltype(in_block)::value>(t, cell); });
}

/// The nodes, by their owners, that hold each of a warp's sums in the sums of one user; -1: nobody asks for it.
struct Holding {
  int32_t cell[kMaxLevels][32];
  float share[kMaxLevels][32];
};

/// By a warp: the gradients of the 32 sums of a chunk. A lane has a sum.
class SumGradients {
 public:
  SIMT_DEVICE SumGradients(const MatchBackTask& task, int64_t first)
      : t(task), h(shared<Holding>(0)[simt::warp()]), first_(first), sum_(first + simt::lane()) {}

  SIMT_DEVICE void run() {
    const bool here = sum_ < t.rows;
    bias_ = here ? t.bias_of(sum_) : -kInfinity;
    t.chunks.each_user(t, first_, first_ + 32, [&](int64_t user) { add(user); });
    if (here && t.out.bias.data) t.out.bias.data[sum_] = static_cast<float>(d_bias_);
    uint32_t rest = t.out.v.data ? simt::ballot(here) & ~given_ : 0;
    SIMT_ROLLED for (; rest; rest &= rest - 1) for (int64_t c = simt::lane(); c < t.v.width; c += 32)
        d_v(lowest(rest), c) = 0;
  }

 private:
  SIMT_DEVICE float& d_v(int lane, int64_t c) const { return t.out.v.data[(first_ + lane) * t.v.width + c]; }

  /// What a user's candidates bring.
  SIMT_DEVICE void add(int64_t user) {
    const bool held = find(user);
    SIMT_UNLESS_PLANTED(82, simt::sync_warp());
    uint32_t lanes = simt::ballot(held);
    SIMT_ROLLED while (t.forward.d_v.data && lanes) give(lanes);
    SIMT_UNLESS_PLANTED(83, simt::sync_warp());  // others still read what the next user's overwrites
  }

  /// Finds the nodes that hold this lane's sum; whether there are any.
  SIMT_DEVICE bool find(int64_t user) {
    int64_t first = t.start(user);
    const bool own = bias_ > -kInfinity && first <= sum_ && sum_ < t.end(user);
    bool held = false;
    SIMT_ROLLED for (int l = 0; l < t.levels; ++l) {
      int64_t cell = -1;
      if (own) {
        first = t.find(first, sum_, l, t.codes[sum_ * t.levels + l]);
        cell = t.owner_of(MatchTask::key_of(user, l, first));
      }
      // what is sorted lies in the node that it is searched for
      SIMT_UNLESS_PLANTED(85, if (cell >= 0 && sum_ >= t.node[cell].last) cell = -1);
      h.cell[l][simt::lane()] = static_cast<int32_t>(cell);
      if (cell < 0) continue;
      const NodeTerms n = t.terms[cell];
      const double share = static_cast<double>(simt::exp2((bias_ - n.largest) * kLog2e)) * n.inverse;
      h.share[l][simt::lane()] = static_cast<float>(share);
      d_bias_ += share * n.d_lse;
      held = true;
    }
    return held;
  }

  /// Takes up to four lanes, and gives their sums the gradients of v.
  SIMT_DEVICE void give(uint32_t& lanes) {
    int j[kTogether];
    uint32_t taken = 0;
    double dot[kTogether] = {};
    SIMT_EACH (k, kTogether) {
      j[k] = lanes ? lowest(lanes) : -1;
      taken |= lanes & (0u - lanes);
      lanes &= lanes - 1;
    }
    SIMT_ROLLED for (int64_t c = simt::lane(); c < t.v.width; c += 32) {
      double sum[kTogether] = {};
      SIMT_ROLLED for (int l = 0; l < t.levels; ++l) {
        SIMT_EACH (k, kTogether) {
          const int64_t cell = j[k] < 0 ? -1 : h.cell[l][j[k]];
          const float share = cell < 0 ? 0.f : h.share[l][j[k]], d = cell < 0 ? 0.f : t.d_v[cell * t.v.width + c];
          sum[k] += static_cast<double>(share) * static_cast<double>(d);
        }
      }
      SIMT_EACH (k, kTogether) {
        if (j[k] < 0) continue;
        if (t.out.v.data) {
          const float before = given_ >> j[k] & 1 ? d_v(j[k], c) : 0.f;
          d_v(j[k], c) = static_cast<float>(static_cast<double>(before) + sum[k]);
        }
        if (t.out.bias.data) dot[k] += sum[k] * static_cast<double>(t.v_element(first_ + j[k], c));
      }
    }
    SIMT_UNLESS_PLANTED(84, given_ |= taken);
    SIMT_EACH (k, kTogether) {
      const double all = over_warps<1>(dot[k], Add{});
      if (simt::lane() == j[k]) d_bias_ += all;
    }
  }

  const MatchBackTask& t;
  Holding& h;
  const int64_t first_, sum_;
  float bias_ = 0;
  uint32_t given_ = 0;  // sums whose dv is there
  double d_bias_ = 0;
};

SIMT_KERNEL(kMatchThreads, 3) give_gradients(SIMT_CONSTANT MatchBackTask t) {
  for (int64_t chunk = int64_t{simt::block()} * kMatchWarps + simt::warp(); chunk < t.chunks.count;
       chunk += int64_t{simt::blocks()} * kMatchWarps)
    SumGradients(t, chunk * 32).run();
}

MatchBackTask describe(const Codebook& book, const MatchInputs& in, Arena& arena) {
  MatchBackTask t;
  static_cast<MatchTask&>(t) = match_task(book, in, true, arena);
  t.chunks.size = 32;
  t.chunks.count = static_cast<int>((t.rows + 31) / 32);
  t.chunks.carve(t.chunks.count, arena);
  t.d_v = arena.take<float>(t.cells, t.v.width);
  t.terms = arena.take<NodeTerms>(t.cells);
  return t;
}

}  // namespace

size_t match_backward_workspace(const Context&, const Codebook& book, const MatchInputs& inputs) noexcept {
  Arena arena;
  describe(book, inputs, arena);
  return arena.used();
}

Status match_backward(const Context& context, const Codebook& book, const MatchInputs& inputs,
                      const MatchForward& forward, const MatchGradients& out) noexcept {
  HISAC_TRY(check_match("match_backward", inputs));
  Arena arena(context.workspace);
  MatchBackTask t = describe(book, inputs, arena);
  HISAC_TRY(arena.check("match_backward"));
  t.forward = forward;
  t.out = out;
  Launcher launch("match_backward", context);
  HISAC_TRY(launch.status());
  const int most = launch.machine.processors * 8;
  launch_find_nodes(t, launch);
  launch_clear_chunks(t.chunks, launch);
  launch_plan_chunks(t, t.chunks, launch);
  launch(add_gradients, least((t.cells + kMatchWarps - 1) / kMatchWarps, most), kMatchThreads, kNodeBytes, t);
  launch(give_gradients, least((t.chunks.count + kMatchWarps - 1) / kMatchWarps, most), kMatchThreads,
         kMatchWarps * sizeof(Holding), t);
  return launch.status();
}

}  // namespace hisac::cuda
