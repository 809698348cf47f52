// SPDX-License-Identifier: Apache-2.0
// The part of fuzz_verbs that reads histories as route does.
#include <cfloat>

#include "cpu/simd/kernels.h"
#include "fuzz_verbs.h"
#include "laws.h"
#include "tolerance.h"

namespace fuzz {
namespace {

using hisac::agent_lists;
using hisac::missing;
using hisac::route;

/// Memory for leaf sums of so many rows in all.
struct Sums {
  int64_t users, rows, width, value_width, levels;
  bool together;
  Output<float> x{rows * width}, v{rows * value_width}, bias{rows}, spread{rows};
  Output<int64_t> starts{users + 1}, ends{users}, votes{rows};
  Output<int32_t> codes{rows * levels};

  LeafSums out(int crew) {
    return {{x[crew], {rows, width}},
            {value_width ? v[crew] : nullptr, {rows, value_width}},
            {starts[crew], together ? starts[crew] + 1 : ends[crew], users},
            {codes[crew], {rows, levels}},
            {bias[crew], {rows}},
            {spread[crew], {rows}},
            {votes[crew], {rows}}};
  }
  /// Those of the first instruction set, for all to read.
  Histories settled() {
    int64_t* const start = starts.settled();
    const LeafSums first{{x.settled(), {rows, width}},
                         {value_width ? v.settled() : nullptr, {rows, value_width}},
                         {start, together ? start + 1 : ends.settled(), users},
                         {codes.settled(), {rows, levels}},
                         {bias.settled(), {rows}},
                         {spread.settled(), {rows}},
                         {votes.settled(), {rows}}};
    return first.histories();
  }
};

/// leaf_sums in both forms, and its backward; returns the sums.
Histories leaf_some(Bytes& in, const Histories& given, const Codes& c, const Users& u, tolerance::Leaf bound,
                    bool hostile) {
  const int64_t n = given.offsets.users, width = c.book.width(), wide = given.v.width;
  Sums sums{n, u.rows(), width, wide, c.levels, true}, apart{n, sums.rows, width, wide, c.levels, false};
  for (Sums* form : {&sums, &apart}) {
    each_crew([&](int workers) { return leaf_sums_workspace(test::sizing(workers), c.book, given); },
              [&](const Context& context, int crew) { return leaf_sums(context, c.book, given, form->out(crew)); });
    form->x.agree(!hostile, bound.sum_x());
    form->v.agree(!hostile, bound.sum_v());
    form->bias.agree(!hostile, bound.sum_bias());
    form->spread.agree(!hostile, bound.sum_spread());
    form->starts.equal();
    form->ends.equal();
    form->codes.equal();
    form->votes.equal();
  }
  const LeafSums a = sums.out(0), b = apart.out(0);
  const std::vector<int32_t> codes = laws::codes_of(given);
  int64_t behind = 0, together = 0;
  for (int64_t user = 0; user < n; ++user) {
    const int64_t first = a.offsets.starts[user], count = a.offsets.ends[user] - first, there = b.offsets.starts[user];
    CHECK(first == together && there == behind && count == b.offsets.ends[user] - there);
    together += count;
    behind += u.ends[test::size(user)] - u.starts[test::size(user)];
    const auto same = [&](const void* of_a, const void* of_b, int64_t each) {
      const auto *const p = static_cast<const std::byte*>(of_a), *const q = static_cast<const std::byte*>(of_b);
      CHECK(count == 0 || each == 0 || std::memcmp(p + first * each, q + there * each, test::size(count * each)) == 0);
    };
    same(a.x.data, b.x.data, width * 4);
    same(a.v.data, b.v.data, wide * 4);
    same(a.codes.data, b.codes.data, c.levels * 4);
    same(a.bias.data, b.bias.data, 4);
    same(a.spread.data, b.spread.data, 4);
    same(a.votes.data, b.votes.data, 8);
    if (ledger.first())
      laws::Tree(c.book, codes, given.weights, u.starts[test::size(user)], u.ends[test::size(user)])
          .summed(a.codes.data + first * c.levels, a.votes.data + first, count);
    for (int64_t g = first; g < first + count; ++g) {
      const bool present = std::isfinite(a.bias.data[g]);
      CHECK(a.spread.data[g] >= 0 && a.spread.data[g] <= FLT_MAX);
      CHECK(present || (a.bias.data[g] == -INFINITY && a.votes.data[g] > 0 && a.spread.data[g] == 0));
      for (int64_t d = 0; !present && d < width; ++d) CHECK(a.x.data[g * width + d] == 0);
      for (int64_t d = 0; !present && d < wide; ++d) CHECK(a.v.data[g * wide + d] == 0);
      for (int64_t d = 0; d < width; ++d) CHECK(std::isfinite(a.x.data[g * width + d]));
      CHECK(g == first || c.book.leaf(a.codes.data + (g - 1) * c.levels) < c.book.leaf(a.codes.data + g * c.levels));
    }
  }

  VoteParams params;
  params.budget = in.between(1, 60);
  const Voted voted(c.book, params, given);
  CHECK(Voted(c.book, params, a.histories()) == voted);
  CHECK(Voted(c.book, params, b.histories()) == voted);

  const Histories settled = in.flag() ? sums.settled() : apart.settled();
  const auto dx = in.values(sums.rows * width, hostile), dv = in.values(sums.rows * wide, hostile),
             ds = in.values(sums.rows, hostile);
  Guarded<float> d_x(dx), d_v(dv), d_s(ds);
  const uint8_t wanted = in.byte();
  LeafSumsForward forward{settled};
  if (wanted & 1) forward.d_x = {d_x.data(), {sums.rows, width}};
  if (wanted & 2) forward.d_v = {wide ? d_v.data() : nullptr, {sums.rows, wide}};
  if (wanted & 4) forward.d_bias = {d_s.data(), {sums.rows}};
  if (wanted & 8) forward.d_spread = {d_s.data(), {sums.rows}};
  if (wanted & 1) bound.d_sum_x = largest(dx);
  if (wanted & 2) bound.d_sum_v = largest(dv);
  bound.d_sum_bias = largest(ds);
  const int64_t t = given.behaviours();
  TableRows of_v(in, given, given.v_ids, given.v.rows);
  Output<float> to_v(of_v.count * wide), to_bias(t);
  const auto gradients = [&](int crew) {
    LeafSumsGradients out;
    if (wanted & 16 && wide) out.v = {to_v[crew], {of_v.count, wide}};
    out.v_rows = of_v.listed;
    if (wanted & 32) out.bias = {to_bias[crew], {t}};
    return out;
  };
  each_crew(
      [&](int workers) { return leaf_sums_backward_workspace(test::sizing(workers), c.book, given, gradients(0)); },
      [&](const Context& context, int crew) {
        return leaf_sums_backward(context, c.book, given, forward, gradients(crew));
      });
  to_v.agree(!hostile, bound.d_v() * of_v.most);
  to_bias.agree(!hostile, bound.d_bias());
  return settled;
}

/// missing, by its law too. x, v: the rows of the tables, as floats.
void missing_some(const Histories& given, const Codebook* book, const std::vector<float>& x,
                  const std::vector<float>& v) {
  Output<float> out(given.behaviours());
  each_crew([&](int workers) { return missing_workspace(test::sizing(workers), book, given); },
            [&](const Context& context, int crew) {
              return missing(context, book, given, {out[crew], {given.behaviours()}});
            });
  out.equal();
  const auto in_history = [&](int64_t i) {
    for (int64_t b = 0; b < given.offsets.users; ++b)
      if (given.offsets.start(b) <= i && i < given.offsets.end(b)) return true;
    return false;
  };
  for (int64_t i = 0; ledger.first() && i < given.behaviours(); ++i) {
    const bool missing = in_history(i) && laws::missing(given, book, x, v, i);
    CHECK(out[0][i] == (missing ? 0.f : -std::numeric_limits<float>::infinity()));
  }
}

/// The lists of agents, held against their definition; and what sparse routing takes of agents, now and then.
struct SomeLists {
  int64_t k;
  Output<int32_t> lists;
  Guarded<int32_t> own, any;

  SomeLists(Bytes& in, const Codebook& book, RouteAgents& to, RouteParams& params, bool with_book)
      : k(std::min<int64_t>(in.between(1, 6), to.prototypes.shape[1])),
        lists(users(to) * book.size(0) * k),
        own(users(to) * to.prototypes.shape[1] * book.levels()),
        any(lists.crew[0].count()) {
    const int64_t nodes = book.size(0), m = to.prototypes.shape[1];
    each_crew([&](int workers) { return agent_lists_workspace(test::sizing(workers), book, to); },
              [&](const Context& context, int crew) {
                return agent_lists(context, book, to, {lists[crew], {users(to), nodes, k}});
              });
    lists.equal();
    for (int64_t b = 0; b < users(to); ++b)
      for (int64_t c = 0; c < nodes; ++c) CHECK(laws::nearest_agents(book, to, b, c, k) == list_of(b * nodes + c));
    for (int64_t i = 0; i < own.count(); ++i) own.data()[i] = static_cast<int32_t>(in.byte() % (nodes + 2)) - 1;
    for (int64_t i = 0; i < any.count(); ++i)
      any.data()[i] = in.byte() % 16 ? static_cast<int32_t>(in.byte() % (m + 2)) - 1 : INT32_MIN;
    if (!with_book || !in.flag()) return;
    params.sparse = in.between(1, k > 0 && in.flag() ? k : 9);
    to.codes = {own.data(), {users(to), m, book.levels()}};
    if (params.sparse <= k && in.flag()) to.lists = {any.data(), {users(to), nodes, k}};
  }
  static int64_t users(const RouteAgents& to) { return to.prototypes.shape[0]; }
  std::vector<int32_t> list_of(int64_t i) { return {lists[0] + i * k, lists[0] + (i + 1) * k}; }
};

}  // namespace

void route_some(Bytes& in, const Codes& c, const Users& u, bool hostile) {
  const int64_t width = c.book.width(), agents = in.flag() ? in.between(0, 5) : in.between(0, 70),
                n = static_cast<int64_t>(u.starts.size()), longest = u.longest();
  const uint8_t wants = in.byte();
  const bool without_v = (wants & 3) == 3, has_tokens = !without_v && (wants & 12) != 12, has_mean_x = wants & 16;
  const int64_t drawn_width = in.flag() ? in.between(1, 5) : in.between(1, 40), wide = without_v ? 0 : drawn_width;
  const DType type = kTypes[in.byte() % 3];
  const auto vs = in.values(c.rows * drawn_width, hostile), ps = in.values(n * agents * width, hostile);
  const uint8_t manner = in.byte();
  const bool x_by_id = manner & 1, v_by_id = manner & 2, int8 = manner & 4;
  const int64_t items = x_by_id ? in.between(0, c.rows) : c.rows, v_rows = v_by_id ? in.between(0, c.rows) : c.rows;
  SomeIds x_ids(in, c.rows, items), v_ids(in, c.rows, v_rows);
  const auto table = [](const auto& rows, int64_t size) {
    return std::vector(rows.begin(), rows.begin() + static_cast<std::ptrdiff_t>(size));
  };
  Typed x(table(c.x, items * width), int8 ? DType::int8 : type, width),
      v(table(vs, v_rows * drawn_width), type, drawn_width);
  const auto scales = in.values(manner & 8 ? 1 : x.rows().rows, hostile);
  Guarded<float> scale(scales);
  const auto biases = in.values(c.rows, hostile);
  Guarded<float> p(ps), bias(biases);
  std::vector<float> spreads = in.values(c.rows, hostile);
  for (float& t : spreads)
    if (!hostile) t = std::fabs(t);
  Guarded<float> spread(spreads);
  std::vector<float> taus = in.values(in.flag() ? 1 : agents, hostile);
  for (float& t : taus)
    if (!hostile) t = std::fabs(t) + 1;
  if (taus.empty()) taus = {1};
  Guarded<float> temperature(taus);
  Guarded<int32_t> count(n), codes(table(c.codes, items * c.levels));
  for (int64_t b = 0; b < n; ++b) count.data()[b] = static_cast<int32_t>(in.between(0, 80)) - 4;
  RouteParams params;
  params.normalize = static_cast<Normalize>(in.between(0, 1));
  params.precision = static_cast<Precision>(in.between(0, 1));
  params.temperature = {temperature.data(), {temperature.count()}};
  const Codebook* book = nullptr;
  Histories inputs{x.rows(), without_v ? Rows{} : v.rows(), u.spans()};
  RouteAgents to{{p.data(), {n, agents, width}}, {}};
  if (x_by_id) inputs.x_ids = x_ids.ids();
  if (v_by_id && !without_v) inputs.v_ids = v_ids.ids();
  if (int8 && manner & 16) inputs.x_scale = {scale.data(), {scale.count()}};
  if (in.flag()) to.count = {count.data(), {n}};
  if (in.flag()) inputs.bias = {bias.data(), {c.rows}};
  if (in.flag()) inputs.spread = {spread.data(), {c.rows}};
  SomeWeights weights(in, c.rows, hostile);
  inputs.weights = weights.weights();
  const bool without_x = in.byte() % 4 == 0, over_sums = in.byte() % 4 == 0;
  if (over_sums || without_x || in.flag()) {
    inputs.codes = {codes.data(), {items, c.levels}};
    book = &c.book;
  }
  if (without_x) {
    inputs.x = {};
    inputs.x_scale = {};
  }
  SomeLists lists(in, c.book, to, params, book != nullptr);
  double path = 0;  // of a code, no prototype is longer
  for (int l = 0; l < c.levels; ++l) path += longest_of(c.book.centers(l), c.book.size(l), width);
  tolerance::Leaf leaf{double(longest),
                       double(n),
                       double(width),
                       double(wide),
                       longest_of(c.x.data(), c.rows, width),
                       without_v ? 0 : largest(vs),
                       largest(biases),
                       inputs.spread ? largest(spreads) : 0};
  if (int8) leaf.x = 127 * std::sqrt(double(width)) * (inputs.x_scale ? largest(scales) : 1);
  if (without_x) leaf.x = path;
  missing_some(inputs, book, x.values(), v.values());
  Histories routed = inputs;
  if (inputs.codes) {
    const Histories sums = leaf_some(in, inputs, c, u, leaf, hostile);
    if (over_sums) routed = sums;
    if (over_sums && !params.sparse && in.flag()) book = nullptr;
  }

  const int64_t m = agents, t = routed.behaviours();
  const DType of_v = routed.v.dtype;
  const auto d = in.values(n * m * wide, hostile), dl = in.values(n * m, hostile),
             dm = in.values(n * m * width, hostile);
  Output<std::byte> tokens(has_tokens ? n * m * wide * bytes_of(of_v) : 0, of_v);
  Output<float> lse(n * m), mean_x(has_mean_x ? n * m * width : 0);
  const uint8_t wanted = in.byte();
  const bool from_tokens = has_tokens && in.byte() % 8, from_lse = in.byte() % 8,
             from_mean_x = has_mean_x && in.byte() % 8;
  const bool want_x = !from_mean_x && routed.x.data, want_v = !without_v;
  const tolerance::Route bound{double(longest),
                               double(n),
                               double(agents),
                               double(width),
                               double(wide),
                               over_sums ? leaf.x * (1 + 0x1p-20) : leaf.x,
                               longest_of(ps.data(), n * agents, width),
                               leaf.v,
                               over_sums ? leaf.bias + std::log(double(longest) + 1) : leaf.bias,
                               over_sums ? leaf.most_spread() : leaf.spread,
                               from_tokens ? largest(d) : 0,
                               from_lse ? largest(dl) : 0,
                               from_mean_x ? largest(dm) : 0,
                               double(*std::min_element(taus.begin(), taus.end())),
                               params.normalize == Normalize::agents,
                               params.precision == Precision::bfloat16 ? tolerance::kRounded
                               : simd::kernels().matmul_bf16x3         ? tolerance::kBf16x3
                                                                       : 0,
                               of_v,
                               params.sparse ? double(std::min(longest, c.book.size(0))) : 0};
  const auto returned = [&](int crew) {
    Tokens out{{}, {lse[crew], {n, m}}};
    if (has_tokens) out.tokens = {tokens[crew], of_v, n * m, wide};
    if (has_mean_x) out.mean_x = {mean_x[crew], {n, m, width}};
    return out;
  };
  each_crew([&](int workers) { return route_workspace(test::sizing(workers), book, params, routed, to, returned(0)); },
            [&](const Context& context, int crew) { return route(context, book, params, routed, to, returned(crew)); });
  tokens.agree(!hostile, bound.tokens());
  lse.agree(!hostile, bound.lse());
  mean_x.agree(!hostile, bound.mean_x());

  // Every set goes back from the same place, but where that is too far from its own: coarse weights would overflow.
  const bool own = bound.logit() > 60;
  Typed d_tokens(d, of_v, std::max<int64_t>(wide, 1));
  Guarded<float> d_lse(dl), d_mean_x(dm);
  TableRows rows_of_x(in, routed, routed.x_ids, routed.items()), rows_of_v(in, routed, routed.v_ids, routed.v.rows);
  Output<float> dx(want_x ? rows_of_x.count * width : 0), dv(want_v ? rows_of_v.count * wide : 0), dbias(t), dspread(t),
      dp(n * agents * width), dtau(temperature.count());
  RouteForward forward{{}, {own ? lse[0] : lse.settled(), {n, m}}, {}, {}, {}, {}};
  if (from_tokens) forward.tokens = {own ? tokens[0] : tokens.settled(), of_v, n * m, wide};
  if (from_tokens) forward.d_tokens = {d_tokens.rows().data, of_v, n * m, wide};
  if (from_mean_x) forward.mean_x = {own ? mean_x[0] : mean_x.settled(), {n, m, width}};
  if (from_mean_x) forward.d_mean_x = {d_mean_x.data(), {n, m, width}};
  if (from_lse) forward.d_lse = {d_lse.data(), {n, m}};
  const auto gradients = [&](int crew) {
    RouteGradients g;
    if (wanted & 1 && want_v) g.v = {dv[crew], {rows_of_v.count, wide}};
    if (wanted & 2) g.temperature = {dtau[crew], {temperature.count()}};
    if (wanted & 4) g.bias = {dbias[crew], {t}};
    if (wanted & 8 && want_x) g.x = {dx[crew], {rows_of_x.count, width}};
    if (wanted & 16) g.prototypes = {dp[crew], {n, agents, width}};
    if (wanted & 32) g.spread = {dspread[crew], {t}};
    g.x_rows = rows_of_x.listed;
    g.v_rows = rows_of_v.listed;
    return g;
  };
  each_crew(
      [&](int workers) {
        return route_backward_workspace(test::sizing(workers), book, params, routed, to, forward, gradients(0));
      },
      [&](const Context& context, int crew) {
        return route_backward(context, book, params, routed, to, forward, gradients(crew));
      });
  dv.agree(!hostile, bound.d_v() * rows_of_v.most);
  dtau.agree(!hostile, bound.d_temperature());
  dbias.agree(!hostile, bound.d_bias());
  dspread.agree(!hostile, bound.d_spread());
  dx.agree(!hostile, bound.d_x() * rows_of_x.most);
  dp.agree(!hostile, bound.d_prototypes());
}

}  // namespace fuzz
