// SPDX-License-Identifier: Apache-2.0
// Gathered inputs: the bits of rows copied out, forward and backward, whatever the type; ids outside; sums by id.
#include <doctest/doctest.h>

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

/// Everything that a forward and its backward return, in order.
std::vector<float> run(const Codebook& book, const RouteParams& params, const Histories& in,
                       const RouteAgents& agents) {
  const int64_t t = in.behaviours(), m = kAgents + (params.missing == Missing::token);
  Guarded<float> tokens(kUsers * m * kWide), lse(kUsers * m), dv(t * kWide), dx(t * kWidth), dtau(1);
  REQUIRE(test::exactly(route_workspace(test::sizing(1), &book, params, in, agents, t), nullptr, [&](const Context& c) {
    return route(c, &book, params, in, agents,
                 {{tokens.data(), DType::float32, kUsers * m, kWide}, {lse.data(), {kUsers, m}}, {}});
  }));
  RouteGradients gradients{{dv.data(), {t, kWide}}, {dtau.data(), {1}}, {}, {}, {}};
  if (params.method == Method::exact) gradients.x = {dx.data(), {t, kWidth}};
  const Rows given{tokens.data(), DType::float32, kUsers * m, kWide};
  REQUIRE(test::exactly(route_backward_workspace(test::sizing(1), &book, params, in, agents, gradients, t), nullptr,
                        [&](const Context& c) {
                          return route_backward(c, &book, params, in, agents,
                                                {given, {}, given, {lse.data(), {kUsers, m}}}, gradients);
                        }));
  std::vector<float> all;
  for (Guarded<float>* out : {&tokens, &lse, &dv, &dx, &dtau}) {
    CHECK(out->intact());
    if (out == &dx && params.method == Method::leaf) continue;
    for (float f : out->values()) all.push_back(f);
  }
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
      for (Method method : {Method::exact, Method::leaf}) {
        CAPTURE(type);
        CAPTURE(static_cast<int>(method));
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
        params.method = method;
        params.missing = Missing::token;
        params.temperature = {temperature.data(), {1}};
        Histories in;
        in.x = test::rows(x, kWidth);
        in.v = test::rows(v, kWide);
        in.offsets = {starts.data(), ends.data(), DType::int64, kUsers};
        in.codes = {row_codes.data(), {kRows, 2}};
        in.bias = {bias.data(), {kRows}};
        const RouteAgents agents{{p.data(), {kUsers, kAgents, kWidth}}, {}};
        const auto copied = run(book, params, in, agents);
        const std::vector<float> none(kRows);
        in.bias = {none.data(), {kRows}};
        in.x = {type ? static_cast<const void*>(bytes.data()) : items.data(), type ? DType::int8 : DType::float32,
                kItems, kWidth};
        in.v = test::rows(values, kWide);
        in.x_ids = {x_ids.data(), DType::int64, kRows};
        in.v_ids = {v_ids.data(), DType::int32, kRows};
        in.codes = {codes.data(), {kItems, 2}};
        if (type) in.x_scale = {scale.data(), {type == 1 ? kItems : 1}};
        CHECK(same(run(book, params, in, agents), copied));
      }
}

TEST_CASE("sum_rows: sums of groups in float64, whatever the order and the workers") {
  Random random(12);
  const auto rows = uniform(random, 900 * 130);
  std::vector<int64_t> order(5000);
  for (int64_t& i : order) i = random.below(902) - 1;  // -1 and 900 are no rows
  const std::vector<int64_t> begin{0, 4000, 4000, 4001, 5000};
  Guarded<float> sums(4 * 130);
  const auto sum = [&](const Executor* executor, int64_t groups, int64_t width) {
    return sum_rows(Context{{}, executor}, {rows.data(), {900, 130}}, {order.data(), {5000}}, {begin.data(), {5}},
                    {sums.data(), {groups, width}});
  };
  test::Threads three{3};
  const Executor executor = three.executor();
  for (const Executor* e : {static_cast<const Executor*>(nullptr), &executor}) {
    REQUIRE(sum(e, 4, 130).ok());
    CHECK(sums.intact());
    for (size_t g = 0; g < 4; ++g)
      for (size_t d = 0; d < 130; ++d) {
        double exact = 0;
        for (int64_t i = begin[g]; i < begin[g + 1]; ++i)
          if (const int64_t row = order[test::size(i)]; row >= 0 && row < 900)
            exact += double(rows[test::size(row * 130) + d]);
        CHECK(sums.data()[g * 130 + d] == static_cast<float>(exact));
      }
  }
  CHECK(std::string(sum(nullptr, 3, 130).what()) == "sum_rows: begin expected [4], got [5]");
  CHECK(std::string(sum(nullptr, 4, 129).what()) ==
        "sum_rows: rows is [900, 130], sums is [4, 129]: V differs (130, 129)");
}
