// SPDX-License-Identifier: Apache-2.0
// Whole verbs on the AMX emulation (amx_dispatch.cpp). In bfloat16, route's tokens are those of the rounded inputs'
// definition to bfloat16's precision; in bf16x3 those of the inputs' definition to nearly float32's. The bits are the
// same for every executor.
#include <doctest/doctest.h>

#include <string>

#include "definition.h"
#include "support.h"

using namespace hisac;
using test::Guarded;
using test::Random;
using test::uniform;

namespace {

std::vector<float> rounded(std::vector<float> values) {
  for (float& x : values) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    std::memcpy(&x, &bits, 4);
  }
  return values;
}

}  // namespace

TEST_CASE("route on emulated AMX tiles, in bfloat16 and in bf16x3") {
  REQUIRE(std::string(active_isa()) == "amx-emulation");
  Random random(6);
  constexpr int64_t kRows = 2300, kWidth = 70, kValues = 9, kAgents = 61, kUsers = 4;
  const auto x = uniform(random, kRows * kWidth), v = uniform(random, kRows * kValues), bias = uniform(random, kRows);
  const auto p = uniform(random, kUsers * kAgents * kWidth);
  const std::vector<int64_t> offsets{0, 2100, 2100, 2101, 2300};
  const std::vector<float> temperature{3};
  const auto rounded_x = rounded(x), rounded_p = rounded(p);
  for (int manner_of = 0; manner_of < 4; ++manner_of) {
    const Normalize normalize = manner_of % 2 ? Normalize::agents : Normalize::history;
    const bool bf16x3 = manner_of >= 2;
    const auto &near_x = bf16x3 ? x : rounded_x, &near_p = bf16x3 ? p : rounded_p;
    // of bf16x3: twice a product's 2^-15 of at most D, over tau; the weights' and v's own 2^-15
    const double e = bf16x3 ? 2 * 0x1.1p-15 * kWidth / 3 + 0x1p-14 : 0;
    double squares = 0, errors = 0;
    RouteParams params;
    params.normalize = normalize;
    params.precision = bf16x3 ? Precision::float32 : Precision::bfloat16;
    params.temperature = {temperature.data(), {1}};
    RouteInputs in;
    in.x = test::rows(x, kWidth);
    in.v = test::rows(v, kValues);
    in.histories = test::histories(offsets);
    in.prototypes = {p.data(), {kUsers, kAgents, kWidth}};
    in.bias = {bias.data(), {kRows}};
    Guarded<float> tokens(kUsers * kAgents * kValues), lse(kUsers * kAgents), again(kUsers * kAgents * kValues);
    const auto run = [&](const Context& c, Guarded<float>& out) {
      return route(c, params, in,
                   {{out.data(), DType::float32, kUsers * kAgents, kValues}, {lse.data(), {kUsers, kAgents}}, {}});
    };
    const test::Backwards manner{3, 1};
    const Executor three = const_cast<test::Backwards&>(manner).executor();
    REQUIRE(test::exactly(route_workspace(test::sizing(3), params, in, kRows), &three,
                          [&](const Context& c) { return run(c, again); }));
    REQUIRE(test::exactly(route_workspace(test::sizing(1), params, in, kRows), nullptr,
                          [&](const Context& c) { return run(c, tokens); }));
    CHECK((tokens.intact() && lse.intact() && again.intact()));
    CHECK(tokens.values() == again.values());
    for (int64_t b = 0; b < kUsers; ++b) {
      definition::User user;
      for (int64_t i = offsets[test::size(b)]; i < offsets[test::size(b + 1)]; ++i) {
        const float *const xi = near_x.data() + i * kWidth, *const vi = v.data() + i * kValues;
        user.x.push_back({xi, xi + kWidth});
        user.v.push_back({vi, vi + kValues});
        user.bias.push_back(double(bias[test::size(i)]));
        user.spread.push_back(0);
      }
      for (int64_t a = 0; a < kAgents; ++a) {
        const float* const pa = near_p.data() + (b * kAgents + a) * kWidth;
        user.p.push_back({pa, pa + kWidth});
        user.tau.push_back(3);
      }
      const definition::Routed expected = definition::route(user, normalize, 0, kValues);
      for (int64_t a = 0; a < kAgents; ++a) {
        const double sum = double(lse.data()[b * kAgents + a]), exact = expected.lse[test::size(a)];
        CAPTURE(b);
        CAPTURE(a);
        if (user.x.empty())
          CHECK(std::isinf(sum));
        else
          CHECK(std::fabs(sum - exact) <= (bf16x3 ? 2 * e : 0x1.04p-8));  // each weight is rounded: 2^-8 of itself
        for (int64_t d = 0; d < kValues; ++d) {                           // |v| <= 1, apart by at most 2
          const double token = expected.tokens[test::size(a)][test::size(d)];
          const double apart = double(tokens.data()[(b * kAgents + a) * kValues + d]) - token;
          CHECK(std::fabs(apart) <= (bf16x3 ? 4 * e : 0x1p-7 + 0x1p-9));
          squares += token * token;
          errors += apart * apart;
        }
      }
    }
    CHECK(std::sqrt(errors / squares) <= (bf16x3 ? 2e-5 : 1e-2));
  }
}
