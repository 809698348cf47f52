// SPDX-License-Identifier: Apache-2.0
// route_backward and attend_backward against central differences of the definition.
#include <doctest/doctest.h>

#include <functional>

#include "definition.h"
#include "support.h"

using namespace hisac;
using test::Random;
using test::uniform;

namespace {

using Doubles = std::vector<double>;

Doubles doubles(const std::vector<float>& a) { return {a.begin(), a.end()}; }

double dot(const std::vector<float>& a, const Doubles& b) {
  double total = 0;
  for (size_t i = 0; i < b.size(); ++i) total += double(a[i]) * b[i];
  return total;
}

/// Every entry of `got` is the slope of loss() in the same entry of `at`.
void check_slopes(const std::vector<float>& got, Doubles* at, const std::function<double()>& loss) {
  constexpr double kStep = 1e-5;
  for (size_t i = 0; i < at->size(); ++i) {
    CAPTURE(i);
    const double kept = (*at)[i];
    (*at)[i] = kept + kStep;
    const double above = loss();
    (*at)[i] = kept - kStep;
    const double below = loss();
    (*at)[i] = kept;
    CHECK(double(got[i]) == doctest::Approx((above - below) / (2 * kStep)).epsilon(1e-4).scale(1));
  }
}

std::vector<Doubles> split(const Doubles& flat, size_t width) {
  std::vector<Doubles> out;
  for (size_t i = 0; i < flat.size(); i += width)
    out.emplace_back(flat.begin() + static_cast<std::ptrdiff_t>(i),
                     flat.begin() + static_cast<std::ptrdiff_t>(i + width));
  return out;
}

}  // namespace

TEST_CASE("route_backward: v, temperature, bias, x and prototypes") {
  Random random(8);
  constexpr int64_t kRows = 40, kWidth = 3, kValues = 4, kAgents = 5;
  const auto x = uniform(random, kRows * kWidth), v = uniform(random, kRows * kValues), bias = uniform(random, kRows);
  const auto p = uniform(random, kAgents * kWidth), d_tokens = uniform(random, kAgents * kValues);
  const auto d_lse = uniform(random, kAgents);
  const std::vector<int64_t> offsets{0, kRows};
  for (Normalize normalize : {Normalize::history, Normalize::agents})
    for (bool each : {false, true}) {
      const std::vector<float> temperature =
          each ? std::vector<float>{.5f, .6f, .7f, .8f, .9f} : std::vector<float>{.6f};
      const int64_t taus = static_cast<int64_t>(temperature.size());
      const RouteParams params{normalize, Method::exact, Missing::drop, 0, {temperature.data(), {taus}}};
      const RouteInputs in{test::rows(x, kWidth),
                           test::rows(v, kValues),
                           test::histories(offsets),
                           {p.data(), {1, kAgents, kWidth}},
                           {},
                           {bias.data(), {kRows}},
                           {},
                           nullptr};
      std::vector<float> tokens(kAgents * kValues), lse(kAgents);
      REQUIRE(test::exactly(route_workspace(test::sizing(1), params, in, kRows), nullptr, [&](const Context& c) {
        return route(c, params, in,
                     {{tokens.data(), DType::float32, kAgents, kValues}, {lse.data(), {1, kAgents}}, {}});
      }));
      std::vector<float> dv(v.size()), dtau(temperature.size()), dbias(bias.size()), dx(x.size()), dp(p.size());
      const RouteGradients out{{dv.data(), {kRows, kValues}},
                               {dtau.data(), {taus}},
                               {dbias.data(), {kRows}},
                               {dx.data(), {kRows, kWidth}},
                               {dp.data(), {1, kAgents, kWidth}}};
      REQUIRE(test::exactly(route_backward_workspace(test::sizing(1), params, in, out, kRows), nullptr,
                            [&](const Context& c) {
                              return route_backward(c, params, in,
                                                    {test::rows(d_tokens, kValues),
                                                     {d_lse.data(), {1, kAgents}},
                                                     test::rows(tokens, kValues),
                                                     {lse.data(), {1, kAgents}}},
                                                    out);
                            }));
      Doubles dx_at = doubles(x), v_at = doubles(v), bias_at = doubles(bias), p_at = doubles(p),
              tau_at = doubles(temperature);
      const auto loss = [&] {
        definition::User user{split(dx_at, kWidth), split(v_at, kValues), bias_at,
                              Doubles(kRows),       split(p_at, kWidth),  each ? tau_at : Doubles(kAgents, tau_at[0])};
        const definition::Routed routed = definition::route(user, normalize, 0, kValues);
        Doubles flat;
        for (const Doubles& token : routed.tokens) flat.insert(flat.end(), token.begin(), token.end());
        return dot(d_tokens, flat) + dot(d_lse, routed.lse);
      };
      check_slopes(dv, &v_at, loss);
      check_slopes(dtau, &tau_at, loss);
      check_slopes(dbias, &bias_at, loss);
      check_slopes(dx, &dx_at, loss);
      check_slopes(dp, &p_at, loss);
    }
}

TEST_CASE("attend_backward: q, keys, values and bias") {
  Random random(9);
  constexpr int64_t kPairs = 6, kKey = 3, kValues = 4, kTokens = 5;
  const auto q = uniform(random, kPairs * kKey), keys = uniform(random, kTokens * kKey),
             values = uniform(random, kTokens * kValues), bias = uniform(random, kTokens),
             d_out = uniform(random, kPairs * kValues), d_lse = uniform(random, kPairs);
  const std::vector<int64_t> offsets{0, kPairs};
  const AttendInputs in{test::rows(q, kKey),
                        test::rows(keys, kKey),
                        test::rows(values, kValues),
                        kTokens,
                        1,
                        test::histories(offsets),
                        {bias.data(), {1, kTokens}},
                        .7f};
  std::vector<float> out(kPairs * kValues), lse(kPairs);
  REQUIRE(test::exactly(attend_workspace(test::sizing(1), in), nullptr, [&](const Context& c) {
    return attend(c, in, {{out.data(), DType::float32, kPairs, kValues}, {lse.data(), {kPairs, 1}}});
  }));
  std::vector<float> dq(q.size()), dk(keys.size()), dv(values.size()), db(bias.size());
  REQUIRE(test::exactly(attend_backward_workspace(test::sizing(1), in), nullptr, [&](const Context& c) {
    return attend_backward(
        c, in,
        {test::rows(d_out, kValues), {d_lse.data(), {kPairs, 1}}, test::rows(out, kValues), {lse.data(), {kPairs, 1}}},
        {{dq.data(), {kPairs, 1, kKey}},
         {dk.data(), {1, kTokens, 1, kKey}},
         {dv.data(), {1, kTokens, 1, kValues}},
         {db.data(), {1, kTokens}}});
  }));
  Doubles q_at = doubles(q), k_at = doubles(keys), v_at = doubles(values), b_at = doubles(bias);
  const auto loss = [&] {
    double total = 0;
    for (size_t n = 0; n < kPairs; ++n) {
      Doubles z, token(kValues);
      for (size_t m = 0; m < kTokens; ++m) {
        double logit = b_at[m];
        for (size_t d = 0; d < kKey; ++d) logit += double(.7f) * q_at[n * kKey + d] * k_at[m * kKey + d];
        z.push_back(logit);
      }
      double log_sum;
      definition::aggregate(z, split(v_at, kValues), &token, &log_sum);
      for (size_t d = 0; d < kValues; ++d) total += double(d_out[n * kValues + d]) * token[d];
      total += double(d_lse[n]) * log_sum;
    }
    return total;
  };
  check_slopes(dq, &q_at, loss);
  check_slopes(dk, &k_at, loss);
  check_slopes(dv, &v_at, loss);
  check_slopes(db, &b_at, loss);
}
