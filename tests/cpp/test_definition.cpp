// SPDX-License-Identifier: Apache-2.0
// encode, vote, route and attend give what hisac.reference says: integers exactly, floats within their bounds.
#include <doctest/doctest.h>

#include "support.h"
#include "vectors.h"

using namespace hisac;
using test::Guarded;
using vectors::Case;

TEST_CASE("encode") {
  for (const Case& c : vectors::cases("encode")) {
    const Codebook book = vectors::book(c);
    const Rows x = c["x"].rows();
    Guarded<int32_t> codes(x.rows * book.levels());
    REQUIRE(test::exactly(encode_workspace(test::sizing(1), book), nullptr, [&](const Context& context) {
      return encode(context, book, x, {codes.data(), {x.rows, book.levels()}});
    }));
    CHECK(codes.intact());
    c.check_integers("codes", codes.values());
  }
}

TEST_CASE("encode: equal codewords, the lower code; magnitudes whose squares overflow") {
  const std::vector<float> first{1, 1, 1, 1, 3e38f, -3e38f}, second{0, 0, 0, 0};
  const Array<const float, 2> centers[] = {test::matrix(first, 3, 2), test::matrix(second, 2, 2)};
  Codebook book;
  REQUIRE(Codebook::build(centers, 2, &book).ok());
  const std::vector<float> x{1, 1, 3e38f, -3e38f, -3e38f, 3e38f, 0, 0};
  std::vector<int32_t> codes(8);
  REQUIRE(test::exactly(encode_workspace(test::sizing(1), book), nullptr,
                        [&](const Context& c) { return encode(c, book, test::rows(x, 2), {codes.data(), {4, 2}}); }));
  CHECK(codes == std::vector<int32_t>{0, 0, 2, 0, 0, 0, 0, 0});
}

TEST_CASE("vote") {
  for (const Case& c : vectors::cases("vote")) {
    const Codebook book = vectors::book(c);
    const std::vector<int64_t>& rule = c["rule"].longs;  // the budget, or 0 and the fan-out
    VoteParams params;
    params.budget = rule[0];
    if (!rule[0]) std::copy(rule.begin() + 1, rule.end(), params.fanout);
    const Histories in = vectors::histories(c);
    const int64_t users = in.offsets.users, m = seats(params, book.levels()), levels = book.levels();
    Guarded<int32_t> agents(users * m * levels), count(users);
    Guarded<int64_t> votes(users * m);
    REQUIRE(test::exactly(
        vote_workspace(test::sizing(1), book, params, vectors::longest(c)), nullptr, [&](const Context& context) {
          return vote(context, book, params, in,
                      {{agents.data(), {users, m, levels}}, {votes.data(), {users, m}}, {count.data(), {users}}});
        }));
    CHECK((agents.intact() && votes.intact() && count.intact()));
    c.check_integers("agents", agents.values());
    c.check_integers("votes", votes.values());
    c.check_integers("count", count.values());
  }
}

TEST_CASE("route") {
  for (const Case& c : vectors::cases("route")) {
    const vectors::Routing r(c);
    const Histories& in = r.in;
    const Codebook* const book = r.codebook.get();
    const int64_t width = r.agents.prototypes.shape[2], rows = r.users * r.tokens;
    Guarded<std::byte> tokens(rows * in.v.width * bytes_of(in.v.dtype));
    Guarded<float> lse(rows), refined(r.params.refine ? r.users * r.seats * width : 0);
    REQUIRE(test::exactly(route_workspace(test::sizing(1), book, r.params, in, r.agents, vectors::longest(c)), nullptr,
                          [&](const Context& context) {
                            return route(context, book, r.params, in, r.agents,
                                         {{tokens.data(), in.v.dtype, rows, in.v.width},
                                          {lse.data(), {r.users, r.tokens}},
                                          {r.params.refine ? refined.data() : nullptr, {r.users, r.seats, width}}});
                          }));
    CHECK((tokens.intact() && lse.intact() && refined.intact()));
    std::vector<float> decoded;
    for (int64_t at = 0; at < tokens.count(); at += bytes_of(in.v.dtype))
      decoded.push_back(test::decode(tokens.data() + at, in.v.dtype));
    c.check_floats("tokens", decoded);
    c.check_floats("lse", lse.values());
    if (r.params.refine) c.check_floats("refined", refined.values());
  }
}

TEST_CASE("attend") {
  for (const Case& c : vectors::cases("attend")) {
    const vectors::Attention a(c);
    Guarded<float> out(a.in.q.rows * a.in.values.width), lse(a.in.q.rows);
    REQUIRE(test::exactly(attend_workspace(test::sizing(1), a.in), nullptr, [&](const Context& context) {
      return attend(
          context, a.in,
          {{out.data(), DType::float32, a.in.q.rows, a.in.values.width}, {lse.data(), {a.pairs, a.in.heads}}});
    }));
    CHECK((out.intact() && lse.intact()));
    c.check_floats("out", out.values());
    c.check_floats("lse", lse.values());
  }
}

TEST_CASE("values are never errors: a finite bias of any size gives a finite token, near or far") {
  const std::vector<float> v{1, 1, 2, 2}, p{0, 0};
  const std::vector<int64_t> offsets{0, 2};
  for (Normalize normalize : {Normalize::history, Normalize::agents})
    for (float large : {3e38f, 2e38f, 1e38f, -3e38f})
      for (bool far : {false, true}) {  // in agents mode a far row's share is that of a near one
        if (far && normalize == Normalize::history) continue;
        CAPTURE(large);
        CAPTURE(far);
        const std::vector<float> bias{large, 0}, x(4, far ? 1e4f : 0.f), temperature{far ? 1e-30f : 1.f};
        const RouteParams params{normalize, Method::exact, Missing::drop, 0, {temperature.data(), {1}}};
        const RouteAgents agents{{p.data(), {1, 1, 2}}, {}};
        Histories in;
        in.x = test::rows(x, 2);
        in.v = test::rows(v, 2);
        in.offsets = test::spans(offsets);
        in.bias = {bias.data(), {2}};
        float tokens[2], lse[1];
        REQUIRE(test::exactly(
            route_workspace(test::sizing(1), nullptr, params, in, agents, 2), nullptr, [&](const Context& c) {
              return route(c, nullptr, params, in, agents, {{tokens, DType::float32, 1, 2}, {lse, {1, 1}}, {}});
            }));
        CHECK(tokens[0] == (large > 0 ? 1.f : 2.f));
        CHECK(tokens[1] == tokens[0]);
        CHECK(std::isfinite(lse[0]));
      }
}
