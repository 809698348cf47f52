// SPDX-License-Identifier: Apache-2.0
// Small shapes and hostile floats through every verb, in exact-size memory, under every instruction set that this
// processor has and on the AMX emulation. No crash; encode, vote and missing keep their laws (laws.h); one worker, two
// and seven give the same bits; integers and codebooks are the same for all sets; and where inputs are tame, nothing is
// NaN and the sets agree (tolerance.h).
#include "fuzz_verbs.h"

#include "amx_table.h"
#include "cpu/simd/kernels.h"
#include "laws.h"
#include "tolerance.h"

using namespace hisac;
using fuzz::Bytes;
using fuzz::Codes;
using fuzz::each_crew;
using fuzz::kTypes;
using fuzz::ledger;
using fuzz::Output;
using fuzz::SomeIds;
using fuzz::SomeWeights;
using fuzz::Typed;
using fuzz::Users;
using test::Guarded;

namespace {

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

void vote_some(Bytes& in, const Codes& c, Users u, bool hostile) {
  VoteParams params;
  const int64_t rule = in.between(0, 2);
  if (rule == 0) params.budget = in.between(1, 60);
  for (int64_t l = 0; rule && l < c.levels; ++l)
    (rule == 1 ? params.fanout : params.beam)[l] = in.between(1, rule == 1 ? 5 : 30);
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
  SomeWeights weights(in, rows, hostile);
  const bool by_id = in.flag();
  const int64_t items = by_id ? in.between(0, rows) : rows;
  Guarded<int32_t> given(std::vector<int32_t>(codes.begin(), codes.begin() + items * c.levels));
  SomeIds some(in, by_id ? rows : 0, items);
  const int64_t n = static_cast<int64_t>(u.starts.size()), m = seats(params, static_cast<int>(c.levels));
  Output<int32_t> agents(n * m * c.levels), count(n);
  Output<int64_t> votes(n * m);
  Histories histories;
  histories.offsets = u.spans();
  histories.codes = {given.data(), {items, c.levels}};
  if (by_id) histories.x_ids = some.ids();
  histories.weights = weights.weights();
  each_crew([&](int workers) { return vote_workspace(test::sizing(workers), c.book, params, histories); },
            [&](const Context& context, int crew) {
              return vote(context, c.book, params, histories,
                          {{agents[crew], {n, m, c.levels}}, {votes[crew], {n, m}}, {count[crew], {n}}});
            });
  agents.equal();
  votes.equal();
  count.equal();
  codes = laws::codes_of(histories);
  for (int64_t b = 0; ledger.first() && b < n; ++b) {
    laws::Tree tree(c.book, codes, histories.weights, u.starts[test::size(b)], u.ends[test::size(b)]);
    tree.seat(agents[0] + b * m * c.levels, votes[0] + b * m, count[0][b]);
    if (params.budget)
      tree.fair(params.budget);
    else
      rule == 1 ? tree.fullest(params.fanout) : tree.foremost(params.beam);
  }
  if (!ledger.first()) return;
  // the leaf sums of these histories, whose x are the prototypes of their codes, vote as they do
  const int64_t most = u.rows(), width = c.book.width();
  Guarded<float> x(most * width), bias(most), spread(most);
  Guarded<int64_t> offsets(n + 1), sum_votes(most);
  Guarded<int32_t> sum_codes(most * c.levels);
  const LeafSums sums{{x.data(), {most, width}},
                      {nullptr, {most, 0}},
                      {offsets.data(), offsets.data() + 1, n},
                      {sum_codes.data(), {most, c.levels}},
                      {bias.data(), {most}},
                      {spread.data(), {most}},
                      {sum_votes.data(), {most}}};
  CHECK(test::exactly(leaf_sums_workspace(test::sizing(1), c.book, histories), nullptr,
                      [&](const Context& context) { return leaf_sums(context, c.book, histories, sums); }));
  CHECK(fuzz::Voted(c.book, params, sums.histories()) == fuzz::Voted(c.book, params, histories));
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
  const bool ragged = in.flag();
  const int64_t groups = ragged ? 1 : n, each = ragged ? n * tokens : tokens;
  Users of_tokens;
  for (int64_t at = 0; ragged && n > static_cast<int64_t>(of_tokens.starts.size());) {
    of_tokens.starts.push_back(at = std::min(each, at + in.byte() % 2));
    of_tokens.ends.push_back(at = std::min(each, at + in.byte() % (tokens + 1)));
  }
  AttendInputs inputs{q.rows(), keys.rows(), values.rows(), tokens, heads, u.spans(), {}, in.value(false)};
  if (ragged) inputs.tokens = of_tokens.spans();
  if (ragged && in.flag()) inputs.agents = 0;
  if (in.flag()) inputs.bias = {bias.data(), {groups, each}};
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
                                {dk[crew], {groups, each, heads, key}},
                                {dv[crew], {groups, each, heads, value_width}},
                                {}};
              if (inputs.bias) g.bias = {db[crew], {groups, each}};
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

Status fit_in_chunks(const Context& context, const FitParams& params, Rows x, int64_t most,
                     const Array<float, 2>* centers, FitReport* report) {
  FitStep step;
  Status status = fit_begin(context, params, x.rows, x.width, centers, report, &step);
  while (status.ok() && !step.done) {
    for (int64_t first = 0; status.ok() && step.reads && first < x.rows; first += most) {
      const auto* const data = static_cast<const std::byte*>(x.data) + first * x.width * bytes_of(x.dtype);
      status = fit_add(context, &step, {data, x.dtype, std::min(most, x.rows - first), x.width});
    }
    if (status.ok()) status = fit_next(context, &step);
  }
  return status;
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
  auto weights = in.values(rows, hostile);
  weights[0] = 1;
  if (in.flag()) params.weights = {weights.data(), {rows}};
  std::vector<float> first(test::size(total * width), 0.25f);
  std::vector<Array<const float, 2>> init;
  const bool warm = in.flag();
  for (int l = 0; l < params.levels; ++l) init.push_back({first.data(), {params.sizes[l], width}});
  if (warm) params.init = init.data();
  const int64_t chunk = in.between(1, 120);  // of every crew but the first
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
              const Status status = crew ? fit_in_chunks(context, params, x.rows(), chunk, arrays.data(), &r)
                                         : fit(context, params, x.rows(), arrays.data(), &r);
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
  if ((what & 56) == 16) return fuzz::match_some(in, hostile);
  if (what & 2) return attend_some(in, hostile);
  const Codes codes = encode_some(in, hostile);
  const Users u = users(in, codes.rows, in.flag());
  if (what & 4)
    vote_some(in, codes, u, hostile);
  else
    fuzz::route_some(in, codes, u, hostile);
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
