// SPDX-License-Identifier: Apache-2.0
// match and match_backward give what hisac.reference says, have the same bits for any number of workers, and refuse
// what is wrong in the words of the others.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "right.h"
#include "vectors.h"

using namespace hisac;
using test::Guarded;
using test::invalid;
using vectors::Case;

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

/// The inputs of a case, whose sums' codes follow from their number.
struct Matching {
  explicit Matching(const Case& c) : book(vectors::book(c)) {
    in.sums = vectors::histories(c);
    const Spans& spans = in.sums.offsets;
    int64_t leaves = 1;
    for (int l = 0; l < book.levels(); ++l) leaves *= book.size(l);
    for (int64_t b = 0; b < spans.users; ++b)
      for (int64_t k = 0, n = spans.end(b) - spans.start(b); k < n; ++k) {
        int64_t leaf = k * (leaves / n), below = leaves;
        for (int l = 0; l < book.levels(); ++l, leaf %= below) {
          below /= book.size(l);
          codes.push_back(static_cast<int32_t>(leaf / below));
        }
      }
    in.sums.codes = {codes.data(), {in.sums.v.rows, book.levels()}};
    in.codes = {c["asked"].ints.data(), {c["asked"].shape[0], book.levels()}};
    in.candidates = test::spans(c["candidate_offsets"].longs);
    forward = {c["d_v"].rows(), vectors::matrix(c, "d_lse")};
  }
  Codebook book;
  std::vector<int32_t> codes;
  MatchInputs in;
  MatchForward forward;
};

struct Found {
  std::vector<float> v, lse, d_v, d_bias;
  bool operator==(const Found& o) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0;
    };
    return same(v, o.v) && same(lse, o.lse) && same(d_v, o.d_v) && same(d_bias, o.d_bias);
  }
};

/// match and its backward, each in a workspace of exactly its size.
Found found(const Codebook& book, const MatchInputs& in, const MatchForward& forward,
            const Executor* executor = nullptr) {
  const int64_t n = in.size(), levels = book.levels(), rows = in.sums.v.rows, width = in.sums.v.width;
  const Context sizing = test::sizing(executor ? executor->workers : 1);
  Guarded<float> v(n * levels * width), lse(n * levels), d_v(rows * width), d_bias(rows);
  REQUIRE(test::exactly(match_workspace(sizing, book, in), executor, [&](const Context& context) {
    return match(context, book, in, {{v.data(), DType::float32, n * levels, width}, {lse.data(), {n, levels}}});
  }));
  REQUIRE(test::exactly(match_backward_workspace(sizing, book, in), executor, [&](const Context& context) {
    return match_backward(context, book, in, forward, {{d_v.data(), {rows, width}}, {d_bias.data(), {rows}}});
  }));
  CHECK((v.intact() && lse.intact() && d_v.intact() && d_bias.intact()));
  return {v.values(), lse.values(), d_v.values(), d_bias.values()};
}

}  // namespace

TEST_CASE("match and match_backward") {
  for (const Case& c : vectors::cases("match")) {
    const Matching m(c);
    const Found mine = found(m.book, m.in, m.forward);
    c.check_floats("out v", mine.v);
    c.check_floats("out lse", mine.lse);
    c.check_floats("grad v", mine.d_v);
    c.check_floats("grad bias", mine.d_bias);
    for (int workers : {2, 7}) {
      test::Backwards backwards{workers, 1};
      const Executor executor = backwards.executor();
      CHECK(found(m.book, m.in, m.forward, &executor) == mine);
    }
    test::OneSeat seat{5};
    const Executor executor = seat.executor();
    CHECK(found(m.book, m.in, m.forward, &executor) == mine);
  }
}

TEST_CASE("match: by hand") {
  test::Random random(1);
  const Codebook book = test::codebook(random, {3, 4}, 2);
  const std::vector<int32_t> codes{0, 1, 0, 3, 2, 2, 2, 3, 1, 1};
  const std::vector<float> v{1, 10, 3, 30, 7, 70, 9, 90, 5, 50}, bias{0, std::log(3.f), 2, kNone, 1};
  const std::vector<int64_t> offsets{0, 4, 4, 5}, candidates{1, 5, 6, 7};
  const std::vector<int32_t> table{0, 3, 0, 1, 2, 3, 1, 1, 0, -1};
  const std::vector<int32_t> rows{0, 0, 1, 2, 5, 0, 3, 0};  // the first and the last of no user, and 5 is no row
  MatchInputs in;
  in.sums.v = test::rows(v, 2);
  in.sums.offsets = test::spans(offsets);
  in.sums.codes = {codes.data(), {5, 2}};
  in.sums.bias = {bias.data(), {5}};
  in.codes = {table.data(), {5, 2}};
  in.ids = hisac::ids(rows.data(), 8);
  in.candidates = test::spans(candidates);
  const std::vector<float> d_v(32, 1.f), d_lse(16, 1.f);
  const Found mine = found(book, in, {test::rows(d_v, 2), {d_lse.data(), {8, 2}}});
  const float l1 = std::log(4.f), l2 = std::log(3.f);
  const std::vector<float> lse{kNone, kNone, l1, l2, l1, 0, 2, kNone, kNone, kNone, kNone, kNone, 1, 1, kNone, kNone};
  const std::vector<float> means{0, 0, 0, 0, 2.5, 25, 3, 30, 2.5, 25, 1, 10, 7, 70, 0, 0,
                                 0, 0, 0, 0, 0,   0,  0, 0,  5,   50, 5, 50, 0, 0,  0, 0};
  for (size_t i = 0; i < lse.size(); ++i) CHECK((mine.lse[i] == lse[i] || std::fabs(mine.lse[i] - lse[i]) < 1e-6f));
  for (size_t i = 0; i < means.size(); ++i) CHECK(std::fabs(mine.v[i] - means[i]) < 1e-5f);
  // two candidates share the node (0), of shares 1 / 4 and 3 / 4; each leaf has one candidate; (2) has one, and (1) one
  const std::vector<float> shares{0.5f + 1, 1.5f + 1, 1, 0, 2};
  for (size_t s = 0; s < 5; ++s) CHECK(std::fabs(mine.d_v[2 * s] - shares[s]) < 1e-6f);
  // (dlse + dv . (v - mean)) of both candidates: 1 + 11 (1 - 2.5) and 1 + 11 (3 - 2.5)
  const std::vector<float> d_bias{0.25f * 2 * (1 - 16.5f) + 1, 0.75f * 2 * (1 + 5.5f) + 1, 1, 0, 2};
  for (size_t s = 0; s < 5; ++s) CHECK(std::fabs(mine.d_bias[s] - d_bias[s]) < 1e-4f);
}

TEST_CASE("no users, no sums, no candidates, in every combination") {
  test::Random random(2);
  const Codebook book = test::codebook(random, {3, 4}, 2);
  const std::vector<int32_t> codes(20, 1);
  const std::vector<float> v(30, 1.f);
  for (const std::vector<int64_t>& sums : std::vector<std::vector<int64_t>>{{0}, {0, 0}, {0, 10}, {0, 0, 10}})
    for (int64_t n : {0, 3}) {
      const int64_t users = static_cast<int64_t>(sums.size()) - 1;
      std::vector<int64_t> candidates(sums.size(), n);
      candidates[0] = 0;
      MatchInputs in;
      in.sums.v = test::rows(v, 3);
      in.sums.offsets = test::spans(sums);
      in.sums.codes = {codes.data(), {10, 2}};
      in.codes = {codes.data(), {n, 2}};
      in.candidates = test::spans(candidates);
      const Found mine = found(book, in, {});
      const bool some = users == 1 && sums[1] == 10;
      for (float x : mine.lse) CHECK(x == (some ? std::log(10.f) : kNone));
      for (float x : mine.v) CHECK(x == (some ? 1.f : 0.f));
      for (float x : mine.d_v) CHECK(x == 0);
      for (float x : mine.d_bias) CHECK(x == 0);
    }
}

TEST_CASE("match: errors that Python cannot see") {
  struct Spoilt : test::Right {
    MatchInputs matching{sums.histories(), given, {}, test::spans(offsets)};
    std::vector<float> v_out = std::vector<float>(24), lse_out = std::vector<float>(12);
    Match matched{{v_out.data(), DType::float32, 12, 2}, {lse_out.data(), {6, 2}}};
    MatchForward match_forward{{v_out.data(), DType::float32, 12, 2}, {lse_out.data(), {6, 2}}};
    MatchGradients match_gradients{{sum_v.data(), {6, 2}}, {sum_bias.data(), {6}}};
  };
  const auto forward = [](auto spoil) {
    Spoilt r;
    spoil(r);
    return match(r.context, r.book, r.matching, r.matched);
  };
  const auto backward = [](auto spoil) {
    Spoilt r;
    spoil(r);
    return match_backward(r.context, r.book, r.matching, r.match_forward, r.match_gradients);
  };
  CHECK(forward([](Spoilt&) {}).ok());
  CHECK(backward([](Spoilt&) {}).ok());
  const Spoilt right;
  const Codebook none;
  invalid(match({}, none, right.matching, right.matched), "match: codebook expected, got an empty one");
  test::is(forward([](Spoilt& r) { r.matching.sums.v.dtype = DType::int8; }), Code::wrong_type,
           std::string("match: v") + test::kFloats);
  invalid(forward([](Spoilt& r) { r.matching.sums.v.width = 0; }), "match: expected V of 1 to 2^20, got 0");
  invalid(forward([](Spoilt& r) { r.matching.sums.codes.shape[0] = 5; }),
          "match: codes of sums expected [6, 2], got [5, 2]");
  invalid(forward([](Spoilt& r) { r.matching.sums.bias.shape[0] = 5; }), "match: bias expected [6], got [5]");
  invalid(forward([](Spoilt& r) { r.matching.sums.longest = 0, r.matching.sums.rows = 1; }),
          "match: rows expected at least 2, got 1");
  test::is(forward([](Spoilt& r) { r.matching.ids = {r.offsets.data(), DType::float32, 6}; }), Code::wrong_type,
           "match: ids expected int32 or int64");
  invalid(forward([](Spoilt& r) { r.matching.candidates.users = 1; }),
          "match: offsets of sums name 2 users, candidate_offsets 1: B differs");
  invalid(forward([](Spoilt& r) { std::swap(r.matching.candidates.starts, r.matching.candidates.ends); }),
          "match: candidate_offsets expected 0 <= start <= end <= 6 for every user, got [3, 0) for user 0");
  const char* const out = "match: out expected v [6, 2, 2] of the type of the sums' and lse [6, 2]";
  invalid(forward([](Spoilt& r) { r.matched.v.rows = 11; }), out);
  invalid(forward([](Spoilt& r) { r.matched.v.dtype = DType::float16; }), out);
  invalid(forward([](Spoilt& r) { r.matched.lse.shape[1] = 1; }), out);
  const char* const gradients = "match_backward: expected d_v [6, 2, 2] and d_lse [6, 2]";
  invalid(backward([](Spoilt& r) { r.match_forward.d_v.width = 3; }), gradients);
  invalid(backward([](Spoilt& r) { r.match_forward.d_lse.shape[0] = 5; }), gradients);
  test::is(backward([](Spoilt& r) { r.match_forward.d_v.dtype = DType::int32; }), Code::wrong_type,
           std::string("match_backward: d_v") + test::kFloats);
  invalid(backward([](Spoilt& r) { r.match_gradients.v.shape[0] = 5; }),
          "match_backward: dv expected [6, 2], got [5, 2]");
  invalid(backward([](Spoilt& r) { r.match_gradients.bias.shape[0] = 5; }),
          "match_backward: dbias expected [6], got [5]");
}

TEST_CASE("match on another device than the CPU") {
  test::Right r;
  MatchInputs in{r.sums.histories(), r.given, {}, test::spans(r.offsets)};
  r.context.device = Device::cuda;
  CHECK(match_workspace(r.context, r.book, in) == 0);
  std::vector<float> v(24), lse(12);
  test::is(match(r.context, r.book, in, {{v.data(), DType::float32, 12, 2}, {lse.data(), {6, 2}}}),
           Code::not_implemented, "match: expected enable_cuda() before a call on CUDA");
}
