// SPDX-License-Identifier: Apache-2.0
// route_backward and attend_backward give the gradients that hisac.reference says, within their bounds.
#include <doctest/doctest.h>

#include "support.h"
#include "vectors.h"

using namespace hisac;
using test::Guarded;
using vectors::Case;

TEST_CASE("route_backward") {
  for (const Case& c : vectors::cases("route_backward")) {
    const vectors::Routing r(c);
    const Codebook* const book = r.codebook.get();
    const int64_t t = r.in.behaviours(), width = r.agents.prototypes.shape[2];
    const auto sized = [&](const char* name, int64_t n) { return c.has(std::string("grad ") + name) ? n : 0; };
    Guarded<float> v(sized("v", t * r.in.v.width)), tau(sized("temperature", r.params.temperature.shape[0])),
        bias(sized("bias", t)), x(sized("x", t * width)), p(sized("prototypes", r.users * r.seats * width));
    RouteGradients out{{v.data(), {t, r.in.v.width}}, {tau.data(), {tau.count()}}, {}, {}, {}};
    if (bias.count()) out.bias = {bias.data(), {t}};
    if (x.count()) out.x = {x.data(), {t, width}};
    if (p.count()) out.prototypes = {p.data(), {r.users, r.seats, width}};
    const Array<const float, 2> lse{c["lse"].floats.data(), {r.users, r.tokens}},
        d_lse{c["d_lse"].floats.data(), {r.users, r.tokens}};
    REQUIRE(test::exactly(
        route_backward_workspace(test::sizing(1), book, r.params, r.in, r.agents, out, vectors::longest(c)), nullptr,
        [&](const Context& context) {
          return route_backward(context, book, r.params, r.in, r.agents,
                                {c["d_tokens"].rows(), d_lse, c["tokens"].rows(), lse}, out);
        }));
    const std::pair<const char*, Guarded<float>*> all[] = {
        {"v", &v}, {"temperature", &tau}, {"bias", &bias}, {"x", &x}, {"prototypes", &p}};
    for (const auto& [name, gradient] : all) {
      CHECK(gradient->intact());
      if (gradient->count()) c.check_floats(std::string("grad ") + name, gradient->values());
    }
  }
}

TEST_CASE("attend_backward") {
  int64_t tried = 0;
  for (const Case& c : vectors::cases("attend")) {
    if (!c.has("d_out")) continue;
    ++tried;
    const vectors::Attention a(c);
    const AttendInputs& in = a.in;
    const int64_t users = in.candidates.users, m = in.agents, h = in.heads, key = in.q.width, wide = in.values.width;
    Guarded<float> q(a.pairs * h * key), keys(users * m * h * key), values(users * m * h * wide), bias(users * m);
    const Array<const float, 2> lse{c["given lse"].floats.data(), {a.pairs, h}},
        d_lse{c["d_lse"].floats.data(), {a.pairs, h}};
    REQUIRE(test::exactly(attend_backward_workspace(test::sizing(1), in), nullptr, [&](const Context& context) {
      return attend_backward(context, in, {c["d_out"].rows(), d_lse, c["given out"].rows(), lse},
                             {{q.data(), {a.pairs, h, key}},
                              {keys.data(), {users, m, h, key}},
                              {values.data(), {users, m, h, wide}},
                              {bias.data(), {users, m}}});
    }));
    const std::pair<const char*, Guarded<float>*> all[] = {
        {"q", &q}, {"keys", &keys}, {"values", &values}, {"bias", &bias}};
    for (const auto& [name, gradient] : all) {
      CHECK(gradient->intact());
      c.check_floats(std::string("grad ") + name, gradient->values());
    }
  }
  CHECK(tried == 2);
}
