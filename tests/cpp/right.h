// SPDX-License-Identifier: Apache-2.0
// Arguments of every verb that are right, and a check of an error word for word.
#pragma once
#include <doctest/doctest.h>

#include <string>

#include "support.h"

namespace test {

using namespace hisac;

inline void is(const Status& status, Code code, const std::string& message) {
  CHECK(std::string(status.what()) == message);
  CHECK(static_cast<int>(status.code()) == static_cast<int>(code));
}
inline void invalid(const Status& status, const std::string& message) { is(status, Code::invalid_argument, message); }

/// Arguments that are right, for tests to spoil one at a time: 2 users, 6 rows, D = 3, V = 2, M = 4, codes [2, 3].
struct Right {
  test::Random random{40};
  Codebook book = test::codebook(random, {2, 3}, 3);
  std::vector<float> x = std::vector<float>(18), v = std::vector<float>(12), p = std::vector<float>(24),
                     tokens = std::vector<float>(60), lse = std::vector<float>(10), one = std::vector<float>(1, 1.f);
  std::vector<int32_t> codes = std::vector<int32_t>(12), agents = std::vector<int32_t>(16), count{4, 4};
  std::vector<int64_t> votes = std::vector<int64_t>(8), offsets{0, 3, 6};
  test::Workspace workspace{1 << 20};
  Context context{workspace.array(), nullptr};
  VoteParams voting;
  Agents seats{{agents.data(), {2, 4, 2}}, {votes.data(), {2, 4}}, {count.data(), {2}}};
  Array<const int32_t, 2> given{codes.data(), {6, 2}};
  Histories voters = [this] {
    Histories h;
    h.offsets = test::spans(offsets);
    h.codes = given;
    return h;
  }();

  RouteParams params{Normalize::history, {one.data(), {1}}};
  const Codebook* routed_by = nullptr;
  Histories in{test::rows(x, 3), test::rows(v, 2), test::spans(offsets)};
  RouteAgents to{{p.data(), {2, 4, 3}}, {}};
  Tokens out{{tokens.data(), DType::float32, 8, 2}, {lse.data(), {2, 4}}, {}};
  RouteForward forward{
      {tokens.data(), DType::float32, 8, 2}, {lse.data(), {2, 4}}, {}, {tokens.data(), DType::float32, 8, 2}, {}, {}};
  RouteGradients gradients;
  std::vector<float> missed = std::vector<float>(6);
  Array<float, 1> missing_out{missed.data(), {6}};

  std::vector<float> sum_x = std::vector<float>(18), sum_v = std::vector<float>(12), sum_bias = std::vector<float>(6),
                     sum_spread = std::vector<float>(6), dsum = std::vector<float>(18);
  std::vector<int64_t> sum_starts{0, 1}, sum_ends{1, 2}, sum_votes = std::vector<int64_t>(6);
  std::vector<int32_t> sum_codes = std::vector<int32_t>(12);
  LeafSums sums{{sum_x.data(), {6, 3}},     {sum_v.data(), {6, 2}}, {sum_starts.data(), sum_ends.data(), 2},
                {sum_codes.data(), {6, 2}}, {sum_bias.data(), {6}}, {sum_spread.data(), {6}},
                {sum_votes.data(), {6}}};
  LeafSumsForward sums_forward{
      sums.histories(), {dsum.data(), {6, 3}}, {dsum.data(), {6, 2}}, {dsum.data(), {6}}, {dsum.data(), {6}}};
  LeafSumsGradients leaf_gradients{{tokens.data(), {6, 2}}, {missed.data(), {6}}};

  AttendInputs attention{test::rows(v, 2),
                         {x.data(), DType::float32, 4, 2},
                         {p.data(), DType::float32, 4, 3},
                         2,
                         1,
                         test::spans(offsets),
                         {},
                         1};  // N = 6, M = 2, d = 2, V = 3
  Attended attended{{tokens.data(), DType::float32, 6, 3}, {lse.data(), {6, 1}}};
  AttendForward attend_forward{
      {tokens.data(), DType::float32, 6, 3}, {}, {tokens.data(), DType::float32, 6, 3}, {lse.data(), {6, 1}}};
  std::vector<float> dq = std::vector<float>(12), dk = std::vector<float>(8), dv = std::vector<float>(12),
                     db = std::vector<float>(4);
  AttendGradients attend_gradients{{dq.data(), {6, 1, 2}}, {dk.data(), {2, 2, 1, 2}}, {dv.data(), {2, 2, 1, 3}}, {}};

  Right() { voting.budget = 4; }

  Status vote() { return hisac::vote(context, book, voting, voters, seats); }
  Status route() { return hisac::route(context, routed_by, params, in, to, out); }
  Status route_backward() { return hisac::route_backward(context, routed_by, params, in, to, forward, gradients); }
  Status missing() { return hisac::missing(context, routed_by, in, missing_out); }
  Status leaf_sums() { return hisac::leaf_sums(context, book, in, sums); }
  Status leaf_sums_backward() { return hisac::leaf_sums_backward(context, book, in, sums_forward, leaf_gradients); }
  Status attend() { return hisac::attend(context, attention, attended); }
  Status attend_backward() { return hisac::attend_backward(context, attention, attend_forward, attend_gradients); }
};

constexpr const char* kFloats = " expected float32, bfloat16 or float16";

}  // namespace test
