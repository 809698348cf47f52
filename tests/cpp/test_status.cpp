// SPDX-License-Identifier: Apache-2.0
// The errors of the core's verbs that Python cannot see, word for word; those that it can stand in test_errors.py and
// test_gather.py. What route reads: test_status_route. Files: test_codebook and test_save; workspaces: test_workspace.
#include <doctest/doctest.h>

#include <limits>
#include <string>

#include "right.h"

using namespace hisac;
using test::invalid;
using test::is;
using test::kFloats;
using test::Right;

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
    invalid(fit(x), "fit: sizes expected 1 to 8 levels, got " + std::to_string(levels));
  }
  params.levels = 1;
  params.iterations = -1;
  invalid(fit(x), "fit: iterations expected 0 or more, got -1");
  params.iterations = 1;
  params.sizes[0] = 0;
  invalid(fit(x), "fit: sizes expected 1 to 2^20 at level 0, got 0");
  params.sizes[0] = 3;
  invalid(fit(x), "fit: centers of level 0 expected [3, 3], got [2, 3]");
  params.sizes[0] = 2;
  params.keep_going = [](void*) { return false; };
  is(fit(x), Code::cancelled, "fit: cancelled at level 0, round 1");
  params.keep_going = nullptr;
  params.progress = [](void*, int, int, double) { return false; };
  is(fit(x), Code::cancelled, "fit: cancelled at level 0, round 1");
}

TEST_CASE("fit in steps: chunks of any size are one call, and every mistake is named") {
  Right r;
  FitParams params;
  params.levels = 2;
  params.sizes[0] = 2;
  params.sizes[1] = 3;
  std::vector<float> whole(15), steps(15), begin(15, 1.f), weights(6, 2.f);
  const auto centers_in = [](std::vector<float>& memory) {
    return std::vector<Array<float, 2>>{{memory.data(), {2, 3}}, {memory.data() + 6, {3, 3}}};
  };
  FitReport report, expected;
  CHECK(fit(r.context, params, test::rows(r.x, 3), centers_in(whole).data(), &expected).ok());
  const std::vector<Array<float, 2>> centers = centers_in(steps);
  FitStep step;
  const auto start = [&] { return fit_begin(r.context, params, 6, 3, centers.data(), &report, &step); };
  const auto add = [&](int64_t first, int64_t rows, int64_t width = 3) {
    return fit_add(r.context, &step, {r.x.data() + first * 3, DType::float32, rows, width});
  };
  invalid(fit_next(r.context, &step),
          "fit: a step expected of a fit that has begun and is not done, got one that has not begun");
  CHECK(start().ok());
  while (!step.done) {
    if (step.reads) {
      CHECK(add(0, 1).ok());
      CHECK(add(1, 0).ok());
      CHECK(add(1, 5).ok());
    }
    CHECK(fit_next(r.context, &step).ok());
  }
  CHECK(steps == whole);
  invalid(add(0, 0), "fit: a step expected of a fit that has begun and is not done, got one that is done");
  CHECK(report.rows == 6);
  CHECK(report.error[1] == expected.error[1]);

  CHECK(start().ok());
  invalid(add(0, 7), "fit: a chunk expected [6, 3] at most, got [7, 3]");
  invalid(add(0, 1, 2), "fit: a chunk expected [6, 3] at most, got [1, 2]");
  CHECK(add(0, 4).ok());
  invalid(fit_next(r.context, &step), "fit: a pass expected 6 rows, got 4");
  Executor executor;
  executor.workers = 3;
  executor.parallel_for = [](void*, int64_t, void (*)(void*, int64_t, int64_t, int), void*) {};
  Context more = r.context;
  more.executor = &executor;
  invalid(fit_add(more, &step, {r.x.data(), DType::float32, 1, 3}), "fit: a context expected at most 1 workers, got 3");

  params.process = 1;
  invalid(start(), "fit: process expected one of 1, got number 1");
  params.processes = 2;
  invalid(fit(r.context, params, test::rows(r.x, 3), centers.data(), &report),
          "fit: processes expected 1 in one call, got 2");
  params.processes = 1;
  params.process = 0;
  params.weights = {weights.data(), {5}};
  invalid(start(), "fit: weights expected [6], got [5]");
  params.weights = {};
  Array<const float, 2> init[] = {{begin.data(), {2, 3}}, {begin.data(), {2, 3}}};
  params.init = init;
  invalid(start(), "fit: init of level 1 expected [3, 3], got [2, 3]");
  init[1] = {begin.data() + 6, {3, 3}};
  begin[7] = -0x1p110f;
  invalid(start(), "fit: init of level 1 expected below 2^110, got -1.29807e+33");
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
  invalid(r.vote(), "vote: expected exactly one of budget, fanout and beam, got 0");
  for (const VoteParams& two : {VoteParams{4, {2, 2}}, {4, {}, {2, 2}}, {0, {2, 2}, {2, 2}}, {4, {}, {0, 0, 0, 1}}}) {
    r.voting = two;
    invalid(r.vote(), "vote: expected exactly one of budget, fanout and beam, got 2");
  }
  r.voting = {4, {2, 2}, {2, 2}};
  invalid(r.vote(), "vote: expected exactly one of budget, fanout and beam, got 3");
  for (const VoteParams& beam : {VoteParams{0, {}, {2}},
                                 {0, {}, {0, 2}},
                                 {0, {}, {2, 2, 2}},
                                 {0, {}, {2, -2}},
                                 {0, {}, {4097, 2}},
                                 {0, {}, {2, int64_t{1} << 62}}}) {
    r.voting = beam;
    invalid(r.vote(), "vote: beam expected one number of 1 to 4096 for each of 2 levels");
    CHECK(vote_workspace(test::sizing(1), r.book, r.voting, r.voters) == 0);
  }
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
    CHECK(vote_workspace(test::sizing(1), r.book, r.voting, r.voters) == 0);
  }
  r.voting = {4, {}};
  r.seats.votes.shape[1] = 3;
  invalid(r.vote(), "vote: out votes expected [2, 4], got [2, 3]");
  r.seats.votes.shape[1] = 4;
  r.seats.codes.shape[2] = 3;
  invalid(r.vote(), "vote: out codes expected [2, 4, 2], got [2, 4, 3]");
  r.seats.codes.shape[2] = 2;
  r.seats.count.shape[0] = 1;
  invalid(r.vote(), "vote: out count expected [2], got [1]");
  r.seats.count.shape[0] = 2;
  r.seats.prototypes = {r.p.data(), {2, 4, 2}};
  invalid(r.vote(), "vote: out prototypes expected [2, 4, 3], got [2, 4, 2]");
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
    if (got == 0) return std::string(verb) + ": agents expected with the fingerprint of their codebook, got 0";
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

TEST_CASE("vote: weights") {
  Right r;
  r.voters.weights = {r.votes.data(), DType::int64, 6};
  CHECK(std::string(r.vote().what()) == "");
  r.voters.weights.size = 7;
  invalid(r.vote(), "vote: weights expected [6], got [7]");
  r.voters.weights = {r.votes.data(), DType::int32, 6};
  is(r.vote(), Code::wrong_type, "vote: weights expected float32 or int64");
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

TEST_CASE("attend and attend_backward") {
  const auto spoiled = [](auto spoil) {
    Right r;
    spoil(r);
    return r.attend();
  };
  is(spoiled([](Right& r) { r.attention.q.dtype = DType::int32; }), Code::wrong_type,
     std::string("attend: q") + kFloats);
  invalid(spoiled([](Right& r) { r.attention.heads = 4; }), "attend: q expected rows for all of H = 4 heads, got 6");
  const std::string keys = "attend: keys expected [2, 2, 1, 2] as rows, got ";
  invalid(spoiled([](Right& r) { r.attention.keys.rows = 5; }), keys + "[5, 2]");
  invalid(spoiled([](Right& r) { r.attention.keys.width = 3; }), keys + "[4, 3]");
  invalid(spoiled([](Right& r) { r.attention.values.rows = 3; }),
          "attend: values expected [2, 2, 1, 3] as rows, got [3, 3]");
  const int64_t starts[] = {0, 2}, ends[] = {3, 6};
  invalid(spoiled([&](Right& r) { r.attention.candidates = {starts, ends, DType::int64, 2}; }),
          "attend: candidate_offsets expected in order, got a step back at user 1");
  const auto tokens = [&](std::vector<int64_t> from, std::vector<int64_t> to, int64_t most,
                          const std::string& message) {
    invalid(spoiled([&](Right& r) {
              r.attention.tokens = {from.data(), to.data(), DType::int64, static_cast<int64_t>(from.size())};
              r.attention.agents = most;
            }),
            message);
  };
  CHECK(std::string(spoiled([&](Right& r) {
                      r.attention.tokens = {starts, starts + 1, DType::int64, 1};
                      r.attention.candidates = {starts, ends, DType::int64, 1};
                      r.attention.agents = 0;
                    }).what()) == "");
  tokens({0, 1}, {1, 5}, 4,
         "attend: token_offsets expected 0 <= start <= end <= 4 for every user, got [1, 5) for user 1");
  tokens({0, 1}, {1, 5}, 0,
         "attend: token_offsets expected 0 <= start <= end <= 4 for every user, got [1, 5) for user 1");
  tokens({0, 1}, {2, 3}, 4, "attend: token_offsets expected in order, got a step back at user 1");
  tokens({0, 1}, {1, 4}, 2, "attend: token_offsets expected at most M = 2 tokens a user, got 3");
  tokens({0}, {1}, 4, "attend: token_offsets expected for 2 users, got 1");
  invalid(spoiled([&](Right& r) {
            r.attention.tokens.starts = starts;
            r.attention.tokens.users = 2;
            r.attention.agents = 0;
          }),
          "attend: token_offsets expected for 2 users, got none");
  const char* const out = "attend: out expected [6, 1, 3] of q's type and lse [6, 1]";
  invalid(spoiled([](Right& r) { r.attended.out.rows = 5; }), out);
  invalid(spoiled([](Right& r) { r.attended.lse.shape[0] = 5; }), out);
  invalid(spoiled([](Right& r) { r.attended.out.dtype = DType::bfloat16; }), out);

  const auto backward = [](auto spoil) {
    Right r;
    spoil(r);
    return r.attend_backward();
  };
  invalid(backward([](Right& r) { r.attend_gradients.q.shape[2] = 3; }),
          "attend_backward: dq expected [6, 1, 2], got [6, 1, 3]");
  invalid(backward([](Right& r) { r.attend_gradients.keys.shape[3] = 3; }),
          "attend_backward: dkeys expected [2, 2, 1, 2], got [2, 2, 1, 3]");
  invalid(backward([](Right& r) { r.attend_gradients.values.shape[0] = 3; }),
          "attend_backward: dvalues expected [2, 2, 1, 3], got [3, 2, 1, 3]");
  invalid(backward([](Right& r) { r.attend_gradients.bias = {r.db.data(), {2, 2}}; }),
          "attend_backward: dbias expected beside a bias, got it without");
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
