// SPDX-License-Identifier: Apache-2.0
// `compress` has the bits of the verbs it stands for, for every way through it, in a workspace of exactly its size.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "right.h"

using namespace hisac;
using test::Guarded;
using test::Random;

namespace {

constexpr int64_t kWidth = 3, kValues = 2, kSeats = 6;

struct Batch {
  Batch(Random& random, const std::vector<int64_t>& lengths) : book(test::codebook(random, {6, 5}, kWidth)) {
    for (int64_t n : lengths) bounds.push_back(bounds.back() + n);
    x = test::uniform(random, bounds.back() * kWidth);
    v = test::uniform(random, bounds.back() * kValues);
    bias = test::uniform(random, bounds.back());
    for (size_t i = 0; i < x.size(); i += 601) x[i] = std::numeric_limits<float>::quiet_NaN();
    in.x = rows(x.data(), bounds.back(), kWidth);
    in.v = rows(v.data(), bounds.back(), kValues);
    in.offsets = offsets(bounds.data(), users());
    in.bias = array<const float>(bias.data(), bounds.back());
    params.vote.budget = kSeats;
    params.route = {Normalize::agents, array<const float>(&tau, 1)};
  }
  int64_t users() const { return static_cast<int64_t>(bounds.size()) - 1; }

  Codebook book;
  std::vector<int64_t> bounds{0};
  std::vector<float> x, v, bias;
  float tau = 0.2f;
  Histories in;
  CompressParams params;
};

/// Every array of a result.
struct Result {
  explicit Result(const Batch& b)
      : tokens(b.users() * kSeats * kValues),
        lse(b.users() * kSeats),
        log_share(b.users() * kSeats),
        mean_x(b.users() * kSeats * kWidth),
        prototypes(b.users() * kSeats * kWidth),
        codes(b.users() * kSeats * 2),
        count(b.users()),
        votes(b.users() * kSeats) {
    const int64_t n = b.users();
    out.tokens = {{tokens.data(), DType::float32, n * kSeats, kValues},
                  array(lse.data(), n, kSeats),
                  array(mean_x.data(), n, kSeats, kWidth)};
    out.log_share = array(log_share.data(), n, kSeats);
    out.agents = {array(codes.data(), n, kSeats, 2), array(votes.data(), n, kSeats), array(count.data(), n),
                  b.book.fingerprint(), array(prototypes.data(), n, kSeats, kWidth)};
  }
  bool intact() {
    return tokens.intact() && lse.intact() && log_share.intact() && mean_x.intact() && prototypes.intact() &&
           codes.intact() && count.intact() && votes.intact();
  }
  bool same_tokens(Result& o) {
    return std::memcmp(tokens.data(), o.tokens.data(), test::size(tokens.count()) * 4) == 0 &&
           std::memcmp(lse.data(), o.lse.data(), test::size(lse.count()) * 4) == 0;
  }
  bool same_agents(Result& o) {
    return codes.values() == o.codes.values() && votes.values() == o.votes.values() &&
           count.values() == o.count.values() && prototypes.values() == o.prototypes.values();
  }

  Guarded<float> tokens, lse, log_share, mean_x, prototypes;
  Guarded<int32_t> codes, count;
  Guarded<int64_t> votes;
  Compressed out;
};

/// The verbs one by one.
void by_hand(const Batch& b, Method method, Result& r) {
  const int64_t t = b.bounds.back();
  std::vector<int32_t> codes(test::size(t * 2));
  Histories in = b.in;
  in.codes = array<const int32_t>(codes.data(), t, 2);
  REQUIRE(test::exactly(encode_workspace({}, b.book), nullptr,
                        [&](const Context& c) { return encode(c, b.book, in.x, array(codes.data(), t, 2)); }));
  REQUIRE(test::exactly(vote_workspace({}, b.book, b.params.vote, in), nullptr,
                        [&](const Context& c) { return vote(c, b.book, b.params.vote, in, r.out.agents); }));
  std::vector<float> x(test::size(t * kWidth)), v(test::size(t * kValues)), bias(test::size(t)), spread(test::size(t));
  std::vector<int64_t> starts(test::size(b.users() + 1)), votes(test::size(t));
  std::vector<int32_t> leaf(test::size(t * 2));
  const LeafSums sums{
      array(x.data(), t, kWidth), array(v.data(), t, kValues), {starts.data(), starts.data() + 1, b.users()},
      array(leaf.data(), t, 2),   array(bias.data(), t),       array(spread.data(), t),
      array(votes.data(), t)};
  const Codebook* book = &b.book;
  const RouteParams& route_params = b.params.route;
  if (method == Method::leaf) {
    REQUIRE(test::exactly(leaf_sums_workspace({}, b.book, in), nullptr,
                          [&](const Context& c) { return leaf_sums(c, b.book, in, sums); }));
    in = sums.histories();
    if (!route_params.sparse) book = nullptr;
  }
  REQUIRE(
      test::exactly(route_workspace({}, book, route_params, in, r.out.agents, r.out.tokens), nullptr,
                    [&](const Context& c) { return route(c, book, route_params, in, r.out.agents, r.out.tokens); }));
}

}  // namespace

TEST_CASE("compress and route: the temperature of the codebook") {
  Random random{72};
  Batch b(random, {300, 0, 50});
  const Array<const float, 2> centers[] = {array(b.book.centers(0), b.book.size(0), kWidth),
                                           array(b.book.centers(1), b.book.size(1), kWidth)};
  FitReport report;
  report.rows = 350;
  report.error[0] = 1;
  report.error[1] = 0.5;
  Codebook book;
  REQUIRE(Codebook::build(centers, 2, &book, &report).ok());
  CHECK(book.temperature() == static_cast<float>(kTemperatureOfError * 0.5));
  CHECK(book.report()->error[1] == 0.5);
  const float tau = book.temperature();
  for (const Method method : {Method::exact, Method::leaf}) {
    Result given(b), own(b);
    b.params.method = method;
    for (Result* const result : {&given, &own}) {
      b.params.route.temperature = result == &given ? array(&tau, 1) : Array<const float, 1>{};
      const size_t bytes = compress_workspace({}, book, b.params, b.in, result->out);
      REQUIRE(test::exactly(bytes, nullptr,
                            [&](const Context& c) { return compress(c, book, b.params, b.in, result->out); }));
    }
    CHECK(own.same_tokens(given));
  }
}

TEST_CASE("compress: the bits of its verbs") {
  Random random{71};
  // the second has more rows than leaf sums are made of at a time, of one user and of several
  for (const std::vector<int64_t>& lengths :
       {std::vector<int64_t>{3000, 0, 40, 2100, 1}, std::vector<int64_t>{70000, 100, 40000, 0, 30000, 66000}}) {
    Batch b(random, lengths);
    std::vector<int32_t> codes(test::size(b.bounds.back() * 2));
    REQUIRE(test::exactly(encode_workspace({}, b.book), nullptr, [&](const Context& c) {
      return encode(c, b.book, b.in.x, array(codes.data(), b.bounds.back(), 2));
    }));
    for (int way = 0; way < 4; ++way) {
      const Method method = way % 2 ? Method::leaf : Method::exact;
      const int64_t sparse = way / 2;
      CAPTURE(static_cast<int>(method));
      CAPTURE(sparse);
      b.params.route.sparse = sparse;
      Result expected(b);
      by_hand(b, method, expected);
      b.params.method = method;
      const auto run = [&](const Histories& in, const Compressed& out, int workers) {
        test::Backwards manner{workers, 3};
        const Executor executor = manner.executor();
        const size_t bytes = compress_workspace(test::sizing(workers), b.book, b.params, in, out);
        REQUIRE(
            test::exactly(bytes, &executor, [&](const Context& c) { return compress(c, b.book, b.params, in, out); }));
      };
      for (const int workers : {1, 3}) {
        Result whole(b), tokens_only(b), later(b);
        run(b.in, whole.out, workers);
        CHECK(whole.same_tokens(expected));
        CHECK(whole.same_agents(expected));
        CHECK(whole.mean_x.values() == expected.mean_x.values());

        Histories coded = b.in;
        coded.codes = array<const int32_t>(codes.data(), b.bounds.back(), 2);
        tokens_only.out.agents = {};
        tokens_only.out.tokens.mean_x = {};
        run(coded, tokens_only.out, workers);
        CHECK(tokens_only.same_tokens(expected));
        CHECK(tokens_only.mean_x.holds(0x5a));

        Agents kept = whole.out.agents;
        for (const bool with_prototypes : {true, false}) {
          if (!with_prototypes) kept.prototypes = {};
          b.params.agents = &kept;
          run(b.in, later.out, workers);
          CHECK(later.same_tokens(expected));
          CHECK(later.votes.holds(0x5a));
        }
        b.params.agents = nullptr;
        CHECK((whole.intact() && tokens_only.intact() && later.intact()));
      }
    }
  }
}

/// The shares of one user by the equations of Compressed.
void check_shares(const float* log_share, const float* lse, const int64_t* votes, Normalize normalize) {
  double sum = 0, weight[kSeats];
  for (int64_t a = 0; a < kSeats; ++a) {
    const bool mass = lse[a] > -INFINITY;
    const int64_t n = !mass ? 0 : votes ? std::max<int64_t>(votes[a], 0) : 1;
    sum += weight[a] = normalize == Normalize::agents ? std::exp(double(lse[a])) : static_cast<double>(n);
  }
  for (int64_t a = 0; a < kSeats; ++a) {
    if (weight[a] > 0)
      CHECK(log_share[a] == doctest::Approx(std::log(weight[a] / sum)).epsilon(1e-6));
    else
      CHECK(log_share[a] == -INFINITY);
  }
}

TEST_CASE("compress: the log of a token's share") {
  Random random{74};
  Batch b(random, {300, 0, 2, 500, 40});
  for (int i = 342; i < 842; ++i) b.bias[test::size(i)] = std::numeric_limits<float>::quiet_NaN();  // nothing is routed
  for (const Method method : {Method::exact, Method::leaf}) {
    b.params.method = method;
    for (const Normalize normalize : {Normalize::agents, Normalize::history}) {
      b.params.route.normalize = normalize;
      const auto run = [&](Result& r) {
        test::Workspace workspace(compress_workspace({}, b.book, b.params, b.in, r.out));
        REQUIRE(compress({workspace.array(), nullptr}, b.book, b.params, b.in, r.out).ok());
        CHECK((r.intact() && workspace.intact()));
      };
      const auto check = [&](Result& r, const int64_t* votes) {
        for (int64_t u = 0; u < b.users(); ++u)
          check_shares(r.log_share.data() + u * kSeats, r.lse.data() + u * kSeats, votes ? votes + u * kSeats : nullptr,
                       normalize);
      };
      Result all(b), bare(b), later(b), unwanted(b);
      run(all);
      check(all, all.votes.data());
      bare.out.agents = {};
      run(bare);
      CHECK(bare.log_share.values() == all.log_share.values());  // the votes were counted in the workspace

      Agents kept = all.out.agents;
      std::vector<int64_t> votes(test::size(b.users() * kSeats));
      for (size_t i = 0; i < votes.size(); ++i) votes[i] = static_cast<int64_t>(i % 7) - 1;
      votes[0] = std::numeric_limits<int64_t>::max();
      kept.votes = array(votes.data(), b.users(), kSeats);
      b.params.agents = &kept;
      run(later);
      check(later, votes.data());
      kept.votes = {};
      run(later);
      check(later, nullptr);
      b.params.agents = nullptr;
      unwanted.out.log_share = {};
      run(unwanted);
      CHECK((unwanted.log_share.holds(0x5a) && unwanted.same_tokens(all)));
    }
  }
}

/// Whether `mean` [count, width] has the means of `values` that `route` gives agents with these prototypes, by its
/// definition in float64.
void check_means(const Batch& b, int64_t user, int64_t count, const float* prototypes, const std::vector<float>& values,
                 int64_t width, const float* mean) {
  std::vector<double> sum(test::size(count * width)), mass(test::size(count)), u(test::size(count));
  for (int64_t i = b.bounds[test::size(user)]; i < b.bounds[test::size(user + 1)]; ++i) {
    const float* const x = b.x.data() + i * kWidth;
    if (std::isnan(x[0])) continue;
    double total = 0;
    for (int64_t a = 0; a < count; ++a) {
      double distance = 0;
      for (int64_t d = 0; d < kWidth; ++d) distance += std::pow(double(x[d]) - double(prototypes[a * kWidth + d]), 2);
      total += u[test::size(a)] = std::exp(-distance / double(b.tau));
    }
    for (int64_t a = 0; a < count; ++a) {
      const double weight = std::exp(double(b.bias[test::size(i)])) * u[test::size(a)] / total;
      mass[test::size(a)] += weight;
      for (int64_t d = 0; d < width; ++d)
        sum[test::size(a * width + d)] += weight * double(values[test::size(i * width + d)]);
    }
  }
  for (int64_t k = 0; k < count * width; ++k)
    CHECK(double(mean[k]) == doctest::Approx(sum[test::size(k)] / mass[test::size(k / width)]).epsilon(1e-5));
}

TEST_CASE("compress: prototypes that are refined, by its own calls") {
  Random random{75};
  Batch b(random, {40, 0, 25});
  Result first(b), second(b);
  const auto run = [&](const Compressed& out) {
    test::Workspace workspace(compress_workspace({}, b.book, b.params, b.in, out));
    REQUIRE(compress({workspace.array(), nullptr}, b.book, b.params, b.in, out).ok());
  };
  first.out.tokens.tokens = {};
  run(first.out);
  const std::vector<float> voted = first.prototypes.values();
  Agents refined = first.out.agents;
  for (int64_t a = 0; a < b.users() * kSeats; ++a)
    if (first.lse.data()[a] > -INFINITY)
      std::copy_n(first.mean_x.data() + a * kWidth, kWidth, refined.prototypes.data + a * kWidth);
  b.params.agents = &refined;
  run(second.out);

  for (int64_t u = 0; u < b.users(); ++u) {
    const int64_t count = first.count.data()[u], at = u * kSeats;
    check_means(b, u, count, voted.data() + at * kWidth, b.x, kWidth, first.prototypes.data() + at * kWidth);
    check_means(b, u, count, first.prototypes.data() + at * kWidth, b.v, kValues, second.tokens.data() + at * kValues);
  }
}

TEST_CASE("compress: lists of the agents, where they are wanted") {
  Random random{76};
  Batch b(random, {3000, 0, 400});
  for (const int64_t sparse : {0, 1, 3}) {
    b.params.route.sparse = sparse;
    const int64_t n = b.users() * b.book.size(0) * 3;
    Guarded<int32_t> lists(n, 77), later(n);
    Result plain(b), with(b);
    with.out.agents.lists = array(lists.data(), b.users(), b.book.size(0), 3);
    for (Result* const r : {&plain, &with})
      REQUIRE(test::exactly(compress_workspace({}, b.book, b.params, b.in, r->out), nullptr,
                            [&](const Context& c) { return compress(c, b.book, b.params, b.in, r->out); }));
    CHECK((with.same_tokens(plain) && with.same_agents(plain)));
    REQUIRE(test::exactly(agent_lists_workspace({}, b.book, with.out.agents), nullptr, [&](const Context& c) {
      return agent_lists(c, b.book, with.out.agents, array(later.data(), b.users(), b.book.size(0), 3));
    }));
    CHECK((lists.intact() && lists.values() == later.values()));
  }
}

TEST_CASE("compress: a workspace made before the batch is there") {
  Random random{72};
  const Batch b(random, {300, 20, 0, 500});
  Result r(b), expected(b);
  for (const Method method : {Method::exact, Method::leaf}) {
    CompressParams params = b.params;
    params.method = method;
    by_hand(b, method, expected);
    Histories later = b.in;
    later.offsets = {nullptr, nullptr, DType::int64, b.users()};
    later.longest = 500;
    test::Workspace workspace(compress_workspace({}, b.book, params, later, r.out));
    CHECK(compress({workspace.array(), nullptr}, b.book, params, b.in, r.out).ok());
    CHECK(r.same_tokens(expected));
  }
}

TEST_CASE("compress: errors") {
  const auto spoiled = [](auto spoil) {
    Random random{73};
    Batch b(random, {4, 2});
    Result r(b);
    CompressParams params = b.params;
    Histories in = b.in;
    spoil(params, in, r.out);
    test::Workspace workspace(compress_workspace({}, b.book, params, in, r.out));
    const Status status = compress({workspace.array(), nullptr}, b.book, params, in, r.out);
    const bool untouched = r.tokens.holds(0x5a) && r.lse.holds(0x5a) && r.log_share.holds(0x5a) &&
                           r.mean_x.holds(0x5a) && r.prototypes.holds(0x5a) && r.codes.holds(0x5a) &&
                           r.count.holds(0x5a) && r.votes.holds(0x5a);
    CHECK(untouched == !status.ok());  // no verb has written before another refuses
    return status;
  };
  CHECK(std::string(spoiled([](auto&&...) {}).what()) == "");
  test::invalid(spoiled([](auto&, Histories& in, auto&) { in.x = {}; }),
                "compress: codes expected, or x to encode, got neither");
  test::invalid(spoiled([](auto&, Histories& in, auto&) { in.offsets = {}; }), "compress: offsets expected, got none");
  test::invalid(spoiled([](auto&, Histories& in, auto&) { in.v = {}; }), "compress: v expected for tokens, got none");
  test::invalid(spoiled([](auto&, Histories& in, auto&) { in.x_ids = hisac::ids<int64_t>(nullptr, 6); }),
                "compress: x_ids expected [6], got null");
  test::invalid(spoiled([](auto&, Histories& in, auto&) { in.x.width = 4; }),
                "compress: x is [6, 4], the codebook has D = 3: D differs (4, 3)");
  const int64_t ids[] = {0, 1, 2, 3, 4, 5};
  test::invalid(spoiled([&](auto&, Histories& in, auto&) { in.x_ids = hisac::ids(ids, 6); }),
                "compress: codes expected, or x to encode, got no codes beside x_ids: encode the table once and keep "
                "them");
  test::invalid(spoiled([](auto&, auto&, Compressed& out) { out.tokens.lse.shape[1] = 7; }),
                "route: lse expected [2, 6], got [2, 7]");
  test::invalid(spoiled([](auto&, auto&, Compressed& out) { out.log_share.shape[0] = 3; }),
                "compress: log_share expected [2, 6], got [3, 6]");
  test::invalid(spoiled([](CompressParams& params, auto&, auto&) { params.vote = {}; }),
                "vote: expected exactly one of budget, fanout and beam, got 0");
  test::invalid(spoiled([](CompressParams& params, auto&, auto&) { params.vote = {0, {int64_t{1} << 40, 1 << 30}}; }),
                "vote: fanout expected a product of at most 4096, got more");
  test::invalid(spoiled([](CompressParams& params, auto&, auto&) { params.route.temperature = {}; }),
                "route: temperature expected, since the codebook has no default one, got none");
  test::is(spoiled([](auto&, auto&, Compressed& out) { out.tokens.tokens.dtype = DType::bfloat16; }), Code::wrong_type,
           "route: tokens expected of v's type, got another");
  test::invalid(spoiled([](auto&, Histories& in, auto&) { in.longest = 3; }),
                "vote: longest expected at least 4, got 3");
  const Agents other{{nullptr, {3, 6, 2}}, {}, {}};
  test::invalid(spoiled([&](CompressParams& params, auto&, auto&) { params.agents = &other; }),
                "compress: agents' codes expected [2, 6, 2], got [3, 6, 2]");
  int32_t codes[24] = {}, count[2] = {};
  const Agents foreign{array(codes, 2, 6, 2), {}, array(count, 2), 77};
  int64_t votes[12] = {};
  float prototypes[36] = {};
  const Agents old{array(codes, 2, 6, 2), array(votes, 1, 12), array(count, 2), 77,
                   array<float>(prototypes, 2, 6, kWidth)};
  Agents unmarked = old;  // without the fingerprint of their codebook, which prototypes need not have
  unmarked.fingerprint = 0;
  test::invalid(spoiled([&](CompressParams& params, auto&, auto&) {
                  params.agents = &unmarked;
                  params.route.normalize = Normalize::history;
                }),
                "compress: agents' votes expected [2, 6], got [1, 12]");
  for (const Agents* const kept : {&foreign, &old}) {
    const std::string refused = spoiled([&](CompressParams& params, auto&, auto&) { params.agents = kept; }).what();
    CHECK(refused.find("compress: agents expected of codebook ") == 0);
  }
  int32_t lists[48] = {};
  test::invalid(spoiled([&](auto&, auto&, Compressed& out) { out.agents.lists = array(lists, 2, 4, 6); }),
                "compress: agents' lists expected [2, 6, 6], got [2, 4, 6]");
}
