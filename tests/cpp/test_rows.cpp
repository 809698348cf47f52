// SPDX-License-Identifier: Apache-2.0
// Gathered inputs: the bits of rows copied out, forward and backward, whatever the type; ids outside; sums by id.
#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <string>

#include "support.h"

using namespace hisac;
using test::Guarded;
using test::Random;
using test::uniform;

namespace {

constexpr int64_t kRows = 2300, kItems = 37, kValues = 21, kWidth = 19, kWide = 11, kAgents = 9, kUsers = 3;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> drawn(uint64_t seed, int64_t n) {
  Random random(seed);
  return uniform(random, n);
}

/// The ids of behaviours whose rows are copied out.
struct Copied {
  const int64_t* x = nullptr;
  const int32_t* v = nullptr;
};

/// The gradient of a table, of those of its rows; without ids they are as they are.
template <class Id>
std::vector<float> in_table(const std::vector<float>& rows, const Id* ids, int64_t table, int64_t width) {
  if (!ids) return rows;
  std::vector<double> sum(test::size(table * width));
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t row = ids[i / test::size(width)];
    if (row >= 0 && row < table) sum[test::size(row * width) + i % test::size(width)] += double(rows[i]);
  }
  std::vector<float> rounded;
  for (double d : sum) rounded.push_back(static_cast<float>(d));
  return rounded;
}

/// Everything that route and its backward return, in order.
std::vector<float> routed(const Codebook& book, const RouteParams& params, const Histories& in,
                          const RouteAgents& agents, bool has_mean_x, const Copied& copied) {
  const int64_t t = in.behaviours(), m = kAgents, of_x = in.x.rows, of_v = in.v.rows;
  Guarded<float> tokens(kUsers * m * kWide), lse(kUsers * m), mean_x(kUsers * m * kWidth), dv(of_v * kWide), dbias(t),
      dspread(t), dx(of_x * kWidth), dp(kUsers * m * kWidth), dtau(1);
  const auto d_mean_x = drawn(13, kUsers * m * kWidth);
  Tokens out{{tokens.data(), DType::float32, kUsers * m, kWide}, {lse.data(), {kUsers, m}}};
  if (has_mean_x) out.mean_x = {mean_x.data(), {kUsers, m, kWidth}};
  REQUIRE(test::exactly(route_workspace(test::sizing(1), &book, params, in, agents, out), nullptr,
                        [&](const Context& c) { return route(c, &book, params, in, agents, out); }));
  const Rows given{tokens.data(), DType::float32, kUsers * m, kWide};
  RouteForward forward{given, {lse.data(), {kUsers, m}}, {}, given, {}, {}};
  RouteGradients gradients{{},
                           {dv.data(), {of_v, kWide}},
                           {dbias.data(), {t}},
                           {dspread.data(), {t}},
                           {dp.data(), {kUsers, m, kWidth}},
                           {dtau.data(), {1}}};
  if (has_mean_x) forward.mean_x = {mean_x.data(), {kUsers, m, kWidth}};
  if (has_mean_x) forward.d_mean_x = {d_mean_x.data(), {kUsers, m, kWidth}};
  if (!has_mean_x) gradients.x = {dx.data(), {of_x, kWidth}};
  REQUIRE(test::exactly(
      route_backward_workspace(test::sizing(1), &book, params, in, agents, forward, gradients), nullptr,
      [&](const Context& c) { return route_backward(c, &book, params, in, agents, forward, gradients); }));
  std::vector<float> all;
  for (Guarded<float>* one : {&tokens, &lse, &mean_x, &dbias, &dspread, &dp, &dtau}) {
    CHECK(one->intact());
    if (has_mean_x || one != &mean_x)
      for (float f : one->values()) all.push_back(f);
  }
  CHECK((dv.intact() && dx.intact()));
  for (float f : in_table(dv.values(), copied.v, kValues, kWide)) all.push_back(f);
  if (has_mean_x) return all;
  for (float f : in_table(dx.values(), copied.x, kItems, kWidth)) all.push_back(f);
  return all;
}

/// Everything that leaf_sums, its backward and missing return, in order.
std::vector<float> summed(const Codebook& book, const Histories& in, const Copied& copied) {
  const int64_t t = in.behaviours(), of_v = in.v.rows;
  int64_t most = 0;
  for (int64_t b = 0; b < kUsers; ++b) most += in.offsets.end(b) - in.offsets.start(b);
  Guarded<float> x(most * kWidth), v(most * kWide), bias(most), spread(most), dv(of_v * kWide), dbias(t), absent(t);
  Guarded<int64_t> offsets(kUsers + 1), votes(most);
  Guarded<int32_t> codes(most * 2);
  const LeafSums sums{
      {x.data(), {most, kWidth}}, {v.data(), {most, kWide}}, {offsets.data(), offsets.data() + 1, kUsers},
      {codes.data(), {most, 2}},  {bias.data(), {most}},     {spread.data(), {most}},
      {votes.data(), {most}}};
  REQUIRE(test::exactly(leaf_sums_workspace(test::sizing(1), book, in), nullptr,
                        [&](const Context& c) { return leaf_sums(c, book, in, sums); }));
  const auto d = drawn(14, most * kWidth);
  const LeafSumsForward forward{sums.histories(),
                                {d.data(), {most, kWidth}},
                                {d.data() + 1, {most, kWide}},
                                {d.data() + 2, {most}},
                                {d.data() + 3, {most}}};
  const LeafSumsGradients gradients{{dv.data(), {of_v, kWide}}, {dbias.data(), {t}}};
  REQUIRE(test::exactly(leaf_sums_backward_workspace(test::sizing(1), book, in, gradients), nullptr,
                        [&](const Context& c) { return leaf_sums_backward(c, book, in, forward, gradients); }));
  REQUIRE(test::exactly(missing_workspace(test::sizing(1), &book, in), nullptr,
                        [&](const Context& c) { return missing(c, &book, in, {absent.data(), {t}}); }));
  std::vector<float> all;
  const int64_t n = offsets.data()[kUsers];
  for (int64_t end : offsets.values()) all.push_back(static_cast<float>(end));
  for (int64_t i = 0; i < n * 2; ++i) all.push_back(static_cast<float>(codes.data()[i]));
  for (int64_t i = 0; i < n; ++i) all.push_back(static_cast<float>(votes.data()[i]));
  const std::pair<Guarded<float>*, int64_t> outputs[] = {{&x, n * kWidth}, {&v, n * kWide}, {&bias, n},
                                                         {&spread, n},     {&dbias, t},     {&absent, t}};
  for (const auto& [one, count] : outputs) {
    CHECK(one->intact());
    CHECK(std::any_of(one->data(), one->data() + count, [](float f) { return f != 0; }));
    all.insert(all.end(), one->data(), one->data() + count);
  }
  CHECK(dv.intact());
  for (float f : in_table(dv.values(), copied.v, kValues, kWide)) all.push_back(f);
  CHECK(all.back() != 0);
  CHECK(std::count(absent.data(), absent.data() + t, 0.f) > 0);
  return all;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

TEST_CASE("gathered rows give the bits of copied ones") {
  Random random(11);
  const auto items = uniform(random, kItems * kWidth), values = uniform(random, kValues * kWide);
  const auto scale = uniform(random, kItems, 0.02f), p = uniform(random, kUsers * kAgents * kWidth);
  std::vector<int8_t> bytes(kItems * kWidth);
  for (int8_t& b : bytes) b = static_cast<int8_t>(random.below(256) - 128);
  std::vector<int64_t> x_ids(kRows);
  std::vector<int32_t> v_ids(kRows);
  for (size_t i = 0; i < kRows; ++i) {
    x_ids[i] = i % 50 ? random.below(kItems) : i % 100 ? kItems : std::numeric_limits<int64_t>::min();
    v_ids[i] = static_cast<int32_t>(i % 70 ? random.below(kValues) : i % 140 ? -1 : 1 << 30);
  }
  const Codebook book = test::codebook(random, {4, 3}, kWidth);
  std::vector<int32_t> codes(kItems * 2), row_codes(kRows * 2, -1);
  for (int32_t& c : codes) c = static_cast<int32_t>(random.below(3));
  const std::vector<int64_t> starts{0, 2100, 500}, ends{2100, 2300, 2200};  // overlapping
  const std::vector<float> temperature{3};

  for (int type : {0, 1, 2})  // float32, int8 with a scale a row, int8 with one scale
    for (Normalize normalize : {Normalize::history, Normalize::agents})
      for (bool mean_x : {false, true}) {
        CAPTURE(type);
        CAPTURE(mean_x);
        std::vector<float> x(kRows * kWidth, kNan), v(kRows * kWide, kNan), bias(kRows);
        for (size_t i = 0; i < kRows; ++i) {
          const int64_t a = x_ids[i], b = v_ids[i];
          for (int64_t l = 0; a >= 0 && a < kItems && l < 2; ++l)
            row_codes[i * 2 + test::size(l)] = codes[test::size(a * 2 + l)];
          if (a < 0 || a >= kItems || b < 0 || b >= kValues) bias[i] = kNan;
          for (int64_t d = 0; a >= 0 && a < kItems && d < kWidth; ++d) {
            const size_t at = test::size(a * kWidth + d);
            x[i * kWidth + test::size(d)] =
                type == 0 ? items[at] : static_cast<float>(bytes[at]) * scale[type == 1 ? test::size(a) : 0];
          }
          for (int64_t d = 0; b >= 0 && b < kValues && d < kWide; ++d)
            v[i * kWide + test::size(d)] = values[test::size(b * kWide + d)];
        }
        RouteParams params;
        params.normalize = normalize;
        params.temperature = {temperature.data(), {1}};
        Histories in;
        in.x = test::rows(x, kWidth);
        in.v = test::rows(v, kWide);
        in.offsets = {starts.data(), ends.data(), DType::int64, kUsers};
        in.codes = {row_codes.data(), {kRows, 2}};
        in.bias = {bias.data(), {kRows}};
        const RouteAgents agents{{p.data(), {kUsers, kAgents, kWidth}}, {}};
        const Copied ids{x_ids.data(), v_ids.data()};
        const auto copied = routed(book, params, in, agents, mean_x, ids), copied_sums = summed(book, in, ids);
        const std::vector<float> none(kRows);
        in.bias = {none.data(), {kRows}};
        in.x = {type ? static_cast<const void*>(bytes.data()) : items.data(), type ? DType::int8 : DType::float32,
                kItems, kWidth};
        in.v = test::rows(values, kWide);
        in.x_ids = {x_ids.data(), DType::int64, kRows};
        in.v_ids = {v_ids.data(), DType::int32, kRows};
        in.codes = {codes.data(), {kItems, 2}};
        if (type) in.x_scale = {scale.data(), {type == 1 ? kItems : 1}};
        CHECK(same(routed(book, params, in, agents, mean_x, {}), copied));
        CHECK(same(summed(book, in, {}), copied_sums));
      }
}
