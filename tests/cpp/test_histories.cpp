// SPDX-License-Identifier: Apache-2.0
// Nothing at all, users without rows, int32 offsets, and histories that overlap.
#include <doctest/doctest.h>

#include <limits>
#include <string>

#include "pipeline.h"

using namespace hisac;
using test::Random;
using test::uniform;

namespace {

constexpr int64_t kWidth = 3;

std::string what(const Status& status) { return status.what(); }

/// Calls route and its backward, missing, leaf_sums and its backward with `users` histories over `rows` rows and, the
/// first two, `agents` agents; empty vectors have null data.
void route_all(int64_t users, int64_t rows, int64_t agents, const std::vector<int64_t>& starts,
               const std::vector<int64_t>& ends) {
  CAPTURE(users);
  CAPTURE(rows);
  CAPTURE(agents);
  Random random(20);
  const Codebook book = test::codebook(random, {2, 2}, kWidth);
  const auto x = uniform(random, rows * kWidth), p = uniform(random, users * agents * kWidth);
  const std::vector<int32_t> codes(test::size(rows * 2), 1);
  const std::vector<float> temperature{1};
  Histories in;
  in.x = in.v = test::rows(x, kWidth);
  in.offsets = {starts.data(), ends.data(), DType::int64, users};
  const RouteAgents to{{p.data(), {users, agents, kWidth}}, {}};
  const RouteParams params{Normalize::agents, {temperature.data(), {1}}};
  for (bool has_v : {true, false})
    for (bool has_mean_x : {true, false}) {
      in.v = has_v ? in.x : Rows{};
      const int64_t m = agents;
      std::vector<float> tokens(test::size(has_v ? users * m * kWidth : 0), 7.f), lse(test::size(users * m), 7.f),
          mean_x(test::size(has_mean_x ? users * m * kWidth : 0), 7.f);
      Tokens returned{{}, {lse.data(), {users, m}}, {mean_x.data(), {users, m, kWidth}}};
      if (has_v) returned.tokens = {tokens.data(), DType::float32, users * m, kWidth};
      test::Workspace workspace(route_workspace(test::sizing(1), nullptr, params, in, to, returned));
      CHECK(what(route({workspace.array(), nullptr}, nullptr, params, in, to, returned)) == "");
      for (int64_t b = 0; b < users; ++b)
        if (starts[test::size(b)] == ends[test::size(b)])
          for (int64_t a = b * m; a < (b + 1) * m; ++a) {
            CHECK(lse[test::size(a)] == -std::numeric_limits<float>::infinity());
            for (int64_t d = 0; has_v && d < kWidth; ++d) CHECK(tokens[test::size(a * kWidth + d)] == 0.f);
            for (int64_t d = 0; has_mean_x && d < kWidth; ++d) CHECK(mean_x[test::size(a * kWidth + d)] == 0.f);
          }
      std::vector<float> dv(x.size()), dtau(1, 7.f), dx(x.size()), dbias(test::size(rows)), dspread(dbias),
          dp(p.size());
      RouteGradients out{{},
                         {},
                         {dbias.data(), {rows}},
                         {dspread.data(), {rows}},
                         {dp.data(), {users, agents, kWidth}},
                         {dtau.data(), {1}}};
      if (!has_mean_x) out.x = {dx.data(), {rows, kWidth}};
      if (has_v) out.v = {dv.data(), {rows, kWidth}};
      const Rows of_tokens{tokens.data(), DType::float32, users * m, has_v ? kWidth : 0};
      const Array<const float, 3> of_mean_x{mean_x.data(), {users, m, kWidth}};
      const RouteForward forward{of_tokens, {lse.data(), {users, m}}, of_mean_x, of_tokens, {}, of_mean_x};
      test::Workspace backward(route_backward_workspace(test::sizing(1), nullptr, params, in, to, forward, out));
      CHECK(what(route_backward({backward.array(), nullptr}, nullptr, params, in, to, forward, out)) == "");
      if (rows == 0 || agents == 0 || users == 0) CHECK(dtau[0] == 0.f);

      std::vector<float> absent(test::size(rows), 7.f);
      test::Workspace scratch(missing_workspace(test::sizing(1), nullptr, in));
      CHECK(what(missing({scratch.array(), nullptr}, nullptr, in, {absent.data(), {rows}})) == "");
      CHECK(absent == std::vector<float>(test::size(rows), -std::numeric_limits<float>::infinity()));
      Histories coded = in;
      coded.codes = {codes.data(), {rows, 2}};
      for (bool together : {true, false}) {
        std::vector<float> sum_x(x.size()), sum_v(dv.size()), bias(test::size(rows)), spread(bias);
        std::vector<int64_t> sum_starts(test::size(together || users ? users + 1 : 0), 7),
            sum_ends(test::size(users), 7), sum_votes(test::size(rows));
        std::vector<int32_t> sum_codes(codes.size());
        const LeafSums sums{{sum_x.data(), {rows, kWidth}},
                            {sum_v.data(), {rows, coded.v.width}},
                            {sum_starts.data(), together ? sum_starts.data() + 1 : sum_ends.data(), users},
                            {sum_codes.data(), {rows, 2}},
                            {bias.data(), {rows}},
                            {spread.data(), {rows}},
                            {sum_votes.data(), {rows}}};
        test::Workspace of_sums(leaf_sums_workspace(test::sizing(1), book, coded));
        CHECK(what(leaf_sums({of_sums.array(), nullptr}, book, coded, sums)) == "");
        const Spans found = sums.histories().offsets;
        for (int64_t b = 0; b < users; ++b)  // all rows of a user are of one leaf
          CHECK(found.end(b) - found.start(b) == (starts[test::size(b)] < ends[test::size(b)]));
        for (int64_t b = 0; b < users; ++b)
          for (int64_t s = found.start(b); s < found.end(b); ++s)
            CHECK(sum_votes[test::size(s)] == ends[test::size(b)] - starts[test::size(b)]);
        if (together) CHECK(sum_starts[0] == 0);
        LeafSumsGradients to_leaves{{}, {dbias.data(), {rows}}};
        if (has_v) to_leaves.v = {dv.data(), {rows, kWidth}};
        test::Workspace of_leaves(leaf_sums_backward_workspace(test::sizing(1), book, coded, to_leaves));
        CHECK(what(leaf_sums_backward({of_leaves.array(), nullptr}, book, coded, {sums.histories(), {}, {}, {}, {}},
                                      to_leaves)) == "");
        CHECK(dbias == std::vector<float>(test::size(rows)));
      }
    }
}

void attend_all(int64_t users, int64_t pairs, int64_t tokens, const std::vector<int64_t>& offsets) {
  CAPTURE(users);
  CAPTURE(pairs);
  CAPTURE(tokens);
  Random random(21);
  const auto q = uniform(random, pairs * 2 * kWidth), k = uniform(random, users * tokens * 2 * kWidth);
  const AttendInputs in{
      test::rows(q, kWidth), test::rows(k, kWidth), test::rows(k, kWidth), tokens, 2, test::spans(offsets), {}, 1};
  std::vector<float> out(q.size(), 7.f), lse(test::size(pairs * 2), 7.f);
  test::Workspace workspace(attend_workspace(test::sizing(1), in));
  CHECK(what(attend({workspace.array(), nullptr}, in,
                    {{out.data(), DType::float32, pairs * 2, kWidth}, {lse.data(), {pairs, 2}}})) == "");
  if (tokens == 0)
    for (float f : lse) CHECK(f == -std::numeric_limits<float>::infinity());
  if (tokens == 0)
    for (float f : out) CHECK(f == 0.f);
  std::vector<float> dq(q.size()), dk(k.size(), 7.f), dv(k.size());
  test::Workspace backward(attend_backward_workspace(test::sizing(1), in));
  CHECK(what(attend_backward({backward.array(), nullptr}, in,
                             {test::rows(out, kWidth), {}, test::rows(out, kWidth), {lse.data(), {pairs, 2}}},
                             {{dq.data(), {pairs, 2, kWidth}},
                              {dk.data(), {users, tokens, 2, kWidth}},
                              {dv.data(), {users, tokens, 2, kWidth}},
                              {}})) == "");
  if (pairs == 0)
    for (float f : dk) CHECK(f == 0.f);
}

}  // namespace

TEST_CASE("no rows: encode, leaves, prototypes") {
  Random random(22);
  const Codebook book = test::codebook(random, {3, 2}, kWidth);
  test::Workspace workspace(encode_workspace(test::sizing(1), book));
  CHECK(what(encode({workspace.array(), nullptr}, book, {nullptr, DType::float32, 0, kWidth}, {nullptr, {0, 2}})) ==
        "");
  CHECK(what(leaves(book, {nullptr, {0, 2}}, {nullptr, {0}})) == "");
  CHECK(what(code_prototypes({}, book, {nullptr, {0, 2}}, {nullptr, {0, kWidth}})) == "");
}

TEST_CASE("no rows or no users: vote") {
  Random random(23);
  const Codebook book = test::codebook(random, {3, 2}, kWidth);
  VoteParams params;
  params.budget = 4;
  std::vector<int32_t> agents(2 * 4 * 2), count{7, 7};
  std::vector<int64_t> votes(8, 7), zeros(3);
  Histories in;
  in.codes = {nullptr, {0, 2}};
  in.offsets = test::spans(zeros);
  test::Workspace workspace(vote_workspace(test::sizing(1), book, params, in));
  const Context context{workspace.array(), nullptr};
  CHECK(what(vote(context, book, params, in,
                  {{agents.data(), {2, 4, 2}}, {votes.data(), {2, 4}}, {count.data(), {2}}})) == "");
  CHECK(agents == std::vector<int32_t>(16, -1));
  CHECK(votes == std::vector<int64_t>(8, 0));
  CHECK(count == std::vector<int32_t>{0, 0});
  in.offsets = {};
  CHECK(what(vote(context, book, params, in, {{nullptr, {0, 4, 2}}, {nullptr, {0, 4}}, {nullptr, {0}}})) == "");
}

TEST_CASE("no users, no rows, no agents, in every combination: route, missing, leaf_sums and the backwards") {
  for (int64_t agents : {0, 1, 5}) {
    route_all(0, 0, agents, {}, {});
    route_all(0, 4, agents, {}, {});
    route_all(3, 0, agents, {0, 0, 0}, {0, 0, 0});
    route_all(3, 4, agents, {0, 2, 2}, {2, 2, 4});
  }
}

TEST_CASE("no users, no candidates, no tokens, in every combination: attend and its backward") {
  for (int64_t tokens : {0, 1, 5}) {
    attend_all(0, 0, tokens, {0});
    attend_all(2, 0, tokens, {0, 0, 0});
    attend_all(2, 3, tokens, {0, 0, 3});
  }
}

TEST_CASE("candidates outside every user's range have no output") {
  const std::vector<float> q{1, 1, 1}, k{1};
  const std::vector<int64_t> starts{1}, ends{2};
  const AttendInputs in{
      test::rows(q, 1), test::rows(k, 1), test::rows(k, 1), 1, 1, {starts.data(), ends.data(), DType::int64, 1}, {}, 1};
  float out[3], lse[3];
  REQUIRE(test::exactly(attend_workspace(test::sizing(1), in), nullptr,
                        [&](const Context& c) { return attend(c, in, {{out, DType::float32, 3, 1}, {lse, {3, 1}}}); }));
  const float none = -std::numeric_limits<float>::infinity();
  CHECK((out[0] == 0 && out[1] == 1 && out[2] == 0));
  CHECK((lse[0] == none && lse[1] == 1 && lse[2] == none));
}

TEST_CASE("int32 and int64 offsets are one") {
  const int32_t narrow[] = {0, 4, 4, 9};
  const int64_t wide[] = {0, 4, 4, 9};
  const Spans a{narrow, narrow + 1, DType::int32, 3}, b{wide, wide + 1, DType::int64, 3};
  for (int64_t u = 0; u < 3; ++u) CHECK((a.start(u) == b.start(u) && a.end(u) == b.end(u)));
  Random random(24);
  const Codebook book = test::codebook(random, {3}, 1);
  const std::vector<int32_t> codes{0, 1, 1, 2, 2, 2, 0, 1, 2};
  VoteParams params;
  params.budget = 3;
  std::vector<int64_t> votes[2]{std::vector<int64_t>(9), std::vector<int64_t>(9)};
  int i = 0;
  Histories in;
  in.codes = {codes.data(), {9, 1}};
  for (const Spans& offsets : {a, b}) {
    in.offsets = offsets;
    std::vector<int32_t> agents(9), count(3);
    int64_t* const out = votes[i++].data();
    REQUIRE(test::exactly(vote_workspace(test::sizing(1), book, params, in), nullptr, [&](const Context& c) {
      return vote(c, book, params, in, {{agents.data(), {3, 3, 1}}, {out, {3, 3}}, {count.data(), {3}}});
    }));
  }
  CHECK(votes[0] == std::vector<int64_t>{2, 1, 1, 0, 0, 0, 3, 1, 1});
  CHECK(votes[1] == votes[0]);
}

TEST_CASE("overlapping histories: each user as if alone, gradients of shared rows add up, the same bits by threads") {
  Random random(25);
  constexpr int64_t kRows = 3000, kAgents = 6, kUsers = 5;
  const std::vector<int64_t> starts{0, 500, 100, 2500, 2400}, ends{3000, 2900, 2600, 2500, 3000};
  const auto x = uniform(random, kRows * kWidth), p = uniform(random, kUsers * kAgents * kWidth),
             d_tokens = uniform(random, kUsers * kAgents * kWidth);
  const std::vector<float> temperature{1};
  const RouteParams params{Normalize::history, {temperature.data(), {1}}};
  struct Out {
    std::vector<float> tokens, lse, dv, dx, dbias, dspread;
  };
  const auto solve = [&](int64_t first, int64_t users, const Executor* executor) {
    const int workers = workers_of({{}, executor});
    const int64_t agents = users * kAgents;
    Histories in;
    in.x = in.v = test::rows(x, kWidth);
    in.offsets = {starts.data() + first, ends.data() + first, DType::int64, users};
    const RouteAgents to{{p.data() + first * kAgents * kWidth, {users, kAgents, kWidth}}, {}};
    Out out{std::vector<float>(test::size(agents * kWidth)),
            std::vector<float>(test::size(agents)),
            std::vector<float>(kRows * kWidth),
            std::vector<float>(kRows * kWidth),
            std::vector<float>(kRows),
            std::vector<float>(kRows)};
    const Tokens returned{{out.tokens.data(), DType::float32, agents, kWidth}, {out.lse.data(), {users, kAgents}}, {}};
    REQUIRE(test::exactly(route_workspace(test::sizing(workers), nullptr, params, in, to, returned), executor,
                          [&](const Context& c) { return route(c, nullptr, params, in, to, returned); }));
    const RouteForward forward{test::rows(out.tokens, kWidth),
                               {out.lse.data(), {users, kAgents}},
                               {},
                               {d_tokens.data() + first * kAgents * kWidth, DType::float32, agents, kWidth},
                               {},
                               {}};
    const RouteGradients gradients{{out.dx.data(), {kRows, kWidth}},
                                   {out.dv.data(), {kRows, kWidth}},
                                   {out.dbias.data(), {kRows}},
                                   {out.dspread.data(), {kRows}},
                                   {},
                                   {}};
    REQUIRE(test::exactly(
        route_backward_workspace(test::sizing(workers), nullptr, params, in, to, forward, gradients), executor,
        [&](const Context& c) { return route_backward(c, nullptr, params, in, to, forward, gradients); }));
    return out;
  };
  const Out all = solve(0, kUsers, nullptr);
  std::vector<double> dv(all.dv.size()), dx(all.dx.size()), dbias(all.dbias.size()), dspread(all.dspread.size());
  for (int64_t b = 0; b < kUsers; ++b) {
    const Out one = solve(b, 1, nullptr);
    CHECK(std::equal(one.tokens.begin(), one.tokens.end(), all.tokens.begin() + b * kAgents * kWidth));
    CHECK(std::equal(one.lse.begin(), one.lse.end(), all.lse.begin() + b * kAgents));
    test::add(dv, one.dv);
    test::add(dx, one.dx);
    test::add(dbias, one.dbias);
    test::add(dspread, one.dspread);
  }
  CHECK(test::nearly(all.dv, dv));
  CHECK(test::nearly(all.dx, dx));
  CHECK(test::nearly(all.dbias, dbias));
  CHECK(test::nearly(all.dspread, dspread));
  for (int workers : {2, 7}) {
    test::Threads threads{workers};
    const Executor executor = threads.executor();
    const Out shared = solve(0, kUsers, &executor);
    CHECK(shared.tokens == all.tokens);
    CHECK(shared.dv == all.dv);
    CHECK(shared.dx == all.dx);
    CHECK(shared.dbias == all.dbias);
    CHECK(shared.dspread == all.dspread);
  }
}
