// SPDX-License-Identifier: Apache-2.0
// Whole verbs on the AMX emulation (amx_dispatch.cpp). In bfloat16, where inputs are bfloat16's values, route's tokens
// are the reference's to bfloat16's precision; in bf16x3 to nearly float32's. The bits are the same for every executor.
#include <doctest/doctest.h>

#include "support.h"
#include "vectors.h"

using namespace hisac;
using test::Guarded;

TEST_CASE("route on emulated AMX tiles, in bfloat16 and in bf16x3") {
  REQUIRE(std::string(active_isa()) == "amx-emulation");
  for (const vectors::Case& c : vectors::cases("amx")) {
    CAPTURE(c.name());
    const vectors::Routing r(c);
    const Histories& in = r.in;
    const Codebook* const book = r.codebook.get();
    const int64_t rows = r.users * r.seats, width = in.x.width, longest = vectors::longest(c);
    const double tau = double(r.params.temperature.data[0]);
    const bool bf16x3 = r.params.precision == Precision::float32;
    // of bf16x3: twice a product's 2^-15 of at most D, over tau; the weights' and v's own 2^-15
    const double e = bf16x3 ? 2 * 0x1.1p-15 * double(width) / tau + 0x1p-14 : 0;
    Guarded<float> tokens(rows * in.v.width), lse(rows), again(rows * in.v.width);
    const auto run = [&](const Context& context, Guarded<float>& out) {
      return route(context, book, r.params, in, r.agents,
                   {{out.data(), DType::float32, rows, in.v.width}, {lse.data(), {r.users, r.seats}}, {}});
    };
    test::Backwards manner{3, 1};
    const Executor three = manner.executor();
    REQUIRE(test::exactly(route_workspace(test::sizing(3), book, r.params, in, r.agents, longest), &three,
                          [&](const Context& context) { return run(context, again); }));
    REQUIRE(test::exactly(route_workspace(test::sizing(1), book, r.params, in, r.agents, longest), nullptr,
                          [&](const Context& context) { return run(context, tokens); }));
    CHECK((tokens.intact() && lse.intact() && again.intact()));
    CHECK(tokens.values() == again.values());
    c.check_floats("tokens", tokens.values());
    c.check_floats("lse", lse.values());
    // closer than the bounds, as |v| <= 1, and much closer on the whole
    double squares = 0, errors = 0;
    c.each("lse", lse.values(), [&](float sum, float exact) {  // each weight is rounded: 2^-8 of itself
      if (std::isfinite(exact)) CHECK(std::fabs(double(sum) - double(exact)) <= (bf16x3 ? 2 * e : 0x1.04p-8));
    });
    c.each("tokens", tokens.values(), [&](float token, float exact) {
      const double apart = double(token) - double(exact);
      CHECK(std::fabs(apart) <= (bf16x3 ? 4 * e : 0x1p-7 + 0x1p-9));
      squares += double(exact) * double(exact);
      errors += apart * apart;
    });
    CHECK(squares > 0);
    CHECK(std::sqrt(errors / squares) <= (bf16x3 ? 2e-5 : 1e-2));
  }
}
