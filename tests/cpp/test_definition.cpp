// SPDX-License-Identifier: Apache-2.0
// encode, vote, route, missing and attend give what hisac.reference says: integers exactly, floats within their bounds.
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
    const std::vector<int64_t>& rule = c["rule"].longs;  // budget, fan-out, beam
    VoteParams params;
    params.budget = rule[0];
    std::copy_n(rule.begin() + 1, book.levels(), params.fanout);
    std::copy_n(rule.begin() + 1 + book.levels(), book.levels(), params.beam);
    const Histories in = vectors::histories(c);
    const int64_t users = in.offsets.users, m = seats(params, book.levels()), levels = book.levels();
    Guarded<int32_t> agents(users * m * levels), count(users);
    Guarded<int64_t> votes(users * m);
    REQUIRE(test::exactly(vote_workspace(test::sizing(1), book, params, in), nullptr, [&](const Context& context) {
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
    const int64_t width = r.agents.prototypes.shape[2], rows = r.users * r.seats;
    const bool has_tokens = c.has("tokens"), has_mean_x = c.has("mean_x");
    Guarded<std::byte> tokens(has_tokens ? rows * in.v.width * bytes_of(in.v.dtype) : 0);
    Guarded<float> lse(rows), mean_x(has_mean_x ? rows * width : 0);
    Tokens out{{}, {lse.data(), {r.users, r.seats}}};
    if (has_tokens) out.tokens = {tokens.data(), in.v.dtype, rows, in.v.width};
    if (has_mean_x) out.mean_x = {mean_x.data(), {r.users, r.seats, width}};
    const size_t bytes = route_workspace(test::sizing(1), book, r.params, in, r.agents, out);
    REQUIRE(test::exactly(bytes, nullptr,
                          [&](const Context& context) { return route(context, book, r.params, in, r.agents, out); }));
    CHECK((tokens.intact() && lse.intact() && mean_x.intact()));
    std::vector<float> decoded;
    for (int64_t at = 0; at < tokens.count(); at += bytes_of(in.v.dtype))
      decoded.push_back(test::decode(tokens.data() + at, in.v.dtype));
    c.check_floats("lse", lse.values());
    if (has_tokens) c.check_floats("tokens", decoded);
    if (has_mean_x) c.check_floats("mean_x", mean_x.values());
  }
}

TEST_CASE("missing") {
  for (const Case& c : vectors::cases("missing")) {
    const vectors::Routing r(c);
    const Codebook* const book = r.codebook.get();
    Guarded<float> out(r.in.behaviours());
    REQUIRE(test::exactly(missing_workspace(test::sizing(1), book, r.in), nullptr, [&](const Context& context) {
      return missing(context, book, r.in, {out.data(), {out.count()}});
    }));
    CHECK(out.intact());
    std::vector<int32_t> found;
    for (float f : out.values()) {
      CHECK((f == 0 || f == -std::numeric_limits<float>::infinity()));
      found.push_back(f == 0);
    }
    CHECK(std::count(found.begin(), found.end(), 1) > 0);
    c.check_integers("missing", found);
  }
}

TEST_CASE("missing: as the x of another route, the mean v and the log count of a user's missing behaviours") {
  for (const Case& c : vectors::cases("missing")) {
    const vectors::Routing r(c);
    if (r.in.v.dtype != DType::float32) continue;
    const Codebook* const book = r.codebook.get();
    const int64_t t = r.in.behaviours(), wide = r.in.v.width;
    std::vector<float> x(test::size(t));
    REQUIRE(test::exactly(missing_workspace(test::sizing(1), book, r.in), nullptr,
                          [&](const Context& context) { return missing(context, book, r.in, {x.data(), {t}}); }));
    Histories in;
    in.x = test::rows(x, 1);
    in.v = r.in.v;
    in.v_ids = r.in.v_ids;
    in.offsets = r.in.offsets;
    const std::vector<float> zeros(test::size(r.users)), temperature{1};
    const RouteParams params{Normalize::history, {temperature.data(), {1}}};
    const RouteAgents agents{{zeros.data(), {r.users, 1, 1}}, {}};
    std::vector<float> tokens(test::size(r.users * wide)), lse(test::size(r.users));
    const Tokens out{{tokens.data(), DType::float32, r.users, wide}, {lse.data(), {r.users, 1}}, {}};
    REQUIRE(test::exactly(route_workspace(test::sizing(1), nullptr, params, in, agents, out), nullptr,
                          [&](const Context& context) { return route(context, nullptr, params, in, agents, out); }));
    for (int64_t b = 0; b < r.users; ++b) {
      double count = 0;
      std::vector<double> sum(test::size(wide));
      for (int64_t i = in.offsets.start(b); i < in.offsets.end(b); ++i) {
        if (x[test::size(i)] != 0) continue;
        const float* const row = static_cast<const float*>(in.v.data) + (in.v_ids ? in.v_ids[i] : i) * wide;
        for (int64_t d = 0; d < wide; ++d) sum[test::size(d)] += double(row[d]);
        ++count;
      }
      const float total = lse[test::size(b)];
      CHECK((count > 0 ? std::fabs(double(total) - std::log(count)) < 1e-5 : std::isinf(total) && total < 0));
      for (int64_t d = 0; d < wide; ++d)
        CHECK(std::fabs(double(tokens[test::size(b * wide + d)]) - sum[test::size(d)] / std::max(count, 1.)) < 1e-4);
    }
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
        const RouteParams params{normalize, {temperature.data(), {1}}};
        const RouteAgents agents{{p.data(), {1, 1, 2}}, {}};
        Histories in;
        in.x = test::rows(x, 2);
        in.v = test::rows(v, 2);
        in.offsets = test::spans(offsets);
        in.bias = {bias.data(), {2}};
        float tokens[2], lse[1], mean_x[2];
        const Tokens out{{tokens, DType::float32, 1, 2}, {lse, {1, 1}}, {mean_x, {1, 1, 2}}};
        REQUIRE(test::exactly(route_workspace(test::sizing(1), nullptr, params, in, agents, out), nullptr,
                              [&](const Context& c) { return route(c, nullptr, params, in, agents, out); }));
        CHECK(tokens[0] == (large > 0 ? 1.f : 2.f));
        CHECK(tokens[1] == tokens[0]);
        CHECK((mean_x[0] == x[0] && mean_x[1] == x[0]));
        CHECK(std::isfinite(lse[0]));
      }
}
