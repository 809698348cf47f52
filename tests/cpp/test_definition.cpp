// SPDX-License-Identifier: Apache-2.0
// encode, vote, route and attend against their definitions: integers exactly, floats within float32 of them.
#include "definition.h"

#include <doctest/doctest.h>

#include "support.h"

using namespace hisac;
using test::Guarded;
using test::Random;
using test::uniform;

namespace {

void check_vote(const Codebook& book, const VoteParams& params, const std::vector<int32_t>& codes,
                const std::vector<int64_t>& offsets, const float* weights) {
  const int64_t t = static_cast<int64_t>(codes.size()) / book.levels(), users = test::histories(offsets).users;
  const int64_t m = seats(params, book.levels());
  std::vector<int32_t> agents(test::size(users * m * book.levels())), count(test::size(users));
  std::vector<int64_t> votes(test::size(users * m));
  REQUIRE(test::exactly(vote_workspace(test::sizing(1), book, params, t), nullptr, [&](const Context& c) {
    return vote(c, book, params, {codes.data(), {t, book.levels()}}, test::histories(offsets), {weights, {t}},
                {{agents.data(), {users, m, book.levels()}}, {votes.data(), {users, m}}, {count.data(), {users}}});
  }));
  for (int64_t b = 0; b < users; ++b) {
    const int64_t first = offsets[test::size(b)], rows = offsets[test::size(b + 1)] - first;
    const auto expected =
        definition::vote(book, params, codes.data() + first * book.levels(), weights ? weights + first : nullptr, rows);
    REQUIRE(test::size(count[test::size(b)]) == expected.size());
    for (int64_t a = 0; a < m; ++a) {
      const bool present = test::size(a) < expected.size();
      const int32_t* const got = agents.data() + (b * m + a) * book.levels();
      CHECK(votes[test::size(b * m + a)] == (present ? expected[test::size(a)].votes : 0));
      for (int l = 0; l < book.levels(); ++l)
        CHECK(got[l] == (present ? expected[test::size(a)].codes[test::size(l)] : -1));
    }
  }
}

}  // namespace

TEST_CASE("encode: codes are the definition's, ties and near-ties included") {
  Random random(2);
  for (int64_t width : {1, 3, 16, 65}) {
    const Codebook book = test::codebook(random, {40, 7, 20}, width);
    auto x = uniform(random, 500 * width);
    for (int64_t i = 0; i < 200; ++i) {  // halfway between two codewords, to the last bit or nearly
      const float *const a = book.centers(0) + random.below(40) * width, *const b =
                                                                             book.centers(0) + random.below(40) * width;
      for (int64_t d = 0; d < width; ++d) {
        float mid = (a[d] + b[d]) / 2;
        if (i % 2) mid = std::nextafterf(mid, 2.f);
        x[test::size(i * width + d)] = mid;
      }
    }
    x[test::size(300 * width)] = std::numeric_limits<float>::quiet_NaN();
    x[test::size(301 * width)] = -std::numeric_limits<float>::infinity();
    x[test::size(302 * width)] = std::numeric_limits<float>::max();
    std::vector<int32_t> codes(500 * 3);
    REQUIRE(test::exactly(encode_workspace(test::sizing(1), book), nullptr, [&](const Context& c) {
      return encode(c, book, test::rows(x, width), {codes.data(), {500, 3}});
    }));
    for (int64_t i = 0; i < 500; ++i) {
      const auto expected = definition::encode(book, x.data() + i * width);
      for (int64_t l = 0; l < 3; ++l) CHECK(codes[test::size(i * 3 + l)] == expected[test::size(l)]);
    }
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
  for (int64_t i = 0; i < 4; ++i) CHECK(definition::encode(book, x.data() + i * 2)[0] == codes[test::size(i * 2)]);
}

TEST_CASE("vote: agents, votes and order are the definition's") {
  Random random(3);
  const std::vector<int64_t> offsets{0, 300, 300, 301, 700};
  for (const auto& sizes : std::vector<std::vector<int64_t>>{{9}, {4, 5}, {3, 4, 5}, {2, 2, 2, 2, 2, 2, 2, 2}}) {
    const Codebook book = test::codebook(random, sizes, 2);
    const int64_t levels = book.levels();
    std::vector<int32_t> codes;
    for (int64_t i = 0; i < 700; ++i)
      for (int64_t l = 0; l < levels; ++l)  // skewed, now and then out of range
        codes.push_back(static_cast<int32_t>(random.below(200) ? random.below(1 + random.below(sizes[test::size(l)]))
                                             : random.below(3) ? -1
                                                               : 1 << 30));
    auto weights = uniform(random, 700, 20);
    weights[5] = std::numeric_limits<float>::quiet_NaN();
    weights[6] = std::numeric_limits<float>::infinity();
    for (int64_t budget : {1, 2, 7, 30, 400}) {
      VoteParams params;
      params.budget = budget;
      check_vote(book, params, codes, offsets, nullptr);
      check_vote(book, params, codes, offsets, weights.data());
    }
    for (int64_t k : {1, 2, 3}) {
      VoteParams params;
      for (int64_t l = 0; l < levels; ++l) params.fanout[l] = l < 5 ? k : 1;
      check_vote(book, params, codes, offsets, nullptr);
      check_vote(book, params, codes, offsets, weights.data());
    }
  }
}

TEST_CASE("vote: long histories, where leaves are counted and not sorted") {
  Random random(6);
  const std::vector<int64_t> offsets{0, 2100, 4147, 4147, 9000};  // the second one is too short
  const int64_t t = offsets.back();
  auto weights = uniform(random, t, 20);
  for (int64_t i = 0; i < t; i += 1 + random.below(9)) weights[test::size(i)] = 0;
  weights[7] = std::numeric_limits<float>::quiet_NaN();
  for (const auto& sizes : std::vector<std::vector<int64_t>>{{90}, {30, 20}, {5, 6, 30}, {1500, 3}, {3, 9000}}) {
    const Codebook book = test::codebook(random, sizes, 1);
    const int64_t levels = book.levels();
    for (int kind = 0; kind < 4; ++kind) {
      std::vector<int32_t> codes;
      for (int64_t i = 0; i < t; ++i) {
        int64_t first = 0;  // halved votes from child to child; of the heavy ones all in one leaf, so others get seats
        while (first + 1 < sizes[0] && random.below(2)) ++first;
        if (kind == 1) first = random.below(1 + random.below(sizes[0]));
        if (kind == 2) first = sizes[0] - 1;
        codes.push_back(static_cast<int32_t>(random.below(500) ? first : random.below(2) ? -1 : 1 << 20));
        for (int64_t l = 1; l < levels; ++l) {
          const int64_t c = sizes[test::size(l)];
          const bool one = kind == 2 || (kind == 3 && first < 6);
          codes.push_back(static_cast<int32_t>(!random.below(500) ? c
                                               : one              ? c / 2
                                                                  : random.below(1 + random.below(c))));
        }
      }
      VoteParams by_budget, by_fanout;
      for (int64_t l = 0; l < levels; ++l) by_fanout.fanout[l] = 6 - 2 * l;
      for (const float* w : {static_cast<const float*>(nullptr), static_cast<const float*>(weights.data())}) {
        check_vote(book, by_fanout, codes, offsets, w);
        for (int64_t budget : {1, 5, 24, 60, 700, 4096}) {
          by_budget.budget = budget;
          check_vote(book, by_budget, codes, offsets, w);
        }
      }
    }
  }
}

TEST_CASE("vote: codebooks of 2^63 leaves and more") {
  Random random(4);
  for (const auto& sizes : std::vector<std::vector<int64_t>>{
           {65536, 65536, 65536, 32768}, {65536, 65536, 65536, 65536}, {1048576, 1, 1048576, 16777216 / 16, 16}}) {
    const Codebook book = test::codebook(random, sizes, 1);
    std::vector<int32_t> codes;
    for (int64_t i = 0; i < 200; ++i)
      for (int64_t c : sizes) codes.push_back(static_cast<int32_t>(random.below(8) ? c - 1 - random.below(2) % c : 0));
    VoteParams params;
    params.budget = 16;
    check_vote(book, params, codes, {0, 150, 200}, nullptr);
  }
}

TEST_CASE("route: tokens and lse are the definition's") {
  Random random(5);
  constexpr int64_t kRows = 4500, kWidth = 6, kValues = 5, kAgents = 9, kUsers = 3;
  const Codebook book = test::codebook(random, {3, 4}, kWidth);
  auto x = uniform(random, kRows * kWidth), bias = uniform(random, kRows, 2);
  const auto v = uniform(random, kRows * kValues), p = uniform(random, kUsers * kAgents * kWidth);
  const std::vector<int64_t> offsets{0, 4400, 4400, 4500};
  const std::vector<int32_t> count{8, 9, 5};
  const std::vector<float> temperature{.3f, .5f, 1, 2, .3f, 0, .7f, .2f, 1};  // agent 5 is absent
  std::vector<int32_t> codes(kRows * 2);
  for (int32_t& c : codes) c = static_cast<int32_t>(random.below(100) ? random.below(3) : -1);
  for (int64_t i = 0; i < kRows; i += 50) x[test::size(i * kWidth)] = std::numeric_limits<float>::quiet_NaN();
  for (int64_t i = 1; i < kRows; i += 70) bias[test::size(i)] = -std::numeric_limits<float>::infinity();

  for (Normalize normalize : {Normalize::history, Normalize::agents})
    for (Method method : {Method::exact, Method::leaf})
      for (Missing missing : {Missing::drop, Missing::token})
        for (int refine : {0, 2}) {
          CAPTURE(static_cast<int>(normalize));
          CAPTURE(static_cast<int>(method));
          CAPTURE(refine);
          const int64_t m = kAgents + (missing == Missing::token);
          const RouteParams params{normalize, method, missing, refine, {temperature.data(), {kAgents}}};
          const RouteInputs in{test::rows(x, kWidth),      test::rows(v, kValues),
                               test::histories(offsets),   {p.data(), {kUsers, kAgents, kWidth}},
                               {count.data(), {kUsers}},   {bias.data(), {kRows}},
                               {codes.data(), {kRows, 2}}, &book};
          Guarded<float> tokens(kUsers * m * kValues), lse(kUsers * m), refined(kUsers * kAgents * kWidth);
          REQUIRE(test::exactly(route_workspace(test::sizing(1), params, in, kRows), nullptr, [&](const Context& c) {
            return route(c, params, in,
                         {{tokens.data(), DType::float32, kUsers * m, kValues},
                          {lse.data(), {kUsers, m}},
                          {refined.data(), {kUsers, kAgents, kWidth}}});
          }));
          CHECK((tokens.intact() && lse.intact() && refined.intact()));
          for (int64_t b = 0; b < kUsers; ++b) {
            definition::User user;
            std::vector<uint64_t> leaf;
            std::vector<size_t> places;
            std::vector<double> missing_sum(kValues);
            double missing_count = 0;
            for (int64_t i = offsets[test::size(b)]; i < offsets[test::size(b + 1)]; ++i) {
              const float *const xi = x.data() + i * kWidth, *const vi = v.data() + i * kValues;
              if (!book.valid(codes.data() + i * 2) || std::isnan(xi[0]) || std::isinf(bias[test::size(i)])) {
                ++missing_count;
                for (size_t d = 0; d < kValues; ++d) missing_sum[d] += double(vi[d]);
                continue;
              }
              user.x.push_back({xi, xi + kWidth});
              user.v.push_back({vi, vi + kValues});
              user.bias.push_back(double(bias[test::size(i)]));
              user.spread.push_back(0);
              leaf.push_back(book.leaf(codes.data() + i * 2));
            }
            for (int64_t a = 0; a < count[test::size(b)]; ++a) {
              if (!(temperature[test::size(a)] > 0)) continue;
              const float* const pa = p.data() + (b * kAgents + a) * kWidth;
              user.p.push_back({pa, pa + kWidth});
              user.tau.push_back(double(temperature[test::size(a)]));
              places.push_back(test::size(a));
            }
            if (method == Method::leaf) user = definition::by_leaf(user, leaf);
            const definition::Routed expected = definition::route(user, normalize, refine, kValues);
            std::vector<bool> seen(test::size(m));
            for (size_t j = 0; j < places.size(); ++j) {
              const int64_t at = b * m + static_cast<int64_t>(places[j]);
              seen[places[j]] = true;
              if (std::isinf(expected.lse[j]))
                CHECK(std::isinf(lse.data()[at]));
              else
                CHECK(double(lse.data()[at]) == doctest::Approx(expected.lse[j]).epsilon(2e-5));
              for (size_t d = 0; d < kValues; ++d)
                CHECK(double(tokens.data()[at * kValues + static_cast<int64_t>(d)]) ==
                      doctest::Approx(expected.tokens[j][d]).epsilon(2e-5).scale(1));
            }
            if (missing == Missing::token && missing_count > 0) {
              seen[test::size(m - 1)] = true;
              const int64_t at = b * m + m - 1;
              CHECK(double(lse.data()[at]) == doctest::Approx(std::log(missing_count)).epsilon(1e-6));
              for (size_t d = 0; d < kValues; ++d)
                CHECK(double(tokens.data()[at * kValues + static_cast<int64_t>(d)]) ==
                      doctest::Approx(missing_sum[d] / missing_count).epsilon(1e-5).scale(1));
            }
            for (int64_t a = 0; a < m; ++a) {
              if (seen[test::size(a)]) continue;
              CHECK(lse.data()[b * m + a] == -std::numeric_limits<float>::infinity());
              for (int64_t d = 0; d < kValues; ++d) CHECK(tokens.data()[(b * m + a) * kValues + d] == 0.f);
            }
          }
        }
}

TEST_CASE("attend: outputs and lse are the definition's") {
  Random random(6);
  constexpr int64_t kPairs = 700, kHeads = 2, kKey = 7, kValues = 9, kTokens = 21, kUsers = 2;
  const auto q = uniform(random, kPairs * kHeads * kKey, 3),
             keys = uniform(random, kUsers * kTokens * kHeads * kKey, 3);
  const auto values = uniform(random, kUsers * kTokens * kHeads * kValues);
  auto bias = uniform(random, kUsers * kTokens);
  bias[3] = std::numeric_limits<float>::quiet_NaN();
  for (size_t m = kTokens; m < 2 * kTokens - 1; ++m) bias[m] = -std::numeric_limits<float>::infinity();
  const std::vector<int64_t> offsets{0, 650, 700};
  const AttendInputs in{test::rows(q, kKey),
                        test::rows(keys, kKey),
                        test::rows(values, kValues),
                        kTokens,
                        kHeads,
                        test::histories(offsets),
                        {bias.data(), {kUsers, kTokens}},
                        .4f};
  Guarded<float> out(kPairs * kHeads * kValues), lse(kPairs * kHeads);
  REQUIRE(test::exactly(attend_workspace(test::sizing(1), in), nullptr, [&](const Context& c) {
    return attend(c, in, {{out.data(), DType::float32, kPairs * kHeads, kValues}, {lse.data(), {kPairs, kHeads}}});
  }));
  for (int64_t n = 0; n < kPairs; ++n)
    for (int64_t h = 0; h < kHeads; ++h) {
      const int64_t b = n >= 650;
      std::vector<double> z;
      std::vector<std::vector<double>> y;
      for (int64_t m = 0; m < kTokens; ++m) {
        const float shift = bias[test::size(b * kTokens + m)];
        if (!std::isfinite(shift)) continue;
        const int64_t at = (b * kTokens + m) * kHeads + h;
        double logit = 0;
        for (int64_t d = 0; d < kKey; ++d)
          logit += double(q[test::size((n * kHeads + h) * kKey + d)]) * double(keys[test::size(at * kKey + d)]);
        z.push_back(double(.4f) * logit + double(shift));
        const float* const value = values.data() + at * kValues;
        y.push_back({value, value + kValues});
      }
      std::vector<double> expected(kValues);
      double expected_lse;
      definition::aggregate(z, y, &expected, &expected_lse);
      CHECK(double(lse.data()[n * kHeads + h]) == doctest::Approx(expected_lse).epsilon(1e-5).scale(1));
      for (int64_t d = 0; d < kValues; ++d)
        CHECK(double(out.data()[(n * kHeads + h) * kValues + d]) ==
              doctest::Approx(expected[test::size(d)]).epsilon(1e-5).scale(1));
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
        const RouteInputs in{test::rows(x, 2),
                             test::rows(v, 2),
                             test::histories(offsets),
                             {p.data(), {1, 1, 2}},
                             {},
                             {bias.data(), {2}},
                             {},
                             nullptr};
        float tokens[2], lse[1];
        REQUIRE(test::exactly(route_workspace(test::sizing(1), params, in, 2), nullptr, [&](const Context& c) {
          return route(c, params, in, {{tokens, DType::float32, 1, 2}, {lse, {1, 1}}, {}});
        }));
        CHECK(tokens[0] == (large > 0 ? 1.f : 2.f));
        CHECK(tokens[1] == tokens[0]);
        CHECK(std::isfinite(lse[0]));
      }
}
