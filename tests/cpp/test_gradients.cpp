// SPDX-License-Identifier: Apache-2.0
// route_backward, leaf_sums_backward and attend_backward give the gradients that hisac.reference says, within their
// bounds.
#include <doctest/doctest.h>

#include <cmath>

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
    const int64_t of_x = c.has("x_rows") ? c["x_rows"].count() : r.in.x_ids ? r.in.items() : t;
    const int64_t of_v = c.has("v_rows") ? c["v_rows"].count() : r.in.v_ids ? r.in.v.rows : t;
    Guarded<float> x(sized("x", of_x * width)), v(sized("v", of_v * r.in.v.width)), bias(t), spread(t),
        p(r.users * r.seats * width), tau(r.params.temperature.shape[0]);
    RouteGradients out{{}, {}, {bias.data(), {t}}, {spread.data(), {t}}, {}, {tau.data(), {tau.count()}}};
    out.prototypes = {p.data(), {r.users, r.seats, width}};
    if (x.count()) out.x = {x.data(), {of_x, width}};
    if (v.count()) out.v = {v.data(), {of_v, r.in.v.width}};
    if (c.has("x_rows")) out.x_rows = ids(c["x_rows"].longs.data(), of_x);
    if (c.has("v_rows")) out.v_rows = ids(c["v_rows"].longs.data(), of_v);
    RouteForward forward{{}, vectors::matrix(c, "lse"),   vectors::cube(c, "mean_x"),
                         {}, vectors::matrix(c, "d_lse"), {}};
    forward.d_mean_x = vectors::cube(c, "d_mean_x");
    const std::vector<float> unread(test::size(r.users * r.seats * width), NAN);  // without a gradient
    if (!c.has("mean_x")) forward.mean_x = {unread.data(), {r.users, r.seats, width}};
    if (c.has("tokens")) forward.tokens = c["tokens"].rows();
    if (c.has("d_tokens")) forward.d_tokens = c["d_tokens"].rows();
    const size_t bytes = route_backward_workspace(test::sizing(1), book, r.params, r.in, r.agents, forward, out);
    REQUIRE(test::exactly(bytes, nullptr, [&](const Context& context) {
      return route_backward(context, book, r.params, r.in, r.agents, forward, out);
    }));
    const std::pair<const char*, Guarded<float>*> all[] = {
        {"x", &x}, {"v", &v}, {"bias", &bias}, {"spread", &spread}, {"prototypes", &p}, {"temperature", &tau}};
    for (const auto& [name, gradient] : all) {
      CHECK(gradient->intact());
      if (gradient->count()) c.check_floats(std::string("grad ") + name, gradient->values());
    }
  }
}

TEST_CASE("leaf_sums_backward") {
  for (const Case& c : vectors::cases("leaf_sums_backward")) {
    const vectors::Routing r(c);
    const Codebook& book = *r.codebook;
    const std::vector<int64_t>& ends = c["sum offsets"].longs;
    const int64_t t = r.in.behaviours(), sums = ends.back();
    const auto of_sums = [&](const char* name) { return c[std::string("sum ") + name].rows(); };
    LeafSumsForward forward{{}, vectors::matrix(c, "d_x"), vectors::matrix(c, "d_v"), {}, {}};
    forward.sums = {of_sums("x"), of_sums("v"), test::spans(ends), {c["sum codes"].ints.data(), {sums, book.levels()}}};
    forward.sums.bias = vectors::vector(c, "sum bias");
    forward.sums.spread = vectors::vector(c, "sum spread");
    forward.d_bias = vectors::vector(c, "d_bias");
    forward.d_spread = vectors::vector(c, "d_spread");
    const int64_t of_v = r.in.v_ids ? r.in.v.rows : t;
    Guarded<float> v(of_v * r.in.v.width), bias(t);
    const LeafSumsGradients out{{v.data(), {of_v, r.in.v.width}}, {bias.data(), {t}}};
    const size_t bytes = leaf_sums_backward_workspace(test::sizing(1), book, r.in, out);
    REQUIRE(test::exactly(
        bytes, nullptr, [&](const Context& context) { return leaf_sums_backward(context, book, r.in, forward, out); }));
    CHECK((v.intact() && bias.intact()));
    c.check_floats("grad v", v.values());
    c.check_floats("grad bias", bias.values());
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
