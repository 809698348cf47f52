// SPDX-License-Identifier: Apache-2.0
// The errors of the core's verbs that Python cannot see, word for word; those that it can stand in test_errors.py and
// test_gather.py. Files: test_codebook and test_save; workspaces: test_workspace.
#include <doctest/doctest.h>

#include <limits>
#include <string>

#include "support.h"

using namespace hisac;

namespace {

void is(const Status& status, Code code, const std::string& message) {
  CHECK(std::string(status.what()) == message);
  CHECK(static_cast<int>(status.code()) == static_cast<int>(code));
}
void invalid(const Status& status, const std::string& message) { is(status, Code::invalid_argument, message); }

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

  RouteParams params{Normalize::history, Method::exact, Missing::drop, 0, {one.data(), {1}}};
  const Codebook* routed_by = nullptr;
  Histories in{test::rows(x, 3), test::rows(v, 2), test::spans(offsets)};
  RouteAgents to{{p.data(), {2, 4, 3}}, {}};
  Tokens out{{tokens.data(), DType::float32, 8, 2}, {lse.data(), {2, 4}}, {}};
  RouteForward forward{
      {tokens.data(), DType::float32, 8, 2}, {}, {tokens.data(), DType::float32, 8, 2}, {lse.data(), {2, 4}}};
  RouteGradients gradients;

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
  Status attend() { return hisac::attend(context, attention, attended); }
  Status attend_backward() { return hisac::attend_backward(context, attention, attend_forward, attend_gradients); }
};

constexpr const char* kFloats = " expected float32, bfloat16 or float16";

}  // namespace

TEST_CASE("what is right is ok") {
  Right r;
  CHECK(std::string(r.vote().what()) == "");
  CHECK(std::string(r.route().what()) == "");
  CHECK(std::string(r.route_backward().what()) == "");
  CHECK(std::string(r.attend().what()) == "");
  CHECK(std::string(r.attend_backward().what()) == "");
  CHECK(Status().ok());
  CHECK(Status().code() == Code::ok);
}

TEST_CASE("a message is cut at its end, never past it") {
  const Status status = Status::error(Code::io_error, "%s", std::string(1000, 'x').c_str());
  CHECK(std::string(status.what()) == std::string(251, 'x'));
}

TEST_CASE("Codebook") {
  const std::vector<float> ones(65536, 1.f);
  std::vector<Array<const float, 2>> centers(9, Array<const float, 2>{ones.data(), {65536, 1}});
  Codebook book;
  const auto build = [&](int levels) { return Codebook::build(centers.data(), levels, &book); };
  centers[0].shape[1] = (1 << 20) + 1;
  invalid(build(1), "Codebook: expected a width of 1 to 2^20, got 1048577");
  centers[0].shape[1] = 1;
  centers[1].shape[0] = (1 << 20) + 1;
  invalid(build(2), "Codebook: expected 1 to 2^20 codes at level 1, got 1048577");
  centers[1].shape[0] = 65536;
  invalid(build(0), "Codebook: expected 1 to 8 levels, got 0");
  invalid(build(9), "Codebook: expected 1 to 8 levels, got 9");
  CHECK(book.empty());
  centers[4].shape[0] = 2;
  const char* const leaves = "Codebook: expected at most 2^64 leaves, got more";
  CHECK(build(4).ok());
  invalid(build(5), leaves);
  std::swap(centers[0], centers[4]);
  invalid(build(5), leaves);
  centers[0].shape[0] = 1;  // 2^64 leaves, but as many below the one node of the first level
  invalid(build(5), leaves);
}

TEST_CASE("leaves, prototypes, serialize, save") {
  Right r;
  Codebook none;
  std::vector<int64_t> leaf(6);
  std::vector<std::byte> bytes(10);
  invalid(leaves(none, r.given, {leaf.data(), {6}}), "leaves: codebook expected, got an empty one");
  invalid(leaves(r.book, r.given, {leaf.data(), {5}}), "leaves: out expected [6], got [5]");
  invalid(code_prototypes({}, none, r.given, {r.x.data(), {6, 3}}), "prototypes: codebook expected, got an empty one");
  invalid(code_prototypes({}, r.book, r.given, {r.x.data(), {6, 2}}), "prototypes: out expected [6, 3], got [6, 2]");
  invalid(none.serialize({bytes.data(), {10}}), "serialize: codebook expected, got an empty one");
  invalid(r.book.serialize({bytes.data(), {10}}),
          "serialize: out expected " + std::to_string(r.book.file_size()) + " bytes, got 10");
  invalid(none.save("/tmp/none"), "save: codebook expected, got an empty one");
}

TEST_CASE("encode") {
  Right r;
  const Rows x = test::rows(r.x, 3);
  invalid(encode(r.context, Codebook(), x, {r.codes.data(), {6, 2}}), "encode: codebook expected, got an empty one");
  is(encode(r.context, r.book, {r.x.data(), DType::int32, 6, 3}, {r.codes.data(), {6, 2}}), Code::wrong_type,
     std::string("encode: x") + kFloats);
  invalid(encode(r.context, r.book, x, {r.codes.data(), {5, 2}}), "encode: codes expected [6, 2], got [5, 2]");
}

TEST_CASE("fit") {
  Right r;
  FitParams params;
  params.levels = 1;
  params.sizes[0] = 2;
  std::vector<float> memory(6);
  Array<float, 2> centers[] = {{memory.data(), {2, 3}}};
  FitReport report;
  const auto fit = [&](Rows x) { return hisac::fit(r.context, params, x, centers, &report); };
  const Rows x = test::rows(r.x, 3);
  CHECK(fit(x).ok());
  is(fit({r.x.data(), DType::int64, 6, 3}), Code::wrong_type, std::string("fit: x") + kFloats);
  for (int levels : {0, 9}) {
    params.levels = levels;
    invalid(fit(x), "fit: codes expected 1 to 8 levels, got " + std::to_string(levels));
  }
  params.levels = 1;
  params.iterations = -1;
  invalid(fit(x), "fit: iterations expected 0 or more, got -1");
  params.iterations = 1;
  params.sizes[0] = 0;
  invalid(fit(x), "fit: codes expected 1 to 2^20 at level 0, got 0");
  params.sizes[0] = 3;
  invalid(fit(x), "fit: centers of level 0 expected [3, 3], got [2, 3]");
  params.sizes[0] = 2;
  params.keep_going = [](void*) { return false; };
  is(fit(x), Code::cancelled, "fit: cancelled at level 0, round 1");
  params.keep_going = nullptr;
  params.progress = [](void*, int, int, double) { return false; };
  is(fit(x), Code::cancelled, "fit: cancelled at level 0, round 1");
}

TEST_CASE("fit_workspace of sizes out of range answers") {
  FitParams params;
  params.levels = 1;
  for (int64_t size :
       {int64_t{-5}, (int64_t{1} << 20) + 1, (int64_t{1} << 61) + 1, std::numeric_limits<int64_t>::max()}) {
    params.sizes[0] = size;
    CHECK(fit_workspace(test::sizing(2), params, 10, 3) == 0);
  }
  params.levels = 9;
  CHECK(fit_workspace(test::sizing(2), params, 10, 3) == 0);
}

TEST_CASE("vote") {
  Right r;
  invalid(vote(r.context, Codebook(), r.voting, r.voters, r.seats), "vote: codebook expected, got an empty one");
  r.voting.budget = 0;
  invalid(r.vote(), "vote: expected either budget or fanout, got neither");
  r.voting = {4, {2, 2}};
  invalid(r.vote(), "vote: expected either budget or fanout, got both");
  const char* const levels = "vote: fanout expected one number >= 1 for each of 2 levels";
  r.voting = {0, {2}};
  invalid(r.vote(), levels);
  r.voting = {0, {2, 2, 2}};
  invalid(r.vote(), levels);
  r.voting = {0, {2, -2}};
  invalid(r.vote(), levels);
  for (int64_t large : {int64_t{2049}, int64_t{1} << 62}) {
    r.voting = {0, {2, large}};
    invalid(r.vote(), "vote: fanout expected a product of at most 4096, got more");
  }
  for (int64_t budget : {-1, 4097}) {
    r.voting = {budget, {}};
    invalid(r.vote(), "vote: budget expected 1 to 4096, got " + std::to_string(budget));
    CHECK(vote_workspace(test::sizing(1), r.book, r.voting, 6) == 0);
  }
  r.voting = {4, {}};
  r.seats.votes.shape[1] = 3;
  invalid(r.vote(), "vote: out expected codes [2, 4, 2], votes [2, 4] and count [2]");
}

TEST_CASE("agents of another codebook") {
  Right r;
  const Codebook other = test::codebook(r.random, {2, 2}, 3);
  const auto hex = [](uint64_t value) {
    char text[17];
    std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
    return std::string(text);
  };
  const auto wrong = [&](const char* verb, uint64_t got) {
    return verb + (": agents expected of codebook " + hex(r.book.fingerprint()) + ", got " + hex(got));
  };
  const auto sums = [&] { return prototypes(r.context, r.book, r.seats, {r.p.data(), {2, 4, 3}}); };
  REQUIRE(r.vote().ok());
  invalid(sums(), wrong("prototypes", 0));
  r.seats.fingerprint = other.fingerprint();
  invalid(r.vote(), wrong("vote", other.fingerprint()));
  invalid(sums(), wrong("prototypes", other.fingerprint()));
  r.seats.fingerprint = r.book.fingerprint();
  CHECK(r.vote().ok());
  CHECK(sums().ok());
  invalid(prototypes(r.context, r.book, r.seats, {r.p.data(), {2, 3, 3}}),
          "prototypes: out expected [2, 4, 3], got [2, 3, 3]");
}

TEST_CASE("histories") {
  Right r;
  Spans& offsets = r.voters.offsets;
  offsets = {};
  offsets.users = 2;
  invalid(r.vote(), "vote: offsets expected for 2 users, got none");
  offsets = test::spans(r.offsets);
  offsets.users = -2;
  invalid(r.vote(), "vote: offsets expected for -2 users, got none");
  offsets.users = 2;
  offsets.dtype = DType::float32;
  is(r.vote(), Code::wrong_type, "vote: offsets expected int32 or int64");
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
  invalid(spoiled([](Right& r) { r.params.temperature = {}; }), "route: temperature expected [1] or [4], got [0]");
  const Codebook none;
  invalid(spoiled([&](Right& r) { r.routed_by = &none; }), "route: codebook expected, got an empty one");
  invalid(spoiled([](Right& r) { r.routed_by = &r.book; }), "route: codes expected [6, 2], got [0, 0]");
  invalid(spoiled([](Right& r) {
            r.in.codes = r.given;
            r.params.method = Method::leaf;
          }),
          "route: codes and their codebook expected where x is not given and with the leaf method, got no codebook");
  invalid(spoiled([](Right& r) { r.out.lse.shape[1] = 5; }),
          "route: out expected tokens [2, 4, 2] of v's type and lse [2, 4]");
  invalid(spoiled([](Right& r) { r.out.tokens.dtype = DType::float16; }),
          "route: out expected tokens [2, 4, 2] of v's type and lse [2, 4]");
  invalid(spoiled([](Right& r) { r.params.missing = Missing::token; }),
          "route: out expected tokens [2, 5, 2] of v's type and lse [2, 5]");
  invalid(spoiled([](Right& r) { r.params.refine = 1; }), "route: refined expected [2, 4, 3], got [0, 0, 0]");
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
  invalid(spoiled([](Right& r) { r.in.v = {}; }), "route: v expected, got none");
  invalid(spoiled([](Right& r) { r.in.x = {}; }), "route: x_ids expected with x or codes, got neither");
  invalid(spoiled([](Right& r) {
            r.in.codes = r.given;
            r.in.x.rows = 5;
          }),
          "route: codes expected [5, 2], got [6, 2]");
  invalid(spoiled([](Right& r) { r.in.weights = {r.one.data(), {1}}; }), "route: weights expected [6], got [1]");
}

TEST_CASE("vote: the sizes of what it does not read") {
  const auto spoiled = [](auto spoil) {
    Right r;
    r.voters.x = r.in.x;
    r.voters.v = r.in.v;
    spoil(r.voters);
    return r.vote();
  };
  CHECK(std::string(spoiled([](Histories&) {}).what()) == "");
  invalid(spoiled([](Histories& in) { in.v.rows = 5; }), "vote: x is [6, 3], v is [5, 2]: T differs (6, 5)");
  invalid(spoiled([](Histories& in) { in.x.rows = in.v.rows = 5; }), "vote: codes expected [5, 2], got [6, 2]");
}

TEST_CASE("leaf_sums") {
  std::vector<float> x(18), v(12), bias(6), spread(6);
  std::vector<int64_t> offsets(3);
  std::vector<int32_t> codes(12);
  const auto spoiled = [&](auto spoil) {
    Right r;
    r.in.codes = r.given;
    LeafSums out{{x.data(), {6, 3}},     {v.data(), {6, 2}}, {offsets.data(), {3}},
                 {codes.data(), {6, 2}}, {bias.data(), {6}}, {spread.data(), {6}}};
    spoil(r, out);
    return leaf_sums(r.context, r.book, r.in, out);
  };
  CHECK(std::string(spoiled([](Right&, LeafSums&) {}).what()) == "");
  const char* const shapes =
      "leaf_sums: out expected offsets [3] and at least 6 rows of x [3], v [2], codes [2], bias and spread";
  invalid(spoiled([](Right&, LeafSums& out) { out.x.shape[0] = 5; }), shapes);
  invalid(spoiled([](Right&, LeafSums& out) { out.v.shape[1] = 4; }), shapes);
  invalid(spoiled([](Right&, LeafSums& out) { out.bias.shape[0] = 5; }), shapes);
  invalid(spoiled([](Right&, LeafSums& out) { out.spread.shape[0] = 0; }), shapes);
  invalid(spoiled([](Right&, LeafSums& out) { out.offsets.shape[0] = 2; }), shapes);
  invalid(spoiled([](Right&, LeafSums& out) { out.codes.shape[1] = 3; }), shapes);
  invalid(spoiled([](Right& r, LeafSums&) { r.in.codes = {}; }), "leaf_sums: codes expected [6, 2], got [0, 0]");
  invalid(spoiled([](Right& r, LeafSums&) { r.book = Codebook(); }), "leaf_sums: codebook expected, got an empty one");
  Right r;
  r.in.codes = r.given;
  const size_t need = leaf_sums_workspace(test::sizing(1), r.book, r.in, 3);
  invalid(spoiled([](Right& right, LeafSums&) { right.context.workspace = {}; }),
          "leaf_sums: workspace expected at least " + std::to_string(need) + " bytes, got 0");
}

TEST_CASE("route_backward") {
  const auto spoiled = [](auto spoil) {
    Right r;
    spoil(r);
    return r.route_backward();
  };
  invalid(spoiled([](Right& r) { r.params.refine = 1; }),
          "route_backward: refine expected 0 with the refined prototypes, got 1");
  is(spoiled([](Right& r) { r.forward.d_tokens.dtype = DType::int32; }), Code::wrong_type,
     std::string("route_backward: d_tokens") + kFloats);
  is(spoiled([](Right& r) { r.forward.tokens.dtype = DType::int32; }), Code::wrong_type,
     std::string("route_backward: tokens") + kFloats);
  const char* const gradients = "route_backward: gradients expected the shapes of their arguments";
  invalid(spoiled([](Right& r) { r.gradients.v = {r.tokens.data(), {6, 3}}; }), gradients);
  invalid(spoiled([](Right& r) { r.gradients.x = {r.tokens.data(), {6, 2}}; }), gradients);
  invalid(spoiled([](Right& r) { r.gradients.bias = {r.tokens.data(), {5}}; }), gradients);
  invalid(spoiled([](Right& r) { r.gradients.temperature = {r.tokens.data(), {4}}; }), gradients);
  invalid(spoiled([](Right& r) { r.gradients.prototypes = {r.tokens.data(), {2, 4, 2}}; }), gradients);
}

TEST_CASE("attend and attend_backward") {
  const auto spoiled = [](auto spoil) {
    Right r;
    spoil(r);
    return r.attend();
  };
  is(spoiled([](Right& r) { r.attention.q.dtype = DType::int32; }), Code::wrong_type,
     std::string("attend: q") + kFloats);
  invalid(spoiled([](Right& r) { r.attention.heads = 4; }), "attend: q expected rows for all of H = 4 heads, got 6");
  const char* const keys =
      "attend: expected keys [2, 2, 1, 2] and values with the same first three, by "
      "candidate_offsets and q";
  invalid(spoiled([](Right& r) { r.attention.keys.rows = 5; }), keys);
  invalid(spoiled([](Right& r) { r.attention.keys.width = 3; }), keys);
  invalid(spoiled([](Right& r) { r.attention.values.rows = 3; }), keys);
  const int64_t starts[] = {0, 2}, ends[] = {3, 6};
  invalid(spoiled([&](Right& r) { r.attention.candidates = {starts, ends, DType::int64, 2}; }),
          "attend: candidate_offsets expected in order, got a step back at user 1");
  const char* const out = "attend: out expected [6, 1, 3] of q's type and lse [6, 1]";
  invalid(spoiled([](Right& r) { r.attended.out.rows = 5; }), out);
  invalid(spoiled([](Right& r) { r.attended.lse.shape[0] = 5; }), out);
  invalid(spoiled([](Right& r) { r.attended.out.dtype = DType::bfloat16; }), out);

  const auto backward = [](auto spoil) {
    Right r;
    spoil(r);
    return r.attend_backward();
  };
  const char* const gradients = "attend_backward: gradients expected the shapes of their arguments";
  invalid(backward([](Right& r) { r.attend_gradients.q.shape[2] = 3; }), gradients);
  invalid(backward([](Right& r) { r.attend_gradients.keys.shape[3] = 3; }), gradients);
  invalid(backward([](Right& r) { r.attend_gradients.values.shape[0] = 3; }), gradients);
  invalid(backward([](Right& r) { r.attend_gradients.bias = {r.db.data(), {2, 2}}; }), gradients);
}

TEST_CASE("instruction sets have names") {
  const std::string all = hisac::available_isas(), one = hisac::active_isa();
#if defined(__aarch64__)
  CHECK(all == "neon");
#else
  CHECK(all.rfind("baseline", 0) == 0);
#endif
  CHECK(all.find(one) != std::string::npos);
}
