// SPDX-License-Identifier: Apache-2.0
// No verb allocates; building and loading a codebook are the only calls that do, and they survive when memory is short.
#include <doctest/doctest.h>

#include <unistd.h>

#include <cstdio>
#include <new>
#include <string>

#include "counting.h"
#include "support.h"

using namespace hisac;
using counting::Scope;
using test::Random;
using test::uniform;
using test::Workspace;

TEST_CASE("the counter counts") {
  Scope scope;
  void* volatile p = std::malloc(10);
  CHECK(scope.count() == 1);
  std::free(p);
  int* volatile q = new int(3);
  CHECK(scope.count() == 2);
  delete q;
  std::thread([] { ::operator delete(::operator new(8)); }).join();
  CHECK(scope.count() >= 3);
}

TEST_CASE("no verb allocates, serial or in a pool") {
  Random random(12);
  constexpr int64_t kRows = 5000, kWidth = 6, kSeats = 10, kUsers = 2;
  const auto x = uniform(random, kRows * kWidth), v = uniform(random, kRows * kWidth), bias = uniform(random, kRows);
  const std::vector<int64_t> offsets{0, 4600, kRows};
  const std::vector<float> temperature{1};
  std::vector<int32_t> codes(kRows * 2), agents(kUsers * kSeats * 2), count(kUsers), sum_codes(kRows * 2);
  std::vector<int64_t> votes(kUsers * kSeats), leaf(kRows), sum_starts(kUsers + 1), sum_ends(kUsers), sum_votes(kRows);
  std::vector<float> prototypes(kUsers * kSeats * kWidth), tokens(kUsers * kSeats * kWidth), lse(kUsers * kSeats),
      mean_x(kUsers * kSeats * kWidth), dv(kRows * kWidth), dx(kRows * kWidth), dbias(kRows), dspread(kRows), dtau(1),
      dp(kUsers * kSeats * kWidth), out(kRows * kWidth), out_lse(kRows), centers(8 * kWidth), sum_x(kRows * kWidth),
      sum_v(kRows * kWidth), sum_bias(kRows), sum_spread(kRows), absent(kRows), node_v(2 * kRows * kWidth),
      node_lse(2 * kRows);
  const Rows xs = test::rows(x, kWidth), vs = test::rows(v, kWidth);
  Histories in;
  in.x = xs;
  in.v = vs;
  in.offsets = test::spans(offsets);
  in.codes = {codes.data(), {kRows, 2}};
  in.bias = {bias.data(), {kRows}};
  const RouteAgents to{{prototypes.data(), {kUsers, kSeats, kWidth}}, {count.data(), {kUsers}}};

  for (int workers : {1, 3}) {
    ThreadPool pool;
    REQUIRE(pool.resize(workers).ok());
    const Executor executor = pool.executor();
    REQUIRE(test::all_come(executor, workers));  // a sanitizer's thread allocates when it starts
    const Codebook book = test::codebook(random, {5, 4}, kWidth);
    const auto check = [&](const char* name, size_t bytes, auto verb) {
      CAPTURE(std::string(name));
      CAPTURE(workers);
      Workspace workspace(bytes);
      const Context context{workspace.array(), &executor};
      Status status;
      Scope scope;
      status = verb(context);
      const long counted = scope.count();
      CHECK(std::string(status.what()) == "");
      CHECK(counted == 0);
    };
    const auto counted_size = [&](auto size) {
      Scope scope;
      const size_t bytes = size();
      CHECK(scope.count() == 0);
      return bytes;
    };

    check("encode", counted_size([&] { return encode_workspace(test::sizing(workers), book); }),
          [&](const Context& c) { return encode(c, book, xs, {codes.data(), {kRows, 2}}); });
    check("leaves", 0,
          [&](const Context&) { return leaves(book, {codes.data(), {kRows, 2}}, {leaf.data(), {kRows}}); });
    for (const VoteParams& params : {VoteParams{kSeats}, {0, {5, 2}}, {0, {}, {6, kSeats}}}) {
      check("vote", counted_size([&] { return vote_workspace(test::sizing(workers), book, params, in); }),
            [&](const Context& c) {
              return vote(
                  c, book, params, in,
                  {{agents.data(), {kUsers, kSeats, 2}}, {votes.data(), {kUsers, kSeats}}, {count.data(), {kUsers}}});
            });
    }
    check("prototypes", 0, [&](const Context& c) {
      return hisac::code_prototypes(c, book, {agents.data(), {kUsers * kSeats, 2}},
                                    {prototypes.data(), {kUsers * kSeats, kWidth}});
    });
    for (bool has_mean_x : {false, true})
      for (Normalize normalize : {Normalize::history, Normalize::agents}) {
        const RouteParams params{normalize, {temperature.data(), {1}}};
        const Rows given{tokens.data(), DType::float32, kUsers * kSeats, kWidth};
        const Array<float, 3> means{has_mean_x ? mean_x.data() : nullptr, {kUsers, kSeats, kWidth}};
        const Tokens returned{
            {tokens.data(), DType::float32, kUsers * kSeats, kWidth}, {lse.data(), {kUsers, kSeats}}, means};
        check("route",
              counted_size([&] { return route_workspace(test::sizing(workers), &book, params, in, to, returned); }),
              [&](const Context& c) { return route(c, &book, params, in, to, returned); });
        const Array<const float, 3> some{means.data, {kUsers, kSeats, kWidth}};
        const RouteForward forward{given, {lse.data(), {kUsers, kSeats}}, some, given, {}, some};
        const RouteGradients gradients{{has_mean_x ? nullptr : dx.data(), {kRows, kWidth}},
                                       {dv.data(), {kRows, kWidth}},
                                       {dbias.data(), {kRows}},
                                       {dspread.data(), {kRows}},
                                       {dp.data(), {kUsers, kSeats, kWidth}},
                                       {dtau.data(), {1}}};
        check("route_backward", counted_size([&] {
                return route_backward_workspace(test::sizing(workers), &book, params, in, to, forward, gradients);
              }),
              [&](const Context& c) { return route_backward(c, &book, params, in, to, forward, gradients); });
      }
    check("missing", counted_size([&] { return missing_workspace(test::sizing(workers), &book, in); }),
          [&](const Context& c) { return missing(c, &book, in, {absent.data(), {kRows}}); });
    for (bool together : {true, false}) {
      const LeafSums sums{{sum_x.data(), {kRows, kWidth}},
                          {sum_v.data(), {kRows, kWidth}},
                          {sum_starts.data(), together ? sum_starts.data() + 1 : sum_ends.data(), kUsers},
                          {sum_codes.data(), {kRows, 2}},
                          {sum_bias.data(), {kRows}},
                          {sum_spread.data(), {kRows}},
                          {sum_votes.data(), {kRows}}};
      check("leaf_sums", counted_size([&] { return leaf_sums_workspace(test::sizing(workers), book, in); }),
            [&](const Context& c) { return leaf_sums(c, book, in, sums); });
      const LeafSumsForward forward{sums.histories(),
                                    {dx.data(), {kRows, kWidth}},
                                    {dx.data(), {kRows, kWidth}},
                                    {dspread.data(), {kRows}},
                                    {dspread.data(), {kRows}}};
      const LeafSumsGradients gradients{{dv.data(), {kRows, kWidth}}, {dbias.data(), {kRows}}};
      check("leaf_sums_backward",
            counted_size([&] { return leaf_sums_backward_workspace(test::sizing(workers), book, in, gradients); }),
            [&](const Context& c) { return leaf_sums_backward(c, book, in, forward, gradients); });
      const MatchInputs matching{sums.histories(), {sum_codes.data(), {kRows, 2}}, {}, in.offsets};
      check("match", counted_size([&] { return match_workspace(test::sizing(workers), book, matching); }),
            [&](const Context& c) {
              return match(c, book, matching,
                           {{node_v.data(), DType::float32, 2 * kRows, kWidth}, {node_lse.data(), {kRows, 2}}});
            });
      check("match_backward",
            counted_size([&] { return match_backward_workspace(test::sizing(workers), book, matching); }),
            [&](const Context& c) {
              return match_backward(c, book, matching, {test::rows(node_v, kWidth), {node_lse.data(), {kRows, 2}}},
                                    {{dv.data(), {kRows, kWidth}}, {dbias.data(), {kRows}}});
            });
    }
    const AttendInputs attention{
        xs, test::rows(prototypes, kWidth), test::rows(prototypes, kWidth), kSeats, 1, in.offsets, {}, 1};
    check("attend", counted_size([&] { return attend_workspace(test::sizing(workers), attention); }),
          [&](const Context& c) {
            return attend(c, attention, {{out.data(), DType::float32, kRows, kWidth}, {out_lse.data(), {kRows, 1}}});
          });
    check("attend_backward", counted_size([&] { return attend_backward_workspace(test::sizing(workers), attention); }),
          [&](const Context& c) {
            return attend_backward(c, attention, {vs, {}, test::rows(out, kWidth), {out_lse.data(), {kRows, 1}}},
                                   {{dx.data(), {kRows, 1, kWidth}},
                                    {dp.data(), {kUsers, kSeats, 1, kWidth}},
                                    {mean_x.data(), {kUsers, kSeats, 1, kWidth}},
                                    {}});
          });
    FitParams params;
    params.levels = 2;
    params.sizes[0] = params.sizes[1] = 4;
    params.iterations = 3;
    const Array<float, 2> levels[] = {{centers.data(), {4, kWidth}}, {centers.data() + 4 * kWidth, {4, kWidth}}};
    FitReport report;
    check("fit", counted_size([&] { return fit_workspace(test::sizing(workers), params, kRows, kWidth); }),
          [&](const Context& c) { return fit(c, params, xs, levels, &report); });
  }
}

TEST_CASE("errors do not allocate either") {
  const Codebook none;
  Status status;
  Scope scope;
  status = encode({}, none, {}, {});
  CHECK(scope.count() == 0);
  CHECK(status.code() == Code::invalid_argument);
}

TEST_CASE("a view of an image does not allocate") {
  Random random(14);
  const Codebook book = test::codebook(random, {5, 4}, 6);
  test::Guarded<std::byte> image(test::image_of(book));
  const Array<const std::byte, 1> lent{image.data(), {image.count()}};
  test::Workspace scratch(Codebook::view_scratch(lent));
  Codebook view;
  Scope scope;
  const Status status = Codebook::view(lent, scratch.array(), &view);
  CHECK(scope.count() == 0);
  CHECK(status.ok());
  CHECK(scratch.intact());
}

TEST_CASE("a resize allocates nothing once there are threads" * doctest::skip(!counting::kCanFail)) {
  ThreadPool pool;
  const auto resize = [&] {
    for (int workers : {2, 4, 3, 1}) {
      CHECK(pool.resize(workers).ok());
      pool.executor();
    }
  };
  resize();
  resize();  // a C library keeps the first threads' stacks for the next
  Scope scope;
  for (int round = 0; round < 50; ++round) resize();
  CHECK(scope.count() == 0);
}

TEST_CASE("memory for a file's payload is asked for when its head is right") {
  const auto x = std::vector<float>(12, 1.f);
  const Array<const float, 2> arrays[] = {test::matrix(x, 4, 3)};
  Codebook book;
  REQUIRE(Codebook::build(arrays, 1, &book).ok());
  std::vector<std::byte> bytes(book.file_size());
  REQUIRE(book.serialize({bytes.data(), {static_cast<int64_t>(bytes.size())}}).ok());
  const std::string path = "/tmp/hisac_test_" + std::to_string(::getpid()) + ".safetensors";
  const auto allocations = [&](const std::vector<std::byte>& file) {
    std::FILE* const out = std::fopen(path.c_str(), "wb");
    REQUIRE(out);
    REQUIRE(std::fwrite(file.data(), 1, file.size(), out) == file.size());
    std::fclose(out);
    Scope scope;
    const Status status = Codebook::load(path.c_str(), &book);
    CHECK(status.ok() == (file == bytes));
    return scope.count();
  };
  std::vector<std::byte> length = bytes, header = bytes, longer = bytes;
  length[7] = std::byte{1};
  header[8] = std::byte{'x'};
  longer.resize(longer.size() + 10);
  CHECK(allocations(length) == 0);
  CHECK(allocations(header) == 1);  // the header's text
  CHECK(allocations(longer) == 1);
  const auto whole = allocations(bytes);  // and the payload, and the codebook's
  CHECK(whole <= 3);
  CHECK(whole >= (counting::kCanFail ? 3 : 2));  // ThreadSanitizer's hook does not see one of them
  std::remove(path.c_str());
}

TEST_CASE("out of memory is a Status and loses nothing" * doctest::skip(!counting::kCanFail)) {
  Random random(13);
  const auto centers = uniform(random, 12);
  const Array<const float, 2> arrays[] = {test::matrix(centers, 4, 3)};
  Codebook book;
  REQUIRE(Codebook::build(arrays, 1, &book).ok());
  const uint64_t before = book.fingerprint();
  std::vector<std::byte> bytes(book.file_size());
  REQUIRE(book.serialize({bytes.data(), {static_cast<int64_t>(bytes.size())}}).ok());
  const std::string path = "/tmp/hisac_test_" + std::to_string(::getpid()) + ".safetensors";
  REQUIRE(book.save(path.c_str()).ok());

  const auto with_failure = [&](auto call, long spared = 0) {
    counting::spared = spared;
    counting::failing = true;
    const Status status = call();
    counting::failing = false;
    counting::spared = 0;
    CHECK(status.code() == Code::out_of_memory);
    return std::string(status.what());
  };
  const auto build = [&] { return Codebook::build(arrays, 1, &book); };
  const auto parse = [&] { return Codebook::parse(bytes.data(), bytes.size(), &book); };
  const auto load = [&] { return Codebook::load(path.c_str(), &book); };
  const std::string text = "Codebook: out of memory for 3264 bytes";
  CHECK(with_failure(build) == text);
  CHECK(with_failure(parse, 2) == text);
  CHECK(with_failure(load, 2) == text);
  CHECK(with_failure(parse) == "codebook file: out of memory for 160 bytes");
  CHECK(with_failure(parse, 1) == "codebook file: out of memory for 48 bytes");
  CHECK(with_failure(load) == "codebook file: out of memory for 160 bytes");
  CHECK(with_failure(load, 1) == "codebook file: out of memory for 48 bytes");
  counting::failing = true;
  const Status saved = book.save(path.c_str());
  counting::failing = false;
  CHECK(std::string(saved.what()) == "");
  ThreadPool pool;
  REQUIRE(pool.resize(4).ok());
  counting::failing = true;
  const Executor serial = pool.executor();
  counting::failing = false;
  CHECK(serial.workers == 1);
  CHECK(book.fingerprint() == before);
  std::remove(path.c_str());
}
