// SPDX-License-Identifier: Apache-2.0
// Tokens that differ in number have the bits of M tokens a user, the last of which are absent, for any number of
// workers; those of nobody have no gradient.
#include <doctest/doctest.h>

#include <limits>

#include "support.h"

using namespace hisac;
using Floats = std::vector<float>;

namespace {

constexpr int64_t kUsers = 4, kMost = 7, kHeads = 2, kKey = 5, kValue = 3, kCandidates = 90;
const std::vector<int64_t> kBounds{0, 1, 70, 70, 88};  // of candidates: two are nobody's
const std::vector<int64_t> kStarts{1, 4, 11, 11};      // of tokens: rows 0, 12 and 13 are nobody's
const std::vector<int64_t> kEnds{4, 11, 11, 12};       // the third user has none
constexpr int64_t kRows = 14;

/// keys [R, H, d], values [R, H, V] and bias [R], and candidates; then all that the verbs write, of sevens at first.
struct Attention {
  Floats keys, values, bias, q, d_out, d_lse, out, lse, dq, dk, dv, db;

  void call(AttendInputs in, const Executor& executor) {
    const int64_t groups = in.bias.shape[0], tokens = in.bias.shape[1], n = kCandidates * kHeads;
    out.assign(test::size(n * kValue), 7.f);
    lse.assign(test::size(n), 7.f);
    dq.assign(q.size(), 7.f);
    dk.assign(keys.size(), 7.f);
    dv.assign(values.size(), 7.f);
    db.assign(bias.size(), 7.f);
    const int workers = executor.workers;
    REQUIRE(test::exactly(attend_workspace(test::sizing(workers), in), &executor, [&](const Context& c) {
      return attend(c, in, {rows(out.data(), n, kValue), array(lse.data(), kCandidates, kHeads)});
    }));
    const AttendForward forward{test::rows(d_out, kValue), test::matrix(d_lse, kCandidates, kHeads),
                                test::rows(out, kValue), test::matrix(lse, kCandidates, kHeads)};
    const AttendGradients gradients{array(dq.data(), kCandidates, kHeads, kKey),
                                    array(dk.data(), groups, tokens, kHeads, kKey),
                                    array(dv.data(), groups, tokens, kHeads, kValue), array(db.data(), groups, tokens)};
    REQUIRE(test::exactly(attend_backward_workspace(test::sizing(workers), in), &executor,
                          [&](const Context& c) { return attend_backward(c, in, forward, gradients); }));
  }
};

AttendInputs inputs(const Attention& a, int64_t groups, int64_t tokens) {
  AttendInputs in;
  in.q = test::rows(a.q, kKey);
  in.keys = test::rows(a.keys, kKey);
  in.values = test::rows(a.values, kValue);
  in.agents = tokens;
  in.heads = kHeads;
  in.candidates = test::spans(kBounds);
  in.bias = test::matrix(a.bias, groups, tokens);
  return in;
}

/// n elements a row: rows of users from the one to M rows each in the other; what is not given is zero.
Floats padded(const Floats& rows, int64_t n) {
  Floats out(test::size(kUsers * kMost * n));
  for (size_t b = 0; b < test::size(kUsers); ++b)
    std::copy(rows.begin() + kStarts[b] * n, rows.begin() + kEnds[b] * n,
              out.begin() + static_cast<int64_t>(b) * kMost * n);
  return out;
}

}  // namespace

TEST_CASE("tokens that differ in number are those of M places, some of them empty") {
  test::Random random(31);
  Attention a;
  a.keys = test::uniform(random, kRows * kHeads * kKey, 2);
  a.values = test::uniform(random, kRows * kHeads * kValue);
  a.bias = test::uniform(random, kRows);
  a.q = test::uniform(random, kCandidates * kHeads * kKey, 2);
  a.d_out = test::uniform(random, kCandidates * kHeads * kValue);
  a.d_lse = test::uniform(random, kCandidates * kHeads);
  Attention b = a;
  b.keys = padded(a.keys, kHeads * kKey);
  b.values = padded(a.values, kHeads * kValue);
  b.bias = padded(a.bias, 1);
  for (size_t u = 0; u < test::size(kUsers); ++u)
    std::fill_n(b.bias.begin() + static_cast<int64_t>(u) * kMost + (kEnds[u] - kStarts[u]),
                kMost - (kEnds[u] - kStarts[u]), -std::numeric_limits<float>::infinity());
  for (int workers : {1, 3}) {
    test::Threads threads{workers};
    const Executor executor = threads.executor();
    b.call(inputs(b, kUsers, kMost), executor);
    for (int64_t stated : {int64_t{0}, kMost, int64_t{30}}) {
      CAPTURE(stated);
      AttendInputs in = inputs(a, 1, kRows);
      in.agents = stated;
      in.tokens = {kStarts.data(), kEnds.data(), DType::int64, kUsers};
      a.call(in, executor);
      CHECK((a.out == b.out && a.lse == b.lse && a.dq == b.dq));
      CHECK((padded(a.dk, kHeads * kKey) == b.dk && padded(a.dv, kHeads * kValue) == b.dv));
      CHECK(padded(a.db, 1) == b.db);
      for (int64_t row : {0, 12, 13}) {
        CHECK(a.db[test::size(row)] == 0);
        for (int64_t i = 0; i < kHeads * kKey; ++i) CHECK(a.dk[test::size(row * kHeads * kKey + i)] == 0);
        for (int64_t i = 0; i < kHeads * kValue; ++i) CHECK(a.dv[test::size(row * kHeads * kValue + i)] == 0);
      }
    }
  }
}

TEST_CASE("a batch without users may have offsets, tokens and gradients that are null") {
  AttendInputs in;
  in.q.width = in.keys.width = 2;
  in.values.width = 3;
  in.heads = 1;
  for (const bool offsets : {false, true}) {
    const int64_t none[] = {0};
    in.tokens = offsets ? hisac::offsets(none, 0) : Spans{};
    in.bias = {nullptr, {1, 0}};
    const Attended out{{nullptr, DType::float32, 0, 3}, {nullptr, {0, 1}}};
    const AttendGradients gradients{
        {nullptr, {0, 1, 2}}, {nullptr, {1, 0, 1, 2}}, {nullptr, {1, 0, 1, 3}}, {nullptr, {1, 0}}};
    const AttendForward forward{
        {nullptr, DType::float32, 0, 3}, {}, {nullptr, DType::float32, 0, 3}, {nullptr, {0, 1}}};
    const auto forwards = [&](const Context& context) { return attend(context, in, out); };
    const auto back = [&](const Context& context) { return attend_backward(context, in, forward, gradients); };
    CHECK(test::exactly(attend_workspace(test::sizing(1), in), nullptr, forwards));
    CHECK(test::exactly(attend_backward_workspace(test::sizing(1), in), nullptr, back));
  }
}
