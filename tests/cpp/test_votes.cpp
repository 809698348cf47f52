// SPDX-License-Identifier: Apache-2.0
// How many votes float weights have; and leaf sums vote as their behaviours do, also where none is present.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "support.h"

using namespace hisac;
using test::Guarded;
using test::Random;
using test::uniform;

namespace {

constexpr int64_t kWidth = 3, kValues = 2;

/// Weights of some kind, of which one vector has numbers, or none.
struct Kind {
  std::string name;
  std::vector<float> floats{};
  std::vector<int64_t> whole{};
  Weights weights() const {
    if (!whole.empty()) return {whole.data(), DType::int64, static_cast<int64_t>(whole.size())};
    return {floats.empty() ? nullptr : floats.data(), DType::float32, static_cast<int64_t>(floats.size())};
  }
};

std::vector<Kind> kinds(Random& random, int64_t rows) {
  const auto bits = [&](int dropped) {  // random floats at or above 0, and NaN, by their bits
    std::vector<float> out(test::size(rows));
    for (float& w : out) {
      const uint32_t b = static_cast<uint32_t>(random.bits() >> dropped);
      std::memcpy(&w, &b, 4);
    }
    return out;
  };
  std::vector<Kind> out{{"none"},
                        {"floats", uniform(random, rows, 16)},
                        {"equal floats", std::vector<float>(test::size(rows), 0.7f)},
                        {"floats of all sizes", bits(33)},
                        {"subnormal floats", bits(41)},
                        {"floats and infinities", uniform(random, rows)}};
  for (size_t i = 1; i < test::size(rows); i += 50) {
    const float infinity = std::numeric_limits<float>::infinity();
    out.back().floats[i] = i % 4 == 1 ? infinity : i % 4 == 2 ? -infinity : std::numeric_limits<float>::max();
  }
  for (const char* name : {"few", "of all sizes", "largest"}) {
    Kind kind{std::string("int64, ") + name};
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t any = static_cast<int64_t>(random.bits()) >> random.below(64), few = random.below(20) - 3;
      kind.whole.push_back(name == std::string("few") ? few : name == std::string("largest") ? INT64_MAX : any);
    }
    out.push_back(kind);
  }
  return out;
}

/// Histories of 3,000, 0, 40 and 2,100 rows. Those of leaves (2, ..) and of the third user only vote.
struct Batch {
  explicit Batch(Random& random)
      : book(test::codebook(random, {6, 5}, kWidth)),
        x(uniform(random, rows * kWidth)),
        v(uniform(random, rows * kValues)),
        bias(uniform(random, rows)),
        codes(test::size(rows * 2)) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (int64_t i = 0; i < rows; ++i) {
      int32_t* const code = codes.data() + 2 * i;
      code[0] = static_cast<int32_t>(random.below(50) ? std::min(random.below(6), random.below(6)) : -1);
      code[1] = static_cast<int32_t>(random.below(5));
      const bool votes_only = code[0] == 2 || (i >= offsets[2] && i < offsets[3]);
      if (votes_only && i % 2) bias[test::size(i)] = nan;
      if (votes_only && i % 2 == 0) x[test::size(i * kWidth)] = nan;
    }
    in.x = test::rows(x, kWidth);
    in.v = test::rows(v, kValues);
    in.offsets = test::spans(offsets);
    in.codes = {codes.data(), {rows, 2}};
    in.bias = {bias.data(), {rows}};
  }
  Codebook book;
  std::vector<int64_t> offsets{0, 3000, 3000, 3040, 5140};
  int64_t rows = offsets.back(), users = 4;
  std::vector<float> x, v, bias;
  std::vector<int32_t> codes;
  Histories in;
};

/// The leaf sums of histories, of all users together or of each where its rows are.
struct Sums {
  Sums(const Codebook& book, const Histories& in, bool together, int workers)
      : rows(in.behaviours()), starts(in.offsets.users + 1), ends(in.offsets.users) {
    test::Backwards manner{workers, 1};
    const Executor executor = manner.executor();
    sums = {{x.data(), {rows, kWidth}},
            {v.data(), {rows, kValues}},
            {starts.data(), together ? starts.data() + 1 : ends.data(), in.offsets.users},
            {codes.data(), {rows, 2}},
            {bias.data(), {rows}},
            {spread.data(), {rows}},
            {votes.data(), {rows}}};
    REQUIRE(test::exactly(leaf_sums_workspace(test::sizing(workers), book, in), &executor,
                          [&](const Context& c) { return leaf_sums(c, book, in, sums); }));
    CHECK((x.intact() && v.intact() && bias.intact() && spread.intact()));
    CHECK((starts.intact() && ends.intact() && votes.intact() && codes.intact()));
  }
  int64_t rows;
  Guarded<float> x{rows * kWidth}, v{rows * kValues}, bias{rows}, spread{rows};
  Guarded<int64_t> starts, ends, votes{rows};
  Guarded<int32_t> codes{rows * 2};
  LeafSums sums;
};

struct Voted {
  std::vector<int32_t> codes, count;
  std::vector<int64_t> votes;
  bool operator==(const Voted& o) const { return codes == o.codes && count == o.count && votes == o.votes; }
};

Voted voted(const Codebook& book, const VoteParams& params, const Histories& in) {
  const int64_t users = in.offsets.users, m = seats(params, book.levels());
  Voted out{std::vector<int32_t>(test::size(users * m * 2)), std::vector<int32_t>(test::size(users)),
            std::vector<int64_t>(test::size(users * m))};
  REQUIRE(test::exactly(vote_workspace(test::sizing(1), book, params, in), nullptr, [&](const Context& c) {
    return vote(c, book, params, in,
                {{out.codes.data(), {users, m, 2}}, {out.votes.data(), {users, m}}, {out.count.data(), {users}}});
  }));
  return out;
}

}  // namespace

TEST_CASE("vote over leaf sums: the agents and the votes of the behaviours") {
  Random random(61);
  Batch batch(random);
  for (const Kind& kind : kinds(random, batch.rows)) {
    CAPTURE(kind.name);
    batch.in.weights = kind.weights();
    for (bool together : {true, false})
      for (int workers : {1, 3}) {
        CAPTURE(together);
        CAPTURE(workers);
        const Sums sums(batch.book, batch.in, together, workers);
        for (const VoteParams& params :
             {VoteParams{1, {}}, {7, {}}, {30, {}}, {0, {1, 1}}, {0, {4, 3}}, {0, {}, {3, 12}}}) {
          const Voted expected = voted(batch.book, params, batch.in);
          CHECK((expected.count[0] > 0 && expected.count[1] == 0 && expected.count[2] > 0 && expected.count[3] > 0));
          CHECK((voted(batch.book, params, sums.sums.histories()) == expected));
        }
      }
  }
}

TEST_CASE("vote: float weights have a bit less from 2^16 rows that vote on, and rows that do not are not counted") {
  constexpr int64_t kRows = (1 << 16) + 4;
  Random random(64);
  const Codebook book = test::codebook(random, {6, 5}, kWidth);
  const std::vector<int64_t> offsets{0, kRows};
  std::vector<int32_t> codes(kRows * 2);
  for (int32_t& code : codes) code = static_cast<int32_t>(random.below(5));
  std::vector<float> weights(kRows, 0.3f);
  weights[70] = 0;
  weights[7000] = std::numeric_limits<float>::quiet_NaN();
  weights[8000] = -3;
  codes[2 * 9000] = -1;
  weights[9000] = 0.9f;  // nor is it the largest
  Histories in;
  in.offsets = test::spans(offsets);
  in.codes = {codes.data(), {kRows, 2}};
  in.weights = {weights.data(), DType::float32, kRows};
  const auto total = [&] {
    int64_t sum = 0;
    for (int64_t n : voted(book, {30, {}}, in).votes) sum += n;
    return sum;
  };
  CHECK(total() == int64_t{1} << (16 + 23));
  weights[0] = 0;
  CHECK(total() == ((int64_t{1} << 16) - 1) << 24);
}

TEST_CASE("vote over leaf sums: a leaf with nearly all the votes there can be") {
  constexpr int64_t kRows = 40000;
  Random random(62);
  const Codebook book = test::codebook(random, {6, 5}, kWidth);
  const auto x = uniform(random, kRows * kWidth), v = uniform(random, kRows * kValues);
  const std::vector<int64_t> offsets{0, kRows};
  std::vector<int32_t> codes(kRows * 2, 3);
  codes[0] = codes[1] = 1;  // of a single row
  Histories in;
  in.x = test::rows(x, kWidth);
  in.v = test::rows(v, kValues);
  in.offsets = test::spans(offsets);
  in.codes = {codes.data(), {kRows, 2}};
  const Kind equal{"equal floats", std::vector<float>(kRows, 1)},
      largest{"largest int64", {}, std::vector<int64_t>(kRows, INT64_MAX)};
  for (const Kind& kind : {equal, largest}) {
    CAPTURE(kind.name);
    in.weights = kind.weights();
    const Sums sums(book, in, true, 1);
    const Voted expected = voted(book, {2, {}}, in), over_sums = voted(book, {2, {}}, sums.sums.histories());
    CHECK(expected.votes[0] == 39999 * expected.votes[1]);
    CHECK(expected.votes[0] >= int64_t{1} << 39);
    CHECK(over_sums.votes == expected.votes);
    CHECK(over_sums.codes == expected.codes);
  }
}

TEST_CASE("a leaf that only votes is in the sums, without x, v and spread, and gets and gives no gradient") {
  constexpr int64_t kAgents = 3;
  Random random(63);
  Batch batch(random);
  const auto p = uniform(random, batch.users * kAgents * kWidth), d = uniform(random, batch.users * kAgents * kValues);
  const auto d_lse = uniform(random, batch.users * kAgents);
  const float tau = 0.5f;
  const std::vector<Kind> all = kinds(random, batch.rows);
  for (Normalize normalize : {Normalize::history, Normalize::agents})
    for (const Kind& kind : {all[0], all[1]}) {
      CAPTURE(kind.name);
      batch.in.weights = kind.weights();
      const Sums memory(batch.book, batch.in, true, 1);
      const LeafSums& sums = memory.sums;
      const Histories over = sums.histories();
      const int64_t s = memory.rows, n = sums.offsets.ends[batch.users - 1], m = batch.users * kAgents;
      const RouteParams params{normalize, {&tau, {1}}};
      const RouteAgents agents{{p.data(), {batch.users, kAgents, kWidth}}, {}};
      std::vector<float> tokens(test::size(m * kValues)), lse(test::size(m));
      const Rows of_tokens = test::rows(tokens, kValues);
      const Tokens out{{tokens.data(), DType::float32, m, kValues}, {lse.data(), {batch.users, kAgents}}, {}};
      REQUIRE(test::exactly(route_workspace(test::sizing(1), nullptr, params, over, agents, out), nullptr,
                            [&](const Context& c) { return route(c, nullptr, params, over, agents, out); }));
      const RouteForward forward{of_tokens,
                                 {lse.data(), {batch.users, kAgents}},
                                 {},
                                 test::rows(d, kValues),
                                 {d_lse.data(), {batch.users, kAgents}},
                                 {}};
      Guarded<float> dx(s * kWidth), dv(s * kValues), dbias(s), dspread(s), dp(m * kWidth), dtau(1);
      const RouteGradients gradients{{dx.data(), {s, kWidth}},
                                     {dv.data(), {s, kValues}},
                                     {dbias.data(), {s}},
                                     {dspread.data(), {s}},
                                     {dp.data(), {batch.users, kAgents, kWidth}},
                                     {dtau.data(), {1}}};
      REQUIRE(test::exactly(
          route_backward_workspace(test::sizing(1), nullptr, params, over, agents, forward, gradients), nullptr,
          [&](const Context& c) { return route_backward(c, nullptr, params, over, agents, forward, gradients); }));
      for (Guarded<float>* g : {&dx, &dv, &dbias, &dspread, &dp, &dtau})
        CHECK(std::all_of(g->data(), g->data() + g->count(), [](float f) { return std::isfinite(f); }));
      int64_t only_vote = 0;
      for (int64_t i = 0; i < n; ++i) {
        const bool third = i >= sums.offsets.starts[2] && i < sums.offsets.ends[2];
        const bool present = std::isfinite(sums.bias.data[i]);
        CHECK(present == (!third && sums.codes.data[2 * i] != 2));
        if (present) continue;
        ++only_vote;
        CHECK(sums.bias.data[i] == -std::numeric_limits<float>::infinity());
        CHECK(sums.votes.data[i] > 0);
        const auto zeros = [i](const float* rows, int64_t width) {
          return std::all_of(rows + i * width, rows + (i + 1) * width, [](float f) { return f == 0; });
        };
        CHECK((zeros(sums.x.data, kWidth) && zeros(sums.v.data, kValues) && zeros(sums.spread.data, 1)));
        CHECK((zeros(dx.data(), kWidth) && zeros(dv.data(), kValues) && zeros(dbias.data(), 1)));
        CHECK(zeros(dspread.data(), 1));
      }
      CHECK(only_vote > 15);
      const int64_t t = batch.rows;
      for (int64_t i = 0; i < n; ++i)  // what such a leaf is given goes nowhere
        if (!std::isfinite(sums.bias.data[i])) dbias.data()[i] = dv.data()[i * kValues] = NAN;
      const LeafSumsForward summed{
          over, {dx.data(), {s, kWidth}}, {dv.data(), {s, kValues}}, {dbias.data(), {s}}, {dspread.data(), {s}}};
      Guarded<float> to_v(t * kValues), to_bias(t);
      const LeafSumsGradients to{{to_v.data(), {t, kValues}}, {to_bias.data(), {t}}};
      REQUIRE(test::exactly(leaf_sums_backward_workspace(test::sizing(1), batch.book, batch.in, to), nullptr,
                            [&](const Context& c) { return leaf_sums_backward(c, batch.book, batch.in, summed, to); }));
      int64_t given = 0;
      for (int64_t i = 0; i < t; ++i) {
        const float *const of_v = to_v.data() + i * kValues, of_bias = to_bias.data()[i];
        CHECK((std::isfinite(of_bias) && std::isfinite(of_v[0]) && std::isfinite(of_v[1])));
        const bool only_votes = batch.codes[test::size(2 * i)] == 2 || (i >= batch.offsets[2] && i < batch.offsets[3]);
        if (only_votes) CHECK((of_bias == 0 && of_v[0] == 0 && of_v[1] == 0));
        given += of_bias != 0 && of_v[0] != 0;
      }
      CHECK(given > t / 2);
    }
}
