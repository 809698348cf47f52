// SPDX-License-Identifier: Apache-2.0
// Small shapes and hostile floats through every verb, in exact-size memory, under every instruction set that this
// processor has and on the AMX emulation. No crash; encode and vote keep their laws (laws.h); one worker, two and
// seven give the same bits; integers and codebooks are the same for all sets; and where inputs are tame, nothing is NaN
// and the sets agree (tolerance.h).
#include <cfloat>
#include <cmath>

#include "amx_table.h"
#include "cpu/simd/kernels.h"
#include "fuzz.h"
#include "fuzz_outputs.h"
#include "laws.h"
#include "tolerance.h"

using namespace hisac;
using fuzz::Bytes;
using fuzz::each_crew;
using fuzz::ledger;
using fuzz::Output;
using fuzz::Typed;
using test::Guarded;

namespace {

constexpr DType kTypes[] = {DType::float32, DType::bfloat16, DType::float16};

double largest(const std::vector<float>& values) {
  double out = 0;
  for (float x : values) out = std::max(out, std::fabs(double(x)));
  return out;
}

/// The longest row.
double longest_of(const float* values, int64_t rows, int64_t width) {
  double out = 0;
  for (int64_t i = 0; i < rows; ++i) {
    double square = 0;
    for (int64_t d = 0; d < width; ++d) square += double(values[i * width + d]) * double(values[i * width + d]);
    out = std::max(out, square);
  }
  return std::sqrt(out);
}

struct Codes {
  Codebook book;
  int64_t rows, levels;
  std::vector<float> x;
  std::vector<int32_t> codes;
};

Codes encode_some(Bytes& in, bool hostile) {
  Codes out;
  const bool tall = in.byte() % 8 == 0;  // several tiles of 2,048 rows; then narrow, so that it takes no longer
  out.rows = tall ? in.between(20, 50) * 90 : in.between(0, 90);
  const int64_t width = in.flag() || tall ? in.between(1, 5) : in.between(1, 40);
  out.levels = in.between(1, 3);
  std::vector<std::vector<float>> centers;
  std::vector<Array<const float, 2>> arrays;
  for (int64_t l = 0; l < out.levels; ++l) {
    const int64_t size = in.flag() || tall ? in.between(1, 4) : in.between(1, 40);
    centers.push_back(in.values(size * width, hostile));
    for (float& c : centers.back())
      if (!std::isfinite(c)) c = 1;
    arrays.push_back({centers.back().data(), {size, width}});
  }
  CHECK(Codebook::build(arrays.data(), static_cast<int>(out.levels), &out.book).ok());
  out.x = in.values(out.rows * width, hostile);
  Guarded<float> x(out.x);
  Output<int32_t> codes(out.rows * out.levels);
  each_crew([&](int workers) { return encode_workspace(test::sizing(workers), out.book); },
            [&](const Context& c, int crew) {
              return encode(c, out.book, {x.data(), DType::float32, out.rows, width},
                            {codes[crew], {out.rows, out.levels}});
            });
  codes.equal();
  out.codes = codes.crew[0].values();
  for (int64_t i = 0; ledger.first() && i < out.rows && i < 200; ++i)
    laws::nearest(out.book, out.x.data() + i * width, out.codes.data() + i * out.levels);
  return out;
}

struct Users {
  std::vector<int64_t> starts, ends;
  Spans spans() const { return {starts.data(), ends.data(), DType::int64, static_cast<int64_t>(starts.size())}; }
};

Users users(Bytes& in, int64_t rows, bool overlap) {
  Users out;
  int64_t at = 0;
  for (int64_t n = in.between(0, 4); n > 0; --n) {
    const int64_t start = overlap ? rows * in.byte() / 256 : at;
    at = n == 1 && in.flag() ? rows : start + (rows - start) * in.byte() / 255;
    out.starts.push_back(start);
    out.ends.push_back(at);
  }
  return out;
}

/// Ids [T] into a table of so many rows, some of them outside, in exact-size memory.
struct SomeIds {
  Guarded<int32_t> narrow;
  Guarded<int64_t> wide;
  bool is_wide;

  SomeIds(Bytes& in, int64_t count, int64_t size) : narrow(count), wide(count), is_wide(in.flag()) {
    const int64_t step = in.between(1, 7), start = in.byte();
    const int64_t odd[] = {-1, size, INT64_MIN, INT64_MAX, int64_t{1} << 32, -(int64_t{1} << 31)};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t id = i % 16 == start % 16 ? odd[i % 6] : size ? (start + i * step) % size : 0;
      wide.data()[i] = id;
      narrow.data()[i] = static_cast<int32_t>(id);
    }
  }
  Ids ids() {
    if (is_wide) return {wide.data(), DType::int64, wide.count()};
    return {narrow.data(), DType::int32, narrow.count()};
  }
};

void vote_some(Bytes& in, const Codes& c, Users u, bool hostile) {
  VoteParams params;
  if (in.flag())
    params.budget = in.between(1, 60);
  else
    for (int64_t l = 0; l < c.levels; ++l) params.fanout[l] = in.between(1, 5);
  std::vector<int32_t> codes = c.codes;
  for (int64_t n = in.between(0, 5); n > 0 && !codes.empty(); --n)
    codes[test::size(in.byte()) % codes.size()] = static_cast<int32_t>(in.byte()) * 0x00800001 - 3;
  int64_t rows = c.rows;
  if (rows > 0 && in.between(0, 15) == 15) {  // one long history, whose leaves are counted and not sorted
    for (; rows < 2048; rows *= 2) {
      codes.resize(test::size(2 * rows * c.levels));
      std::copy_n(codes.begin(), rows * c.levels, codes.begin() + rows * c.levels);
    }
    u.starts = {0};
    u.ends = {rows};
  }
  const bool weighted = in.flag(), by_id = in.flag();
  Guarded<float> weights(weighted ? in.values(rows, hostile) : std::vector<float>{});
  const int64_t items = by_id ? in.between(0, rows) : rows;
  Guarded<int32_t> given(std::vector<int32_t>(codes.begin(), codes.begin() + items * c.levels));
  SomeIds some(in, by_id ? rows : 0, items);
  for (int64_t i = 0; by_id && i < rows; ++i)
    for (int64_t l = 0, id = some.ids()[i]; l < c.levels; ++l)
      codes[test::size(i * c.levels + l)] = id >= 0 && id < items ? given.data()[id * c.levels + l] : -1;
  const int64_t n = static_cast<int64_t>(u.starts.size()), m = seats(params, static_cast<int>(c.levels));
  int64_t longest = 0;
  for (size_t b = 0; b < u.starts.size(); ++b) longest = std::max(longest, u.ends[b] - u.starts[b]);
  Output<int32_t> agents(n * m * c.levels), count(n);
  Output<int64_t> votes(n * m);
  Histories histories;
  histories.offsets = u.spans();
  histories.codes = {given.data(), {items, c.levels}};
  if (by_id) histories.x_ids = some.ids();
  if (weighted) histories.weights = {weights.data(), {rows}};
  each_crew([&](int workers) { return vote_workspace(test::sizing(workers), c.book, params, longest); },
            [&](const Context& context, int crew) {
              return vote(context, c.book, params, histories,
                          {{agents[crew], {n, m, c.levels}}, {votes[crew], {n, m}}, {count[crew], {n}}});
            });
  agents.equal();
  votes.equal();
  count.equal();
  for (int64_t b = 0; ledger.first() && b < n; ++b) {
    const int64_t first = u.starts[test::size(b)];
    laws::Tree tree(c.book, codes.data() + first * c.levels, weighted ? weights.data() + first : nullptr,
                    u.ends[test::size(b)] - first);
    tree.seat(agents[0] + b * m * c.levels, votes[0] + b * m, count[0][b]);
    if (params.budget)
      tree.fair(params.budget);
    else
      tree.fullest(params.fanout);
  }
}

void leaf_some(const Histories& in, const Codes& c, const Users& u, int64_t longest) {
  const int64_t n = in.offsets.users, width = c.book.width(), value_width = in.v.width;
  int64_t rows = 0;
  for (size_t b = 0; b < u.starts.size(); ++b) rows += u.ends[b] - u.starts[b];
  Output<float> x(rows * width), v(rows * value_width), bias(rows), spread(rows);
  Output<int64_t> offsets(n + 1);
  Output<int32_t> codes(rows * c.levels);
  each_crew([&](int workers) { return leaf_sums_workspace(test::sizing(workers), c.book, in, longest); },
            [&](const Context& context, int crew) {
              return leaf_sums(context, c.book, in,
                               {{x[crew], {rows, width}},
                                {v[crew], {rows, value_width}},
                                {offsets[crew], {n + 1}},
                                {codes[crew], {rows, c.levels}},
                                {bias[crew], {rows}},
                                {spread[crew], {rows}}});
            });
  for (Output<float>* a : {&x, &v, &bias, &spread}) a->settled();
  offsets.equal();
  codes.equal();
  for (int64_t b = 0; b < n; ++b)
    for (int64_t g = offsets[0][b]; g < offsets[0][b + 1]; ++g) {
      CHECK(std::isfinite(bias[0][g]) && spread[0][g] >= 0 && spread[0][g] <= FLT_MAX);
      for (int64_t d = 0; d < width; ++d) CHECK(std::isfinite(x[0][g * width + d]));
      CHECK(g == offsets[0][b] || c.book.leaf(codes[0] + (g - 1) * c.levels) < c.book.leaf(codes[0] + g * c.levels));
    }
}

void route_some(Bytes& in, const Codes& c, const Users& u, bool hostile) {
  const int64_t width = c.book.width(), value_width = in.flag() ? in.between(1, 5) : in.between(1, 40);
  const int64_t agents = in.flag() ? in.between(0, 5) : in.between(0, 70), n = static_cast<int64_t>(u.starts.size());
  const DType type = kTypes[in.byte() % 3];
  const auto vs = in.values(c.rows * value_width, hostile), ps = in.values(n * agents * width, hostile);
  const uint8_t manner = in.byte();
  const bool x_by_id = manner & 1, v_by_id = manner & 2, int8 = manner & 4;
  const int64_t items = x_by_id ? in.between(0, c.rows) : c.rows, v_rows = v_by_id ? in.between(0, c.rows) : c.rows;
  SomeIds x_ids(in, c.rows, items), v_ids(in, c.rows, v_rows);
  const auto table = [](const auto& rows, int64_t size) {
    return std::vector(rows.begin(), rows.begin() + static_cast<std::ptrdiff_t>(size));
  };
  Typed x(table(c.x, items * width), int8 ? DType::int8 : type, width),
      v(table(vs, v_rows * value_width), type, value_width);
  const auto scales = in.values(manner & 8 ? 1 : x.rows().rows, hostile);
  Guarded<float> scale(scales);
  Guarded<float> p(ps), bias(in.values(c.rows, hostile));
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
  params.method = static_cast<Method>(in.between(0, 1));
  params.missing = static_cast<Missing>(in.between(0, 1));
  params.refine = static_cast<int>(in.between(0, 2));
  params.precision = static_cast<Precision>(in.between(0, 1));
  params.temperature = {temperature.data(), {temperature.count()}};
  const Codebook* book = nullptr;
  Histories inputs{x.rows(), v.rows(), u.spans()};
  RouteAgents to{{p.data(), {n, agents, width}}, {}};
  if (x_by_id) inputs.x_ids = x_ids.ids();
  if (v_by_id) inputs.v_ids = v_ids.ids();
  if (int8 && manner & 16) inputs.x_scale = {scale.data(), {scale.count()}};
  if (in.flag()) to.count = {count.data(), {n}};
  if (in.flag()) inputs.bias = {bias.data(), {c.rows}};
  if (in.flag()) inputs.spread = {spread.data(), {c.rows}};
  const bool without_x = in.byte() % 4 == 0;
  if (params.method == Method::leaf || without_x || in.flag()) {
    inputs.codes = {codes.data(), {items, c.levels}};
    book = &c.book;
  }
  if (without_x) {
    inputs.x = {};
    inputs.x_scale = {};
  }
  int64_t longest = 0;
  for (size_t b = 0; b < u.starts.size(); ++b) longest = std::max(longest, u.ends[b] - u.starts[b]);
  if (inputs.codes) leaf_some(inputs, c, u, longest);

  const int64_t m = agents + (params.missing == Missing::token), bytes = type == DType::float32 ? 4 : 2;
  const auto d = in.values(n * m * value_width, hostile), dl = in.values(n * m, hostile);
  tolerance::Route bound{double(longest),
                         double(n),
                         double(agents),
                         double(width),
                         double(value_width),
                         longest_of(c.x.data(), c.rows, width),
                         longest_of(ps.data(), n * agents, width),
                         largest(vs),
                         8,
                         0,
                         largest(d),
                         largest(dl),
                         double(*std::min_element(taus.begin(), taus.end())),
                         params.normalize == Normalize::agents,
                         params.method == Method::leaf,
                         params.precision == Precision::bfloat16 ? tolerance::kRounded
                         : simd::kernels().matmul_bf16x3         ? tolerance::kBf16x3
                                                                 : 0,
                         type};
  double path = 0;  // of a code, no prototype is longer
  for (int l = 0; l < c.levels; ++l) path += longest_of(c.book.centers(l), c.book.size(l), width);
  if (int8) bound.x = 127 * std::sqrt(double(width)) * (inputs.x_scale ? largest(scales) : 1);
  if (without_x) bound.x = path;
  if (inputs.spread) bound.spread = largest(spreads);
  Output<std::byte> tokens(n * m * value_width * bytes, type);
  Output<float> lse(n * m), refined(params.refine ? n * agents * width : 0);
  each_crew([&](int workers) { return route_workspace(test::sizing(workers), book, params, inputs, to, longest); },
            [&](const Context& context, int crew) {
              return route(context, book, params, inputs, to,
                           {{tokens[crew], type, n * m, value_width},
                            {lse[crew], {n, m}},
                            {params.refine ? refined[crew] : nullptr, {n, agents, width}}});
            });
  tokens.agree(!hostile, bound.tokens(params.refine));
  lse.agree(!hostile, bound.lse(params.refine));
  refined.agree(!hostile, bound.refined(params.refine));

  // Every set goes back from the same place, but where that is too far from its own: coarse weights would overflow.
  const bool own = bound.logit(0) > 60;
  if (params.refine) to.prototypes.data = own ? refined[0] : refined.settled();
  params.refine = 0;
  const bool exact = params.method == Method::exact, want_x = exact && !without_x;
  Typed d_tokens(d, type, value_width);
  Guarded<float> d_lse(dl);
  Output<float> dv(c.rows * value_width), dtau(temperature.count()), dbias(exact ? c.rows : 0),
      dx(want_x ? c.rows * width : 0), dp(exact ? n * agents * width : 0);
  const uint8_t wanted = in.byte();
  const auto gradients = [&](int crew) {
    RouteGradients g;
    if (wanted & 1) g.v = {dv[crew], {c.rows, value_width}};
    if (wanted & 2) g.temperature = {dtau[crew], {temperature.count()}};
    if (wanted & 4 && exact) g.bias = {dbias[crew], {c.rows}};
    if (wanted & 8 && want_x) g.x = {dx[crew], {c.rows, width}};
    if (wanted & 16 && exact) g.prototypes = {dp[crew], {n, agents, width}};
    return g;
  };
  each_crew(
      [&](int workers) {
        return route_backward_workspace(test::sizing(workers), book, params, inputs, to, gradients(0), longest);
      },
      [&](const Context& context, int crew) {
        return route_backward(context, book, params, inputs, to,
                              {{d_tokens.rows().data, type, n * m, value_width},
                               {d_lse.data(), {n, m}},
                               {own ? tokens[0] : tokens.settled(), type, n * m, value_width},
                               {own ? lse[0] : lse.settled(), {n, m}}},
                              gradients(crew));
      });
  dv.agree(!hostile, bound.d_v());
  dtau.agree(!hostile, bound.d_temperature());
  dbias.agree(!hostile, bound.d_bias());
  dx.agree(!hostile, bound.d_x());
  dp.agree(!hostile, bound.d_prototypes());

  const int64_t groups = in.between(0, 9);
  Guarded<int64_t> order(in.between(0, 40)), begin(groups + 1);
  for (int64_t i = 0; i < order.count(); ++i) order.data()[i] = in.byte() % 8 ? in.byte() % (c.rows + 1) : INT64_MIN;
  for (int64_t g = 0; g <= groups; ++g) begin.data()[g] = in.byte() % 8 ? in.byte() % 44 : INT64_MAX;
  Guarded<float> rows(vs);
  Output<float> sums(groups * value_width);
  each_crew([](int) { return size_t{0}; },
            [&](const Context& context, int crew) {
              return sum_rows(context, {rows.data(), {c.rows, value_width}}, {order.data(), {order.count()}},
                              {begin.data(), {groups + 1}}, {sums[crew], {groups, value_width}});
            });
  sums.equal();
  sums.agree(!hostile, 0);
}

void attend_some(Bytes& in, bool hostile) {
  const int64_t heads = in.between(1, 3), key = in.flag() ? in.between(1, 4) : in.between(1, 40);
  const int64_t value_width = in.flag() ? in.between(1, 4) : in.between(1, 40);
  const int64_t tokens = in.flag() ? in.between(0, 5) : in.between(0, 70);
  const int64_t pairs = in.byte() % 8 ? in.between(0, 70) : in.between(500, 700);
  const Users u = users(in, pairs, false);
  const int64_t n = static_cast<int64_t>(u.starts.size());
  const DType type = kTypes[in.byte() % 3];
  Typed q(in.values(pairs * heads * key, hostile), type, key),
      keys(in.values(n * tokens * heads * key, hostile), type, key),
      values(in.values(n * tokens * heads * value_width, hostile), type, value_width),
      d_out(in.values(pairs * heads * value_width, hostile), type, value_width);
  Guarded<float> bias(in.values(n * tokens, hostile)), d_lse(in.values(pairs * heads, hostile));
  AttendInputs inputs{q.rows(), keys.rows(), values.rows(), tokens, heads, u.spans(), {}, in.value(false)};
  if (in.flag()) inputs.bias = {bias.data(), {n, tokens}};
  const int64_t bytes = type == DType::float32 ? 4 : 2;
  const tolerance::Attend bound{double(pairs),
                                double(tokens),
                                double(heads),
                                double(key),
                                double(value_width),
                                8,
                                8,
                                8,
                                8,
                                double(inputs.scale),
                                8,
                                8,
                                type};
  Output<std::byte> out(pairs * heads * value_width * bytes, type);
  Output<float> lse(pairs * heads);
  each_crew([&](int workers) { return attend_workspace(test::sizing(workers), inputs); },
            [&](const Context& context, int crew) {
              return attend(context, inputs,
                            {{out[crew], type, pairs * heads, value_width}, {lse[crew], {pairs, heads}}});
            });
  out.agree(!hostile, bound.out());
  lse.agree(!hostile, bound.lse());
  Output<float> dq(pairs * heads * key), dk(n * tokens * heads * key), dv(n * tokens * heads * value_width),
      db(n * tokens);
  each_crew([&](int workers) { return attend_backward_workspace(test::sizing(workers), inputs); },
            [&](const Context& context, int crew) {
              AttendGradients g{{dq[crew], {pairs, heads, key}},
                                {dk[crew], {n, tokens, heads, key}},
                                {dv[crew], {n, tokens, heads, value_width}},
                                {}};
              if (inputs.bias) g.bias = {db[crew], {n, tokens}};
              return attend_backward(context, inputs,
                                     {d_out.rows(),
                                      {d_lse.data(), {pairs, heads}},
                                      {out.settled(), type, pairs * heads, value_width},
                                      {lse.settled(), {pairs, heads}}},
                                     g);
            });
  dq.agree(!hostile, bound.d_q());
  dk.agree(!hostile, bound.d_keys());
  dv.agree(!hostile, bound.d_values());
  db.agree(!hostile, bound.d_bias());
}

void fit_some(Bytes& in, bool hostile) {
  const int64_t width = in.between(1, 20), rows = in.between(1, 120);
  FitParams params;
  params.levels = static_cast<int>(in.between(1, 3));
  params.iterations = static_cast<int>(in.between(1, 4));
  params.seed = in.byte();
  int64_t total = 0;
  for (int l = 0; l < params.levels; ++l) total += params.sizes[l] = in.between(1, 20);
  auto xs = in.values(rows * width, hostile);
  for (int64_t d = 0; d < width; ++d)  // one usable row
    if (!(std::fabs(xs[test::size(d)]) < 1e6f)) xs[test::size(d)] = 1;
  Typed x(xs, kTypes[in.byte() % 3], width);
  Output<float> centers(total * width);
  Output<double> report(params.levels);
  Output<int64_t> counts(2 * params.levels + 2);
  each_crew([&](int workers) { return fit_workspace(test::sizing(workers), params, rows, width); },
            [&](const Context& context, int crew) {
              std::vector<Array<float, 2>> arrays;
              float* at = centers[crew];
              for (int l = 0; l < params.levels; at += params.sizes[l++] * width)
                arrays.push_back({at, {params.sizes[l], width}});
              FitReport r;
              const Status status = fit(context, params, x.rows(), arrays.data(), &r);
              for (int l = 0; l < params.levels; ++l) {
                report[crew][l] = r.error[l];
                counts[crew][l] = r.unused[l];
                counts[crew][params.levels + l] = r.iterations[l];
              }
              counts[crew][2 * params.levels] = r.rows;
              counts[crew][2 * params.levels + 1] = r.left_out;
              return status;
            });
  centers.equal();
  report.equal();
  counts.equal();
}

void run(Bytes in) {
  const uint8_t what = in.byte();
  const bool hostile = what & 1;
  if ((what & 24) == 24) return fit_some(in, hostile);
  if (what & 2) return attend_some(in, hostile);
  const Codes codes = encode_some(in, hostile);
  const Users u = users(in, codes.rows, in.flag());
  if (what & 4)
    vote_some(in, codes, u, hostile);
  else
    route_some(in, codes, u, hostile);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const simd::Kernels* have[simd::kMostTables + 1];
  int tables = simd::supported(have);
  have[tables++] = &test::amx_emulation();
  for (int i = 0; i < tables; ++i) {
    simd::choose(*have[i]);
    ledger.turn(i == 0);
    run(Bytes(data, size));
  }
  ledger = {};  // libFuzzer looks for leaks where memory stays
  return 0;
}
