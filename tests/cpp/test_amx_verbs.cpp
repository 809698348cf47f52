// SPDX-License-Identifier: Apache-2.0
// Whole verbs on the AMX emulation (amx_dispatch.cpp). In bfloat16, where inputs are bfloat16's values, tokens and
// means of x are the reference's to bfloat16's precision; in bf16x3 to nearly float32's. The bits are the same for
// every executor.
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
    const int64_t rows = r.users * r.seats, width = in.x.width;
    const double tau = double(r.params.temperature.data[0]);
    const bool bf16x3 = r.params.precision == Precision::float32;
    // of bf16x3: twice a product's 2^-15 of at most D, over tau; the weights' and v's own 2^-15
    const double e = bf16x3 ? 2 * 0x1.1p-15 * double(width) / tau + 0x1p-14 : 0;
    Guarded<float> tokens(rows * in.v.width), lse(rows), mean_x(rows * width), again(rows * in.v.width),
        mean_again(rows * width);
    const auto run = [&](int workers, const Executor* executor, Guarded<float>& to, Guarded<float>& mean) {
      const Tokens out{{to.data(), DType::float32, rows, in.v.width},
                       {lse.data(), {r.users, r.seats}},
                       {mean.data(), {r.users, r.seats, width}}};
      const size_t bytes = route_workspace(test::sizing(workers), book, r.params, in, r.agents, out);
      return test::exactly(bytes, executor,
                           [&](const Context& context) { return route(context, book, r.params, in, r.agents, out); });
    };
    test::Backwards manner{3, 1};
    const Executor three = manner.executor();
    REQUIRE(run(3, &three, again, mean_again));
    REQUIRE(run(1, nullptr, tokens, mean_x));
    CHECK((tokens.intact() && lse.intact() && again.intact() && mean_x.intact() && mean_again.intact()));
    CHECK(tokens.values() == again.values());
    CHECK(mean_x.values() == mean_again.values());
    c.check_floats("tokens", tokens.values());
    c.check_floats("lse", lse.values());
    c.check_floats("mean_x", mean_x.values());
    // closer than the bounds, as |v| <= 1 and each |x| <= 1, and much closer on the whole
    c.each("lse", lse.values(), [&](float sum, float exact) {  // each weight is rounded: 2^-8 of itself
      if (std::isfinite(exact)) CHECK(std::fabs(double(sum) - double(exact)) <= (bf16x3 ? 2 * e : 0x1.04p-8));
    });
    for (const auto& [name, means] : {std::pair{"tokens", &tokens}, std::pair{"mean_x", &mean_x}}) {
      double squares = 0, errors = 0;
      c.each(name, means->values(), [&](float mean, float exact) {
        const double apart = double(mean) - double(exact);
        CHECK(std::fabs(apart) <= (bf16x3 ? 4 * e : 0x1p-7 + 0x1p-9));
        squares += double(exact) * double(exact);
        errors += apart * apart;
      });
      CHECK(squares > 0);
      CHECK(std::sqrt(errors / squares) <= (bf16x3 ? 2e-5 : 1e-2));
    }
  }
}
