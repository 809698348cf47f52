// SPDX-License-Identifier: Apache-2.0
// The errors of route, missing, leaf_sums and their backwards that Python cannot see, word for word.
#include <doctest/doctest.h>

#include <string>

#include "right.h"

using namespace hisac;
using test::invalid;
using test::is;
using test::kFloats;
using test::Right;

TEST_CASE("what is right is ok") {
  Right r;
  CHECK(std::string(r.vote().what()) == "");
  CHECK(std::string(r.route().what()) == "");
  CHECK(std::string(r.route_backward().what()) == "");
  CHECK(std::string(r.missing().what()) == "");
  r.in.codes = r.given;
  CHECK(std::string(r.leaf_sums().what()) == "");
  CHECK(std::string(r.leaf_sums_backward().what()) == "");
  CHECK(std::string(r.attend().what()) == "");
  CHECK(std::string(r.attend_backward().what()) == "");
  CHECK(Status().ok());
  CHECK(Status().code() == Code::ok);
}

TEST_CASE("route") {
  const auto spoiled = [](auto spoil) {
    Right r;
    spoil(r);
    return r.route();
  };
  is(spoiled([](Right& r) { r.in.x.dtype = DType::int32; }), Code::wrong_type,
     "route: x expected float32, bfloat16, float16 or int8");
  is(spoiled([](Right& r) { r.in.v.dtype = DType::int8; }), Code::wrong_type, std::string("route: v") + kFloats);
  is(spoiled([](Right& r) { r.in.v.dtype = DType::int64; }), Code::wrong_type, std::string("route: v") + kFloats);
  invalid(spoiled([](Right& r) { r.to.prototypes.shape[1] = (1 << 24) + 1; }),
          "route: expected at most 2^24 agents, got 16777217");
  invalid(spoiled([](Right& r) { r.params.temperature = {}; }),
          "route: temperature expected, since there is no codebook with a default one, got none");
  const Codebook none;
  invalid(spoiled([&](Right& r) { r.routed_by = &none; }), "route: codebook expected, got an empty one");
  invalid(spoiled([](Right& r) { r.routed_by = &r.book; }), "route: codes expected [6, 2], got [0, 0]");
  invalid(spoiled([](Right& r) {
            r.in.codes = r.given;
            r.in.x = {};
          }),
          "route: codes and their codebook expected where x is not given, got no codebook");
  invalid(spoiled([](Right& r) { r.out.lse.shape[1] = 5; }), "route: lse expected [2, 4], got [2, 5]");
  is(spoiled([](Right& r) { r.out.tokens.dtype = DType::float16; }), Code::wrong_type,
     "route: tokens expected of v's type, got another");
  invalid(spoiled([](Right& r) { r.out.tokens.rows = 7; }), "route: tokens expected [8, 2], got [7, 2]");
  invalid(spoiled([](Right& r) { r.in.v.data = nullptr; }), "route: v expected, got none");
  invalid(spoiled([](Right& r) { r.in.v = {}; }), "route: tokens expected [8, 0], got [8, 2]");
  invalid(spoiled([](Right& r) { r.in.v = {r.v.data(), DType::float32, 6, 0}; }),
          "route: expected D and V of 1 to 2^20, got 3 and 0");
  invalid(spoiled([](Right& r) { r.out.mean_x = {r.p.data(), {2, 4, 2}}; }),
          "route: mean_x expected [2, 4, 3], got [2, 4, 2]");
}

TEST_CASE("route: tokens, mean_x or lse alone, with v and without") {
  for (bool has_v : {true, false})
    for (bool has_tokens : {true, false})
      for (bool has_mean_x : {true, false}) {
        if (has_tokens && !has_v) continue;
        Right r;
        if (!has_v) r.in.v = {};
        if (!has_tokens) r.out.tokens = {};
        if (has_mean_x) r.out.mean_x = {r.p.data(), {2, 4, 3}};
        CHECK(std::string(r.route().what()) == "");
      }
  Right r;
  r.out.tokens.data = nullptr;  // whatever its shape
  r.out.tokens.rows = 3;
  CHECK(std::string(r.route().what()) == "");
}

TEST_CASE("route: gathered inputs") {
  const auto spoiled = [](auto spoil) {
    Right r;
    r.in.x_ids = {r.codes.data(), DType::int32, 6};
    r.in.v_ids = {r.codes.data(), DType::int32, 6};
    spoil(r);
    return r.route();
  };
  CHECK(std::string(spoiled([](Right&) {}).what()) == "");
  const auto int8 = [](Right& r) {
    r.in.x = {r.x.data(), DType::int8, 5, 3};
    r.in.x_scale = {r.one.data(), {1}};
  };
  CHECK(std::string(spoiled(int8).what()) == "");
  is(spoiled([](Right& r) { r.in.x_ids.dtype = DType::int8; }), Code::wrong_type,
     "route: x_ids expected int32 or int64");
  is(spoiled([](Right& r) { r.in.v_ids.dtype = DType::float32; }), Code::wrong_type,
     "route: v_ids expected int32 or int64");
  invalid(spoiled([](Right& r) { r.in.v.data = nullptr; }), "route: v expected, got none");
  invalid(spoiled([](Right& r) { r.in.x = {}; }), "route: x_ids expected with x or codes, got neither");
  invalid(spoiled([](Right& r) {
            r.in.codes = r.given;
            r.in.x.rows = 5;
          }),
          "route: codes expected [5, 2], got [6, 2]");
  invalid(spoiled([](Right& r) { r.in.weights = {r.one.data(), DType::float32, 1}; }),
          "route: weights expected [6], got [1]");
  for (DType type : {DType::bfloat16, DType::float16, DType::int32, DType::int8})
    is(spoiled([&](Right& r) { r.in.weights = {r.x.data(), type, 6}; }), Code::wrong_type,
       "route: weights expected float32 or int64");
  for (DType type : {DType::float32, DType::int64})
    CHECK(std::string(spoiled([&](Right& r) { r.in.weights = {r.votes.data(), type, 6}; }).what()) == "");
}

TEST_CASE("what a batch states of itself") {
  const auto spoiled = [](auto verb, int64_t Histories::* size, int64_t stated) {
    Right r;
    r.in.*size = r.voters.*size = stated;
    r.in.codes = r.given;
    return (r.*verb)();
  };
  const auto every = [&](const char* verb, auto call) {
    const std::string longest = std::string(verb) + ": longest expected at least ",
                      rows = std::string(verb) + ": rows expected at least ";
    invalid(spoiled(call, &Histories::longest, 2), longest + "3, got 2");
    invalid(spoiled(call, &Histories::longest, -1), longest + "0, got -1");
    invalid(spoiled(call, &Histories::rows, 5), rows + "6, got 5");
    for (int64_t enough : {0, 6, 1000}) {
      CHECK(std::string(spoiled(call, &Histories::longest, enough).what()) == "");
      CHECK(std::string(spoiled(call, &Histories::rows, enough).what()) == "");
    }
  };
  every("vote", &Right::vote);
  every("route", &Right::route);
  every("route_backward", &Right::route_backward);
  every("missing", &Right::missing);
  every("leaf_sums", &Right::leaf_sums);
}

TEST_CASE("missing") {
  const auto spoiled = [](auto spoil) {
    Right r;
    spoil(r);
    return r.missing();
  };
  invalid(spoiled([](Right& r) { r.missing_out.shape[0] = 5; }), "missing: out expected [6], got [5]");
  invalid(spoiled([](Right& r) { r.in.v.data = nullptr; }), "missing: v expected, got none");
  is(spoiled([](Right& r) { r.in.x.dtype = DType::int32; }), Code::wrong_type,
     "missing: x expected float32, bfloat16, float16 or int8");
  invalid(spoiled([](Right& r) { r.routed_by = &r.book; }), "missing: codes expected [6, 2], got [0, 0]");
  invalid(spoiled([](Right& r) { r.in.bias = {r.one.data(), {1}}; }), "missing: bias expected [6], got [1]");
  invalid(spoiled([](Right& r) { r.in.offsets.starts = nullptr; }), "missing: offsets expected for 2 users, got none");
  invalid(spoiled([](Right& r) { r.in.offsets.users = -1; }),
          "missing: expected at most 2^40 users and behaviours, got -1 and 6");
  const Codebook none;
  invalid(spoiled([&](Right& r) { r.routed_by = &none; }), "missing: codebook expected, got an empty one");
  CHECK(std::string(spoiled([](Right& r) { r.in.v = {}; }).what()) == "");  // none has a row of v
}

TEST_CASE("leaf_sums") {
  const auto spoiled = [](auto spoil) {
    Right r;
    r.in.codes = r.given;
    spoil(r, r.sums);
    return r.leaf_sums();
  };
  CHECK(std::string(spoiled([](Right&, LeafSums&) {}).what()) == "");
  const char* const shapes =
      "leaf_sums: out expected of 2 users, with at least 6 rows of x [3], v [2], codes [2], bias, spread and votes";
  invalid(spoiled([](Right&, LeafSums& out) { out.x.shape[0] = 5; }), shapes);
  invalid(spoiled([](Right&, LeafSums& out) { out.v.shape[1] = 4; }), shapes);
  invalid(spoiled([](Right&, LeafSums& out) { out.bias.shape[0] = 5; }), shapes);
  invalid(spoiled([](Right&, LeafSums& out) { out.spread.shape[0] = 0; }), shapes);
  invalid(spoiled([](Right&, LeafSums& out) { out.votes.shape[0] = 5; }), shapes);
  invalid(spoiled([](Right&, LeafSums& out) { out.offsets.users = 1; }), shapes);
  invalid(spoiled([](Right&, LeafSums& out) { out.codes.shape[1] = 3; }), shapes);
  invalid(
      spoiled([](Right& r, LeafSums&) { r.in.v = {}; }),
      "leaf_sums: out expected of 2 users, with at least 6 rows of x [3], v [0], codes [2], bias, spread and votes");
  invalid(spoiled([](Right& r, LeafSums&) { r.in.v.data = nullptr; }), "leaf_sums: v expected, got none");
  invalid(spoiled([](Right& r, LeafSums&) { r.in.codes = {}; }), "leaf_sums: codes expected [6, 2], got [0, 0]");
  invalid(spoiled([](Right& r, LeafSums&) { r.in.weights = {r.votes.data(), DType::int64, 5}; }),
          "leaf_sums: weights expected [6], got [5]");
  is(spoiled([](Right& r, LeafSums&) { r.in.weights = {r.votes.data(), DType::int32, 6}; }), Code::wrong_type,
     "leaf_sums: weights expected float32 or int64");
  invalid(spoiled([](Right& r, LeafSums&) { r.book = Codebook(); }), "leaf_sums: codebook expected, got an empty one");
}

TEST_CASE("leaf_sums_backward") {
  const auto spoiled = [](auto spoil) {
    Right r;
    r.in.codes = r.given;
    spoil(r);
    return r.leaf_sums_backward();
  };
  const auto of = [](const char* text) { return std::string("leaf_sums_backward: ") + text; };
  CHECK(std::string(spoiled([](Right&) {}).what()) == "");
  CHECK(std::string(spoiled([](Right& r) {
                      r.sums_forward = {r.sums_forward.sums};
                      r.leaf_gradients = {};
                    }).what()) == "");
  invalid(spoiled([](Right& r) { r.book = Codebook(); }), of("codebook expected, got an empty one"));
  invalid(spoiled([](Right& r) { r.in.codes = {}; }), of("codes expected [6, 2], got [0, 0]"));
  is(spoiled([](Right& r) { r.sums_forward.sums.x.dtype = DType::float16; }), Code::wrong_type,
     of("sums expected float32"));
  is(spoiled([](Right& r) { r.sums_forward.sums.v.dtype = DType::bfloat16; }), Code::wrong_type,
     of("sums expected float32"));
  invalid(spoiled([](Right& r) { r.sums_forward.sums.codes.shape[1] = 3; }), of("codes expected [6, 2], got [6, 3]"));
  const std::string shapes = of("sums expected of 2 users, x [6, 3], v [6, 2], bias and spread [6]");
  invalid(spoiled([](Right& r) { r.sums_forward.sums.offsets.users = 1; }), shapes);
  invalid(spoiled([](Right& r) { r.sums_forward.sums.x.rows = 5; }), shapes);
  invalid(spoiled([](Right& r) { r.sums_forward.sums.x.width = 2; }), shapes);
  invalid(spoiled([](Right& r) { r.sums_forward.sums.v.rows = 5; }), shapes);
  invalid(spoiled([](Right& r) { r.sums_forward.sums.v.width = 3; }), shapes);
  invalid(spoiled([](Right& r) { r.sums_forward.sums.bias.shape[0] = 5; }), shapes);
  invalid(spoiled([](Right& r) { r.sums_forward.sums.spread.shape[0] = 5; }), shapes);
  invalid(spoiled([](Right& r) { r.sum_ends[1] = 7; }),
          of("offsets of sums expected 0 <= start <= end <= 6 for every user, got [1, 7) for user 1"));
  invalid(spoiled([](Right& r) { r.sums_forward.sums.offsets.starts = nullptr; }),
          of("offsets of sums expected for 2 users, got none"));
  is(spoiled([](Right& r) { r.sums_forward.sums.offsets.dtype = DType::float32; }), Code::wrong_type,
     of("offsets of sums expected int32 or int64"));
  invalid(spoiled([](Right& r) { r.sums_forward.d_x.shape[1] = 2; }), of("d_x expected [6, 3], got [6, 2]"));
  invalid(spoiled([](Right& r) { r.sums_forward.d_v.shape[0] = 5; }), of("d_v expected [6, 2], got [5, 2]"));
  invalid(spoiled([](Right& r) { r.sums_forward.d_bias.shape[0] = 5; }), of("d_bias expected [6], got [5]"));
  invalid(spoiled([](Right& r) { r.sums_forward.d_spread.shape[0] = 7; }), of("d_spread expected [6], got [7]"));
  invalid(spoiled([](Right& r) { r.leaf_gradients.v.shape[1] = 3; }), of("dv expected [6, 2], got [6, 3]"));
  invalid(spoiled([](Right& r) { r.leaf_gradients.bias.shape[0] = 5; }), of("dbias expected [6], got [5]"));
  invalid(spoiled([](Right& r) { r.leaf_gradients.v_rows = ids(r.offsets.data(), 3); }),
          of("v_rows expected with v_ids, got none"));
}

TEST_CASE("route_backward") {
  const auto spoiled = [](auto spoil) {
    Right r;
    spoil(r);
    return r.route_backward();
  };
  const char* const returned = "route_backward: expected tokens and d_tokens [2, 4, 2], lse and d_lse [2, 4]";
  invalid(spoiled([](Right& r) { r.forward.tokens.rows = 7; }), returned);
  invalid(spoiled([](Right& r) { r.forward.tokens = {}; }), returned);
  invalid(spoiled([](Right& r) { r.forward.d_tokens.width = 3; }), returned);
  invalid(spoiled([](Right& r) { r.forward.lse.shape[1] = 5; }), returned);
  invalid(spoiled([](Right& r) { r.forward.d_lse = {r.lse.data(), {2, 5}}; }), returned);
  invalid(spoiled([](Right& r) { r.forward.d_mean_x = {r.p.data(), {2, 4, 2}}; }),
          "route_backward: d_mean_x expected [2, 4, 3], got [2, 4, 2]");
  invalid(spoiled([](Right& r) { r.forward.d_mean_x = {r.p.data(), {2, 4, 3}}; }),
          "route_backward: mean_x expected [2, 4, 3], got [0, 0, 0]");
  is(spoiled([](Right& r) { r.forward.d_tokens.dtype = DType::int32; }), Code::wrong_type,
     std::string("route_backward: d_tokens") + kFloats);
  is(spoiled([](Right& r) { r.forward.tokens.dtype = DType::int32; }), Code::wrong_type,
     std::string("route_backward: tokens") + kFloats);
  const char* const gradients = "route_backward: gradients expected the shapes of their arguments, or the rows listed";
  invalid(spoiled([](Right& r) { r.gradients.v = {r.tokens.data(), {6, 3}}; }), gradients);
  invalid(spoiled([](Right& r) { r.gradients.x = {r.tokens.data(), {6, 2}}; }), gradients);
  invalid(spoiled([](Right& r) { r.gradients.bias = {r.tokens.data(), {5}}; }), gradients);
  invalid(spoiled([](Right& r) { r.gradients.spread = {r.tokens.data(), {7}}; }), gradients);
  invalid(spoiled([](Right& r) { r.gradients.temperature = {r.tokens.data(), {4}}; }), gradients);
  invalid(spoiled([](Right& r) { r.gradients.prototypes = {r.tokens.data(), {2, 4, 2}}; }), gradients);
  const std::vector<int64_t> some(6);
  invalid(spoiled([&](Right& r) { r.gradients.x_rows = ids(some.data(), 2); }),
          "route_backward: x_rows expected with x_ids, got none");
  invalid(spoiled([&](Right& r) { r.gradients.v_rows = ids(some.data(), 2); }),
          "route_backward: v_rows expected with v_ids, got none");
  const auto by_ids = [&](Right& r) {
    r.in.v = {r.v.data(), DType::float32, 4, 2};
    r.in.v_ids = ids(some.data(), 6);
    r.gradients.v = {r.tokens.data(), {4, 2}};
  };
  CHECK(std::string(spoiled(by_ids).what()) == "");
  const auto listed = [&](int64_t rows) {
    return spoiled([&](Right& r) {
      by_ids(r);
      r.gradients.v_rows = ids(some.data(), 3);
      r.gradients.v.shape[0] = rows;
    });
  };
  CHECK(std::string(listed(3).what()) == "");
  invalid(listed(4), gradients);
  is(spoiled([&](Right& r) {
       by_ids(r);
       r.gradients.v_rows = {some.data(), DType::float32, 4};
     }),
     Code::wrong_type, "route_backward: v_rows expected int32 or int64");
  const auto with_mean_x = [](Right& r) { r.forward.mean_x = r.forward.d_mean_x = {r.p.data(), {2, 4, 3}}; };
  CHECK(std::string(spoiled(with_mean_x).what()) == "");
  is(spoiled([&](Right& r) {
       with_mean_x(r);
       r.gradients.x = {r.tokens.data(), {6, 3}};
     }),
     Code::not_implemented, "route_backward: mean_x has no gradient for x");
  invalid(spoiled([](Right& r) {
            r.in.x = {};
            r.in.codes = r.given;
            r.routed_by = &r.book;
            r.gradients.x = {r.tokens.data(), {6, 3}};
          }),
          "route_backward: a gradient of x expected x, got none");
  invalid(spoiled([](Right& r) {
            r.in.v = {};
            r.gradients.v = {r.tokens.data(), {6, 0}};
          }),
          "route_backward: a gradient of v expected v, got none");
  const auto without_v = [](Right& r) { r.in.v = {}, r.forward.tokens = r.forward.d_tokens = {}; };
  CHECK(std::string(spoiled(without_v).what()) == "");
  CHECK(std::string(spoiled([](Right& r) { r.forward.tokens = r.forward.d_tokens = {}; }).what()) == "");
}
