// SPDX-License-Identifier: Apache-2.0
// The whole path gives the same bits whoever runs it and however the ranges are cut.
#include <doctest/doctest.h>

#include "pipeline.h"

using namespace test;

namespace {

void equal(const Results& expected, const Results& got) {
  CHECK(got.faults == std::vector<std::string>{});
  REQUIRE(expected.outputs.size() == got.outputs.size());
  for (size_t i = 0; i < expected.outputs.size(); ++i) {
    CAPTURE(expected.outputs[i].first);
    CHECK((expected.outputs[i].second == got.outputs[i].second));
  }
}

std::vector<Options> all_options() {
  std::vector<Options> out(18);
  out[1].normalize = hisac::Normalize::agents;
  out[2].mean_x = true;
  out[3].mean_x = out[3].over_sums = true;
  out[4].over_sums = out[4].together = true;
  out[5].fanout = out[5].without_x = out[5].whole = true;
  out[6].dtype = DType::bfloat16;
  out[7].dtype = DType::float16;
  out[8].tokens = false;
  out[8].whole = true;
  out[9].mean_x = out[9].without_v = true;
  out[10].precision = hisac::Precision::bfloat16;
  out[11].dtype = DType::float16;
  out[11].normalize = hisac::Normalize::agents;
  out[11].precision = hisac::Precision::bfloat16;
  out[11].mean_x = out[11].over_sums = out[11].together = out[11].fanout = out[11].without_x = true;
  out[13].beam = out[13].over_sums = true;
  out[12].mean_x = out[12].over_sums = out[12].without_v = true;
  for (size_t i = 14; i < 18; ++i) {
    out[i].sparse = static_cast<int64_t>(i) - 13;
    out[i].normalize = static_cast<hisac::Normalize>(i % 2);
    out[i].mean_x = out[i].lists = i % 3 == 0;
  }
  out[15].over_sums = true;
  out[16].precision = hisac::Precision::bfloat16;
  out[17].without_x = true;
  return out;
}

}  // namespace

TEST_CASE("the path computes something") {
  MESSAGE("instruction set: ", std::string(hisac::active_isa()));
  for (bool mean_x : {false, true}) {
    CAPTURE(mean_x);
    Options options;
    options.mean_x = mean_x;
    const Problem problem{options};
    const Results serial = run(problem, nullptr);
    CHECK(serial.faults == std::vector<std::string>{});
    for (const auto& output : serial.outputs) {
      const std::string& name = output.first;
      const std::vector<std::byte>& bytes = output.second;
      if (name == (mean_x ? "d_x" : "mean_x") || name == "lists") continue;  // there is none
      CAPTURE(name);
      size_t written = 0;
      for (std::byte b : bytes) written += b != std::byte{0x5a} && b != std::byte{0};
      if (name.rfind("sum_", 0) == 0)
        CHECK(written > (name == "sum_starts" || name == "sum_ends" ? 5 : 100));  // few leaves, many rows
      else
        CHECK(written > bytes.size() / 10);
    }
  }
}

TEST_CASE("the same bits for every executor") {
  for (const Options& options : all_options()) {
    CAPTURE(static_cast<int>(options.dtype));
    CAPTURE(options.mean_x);
    CAPTURE(options.over_sums);
    CAPTURE(options.sparse);
    const Problem problem(options);
    const Results serial = run(problem, nullptr);
    for (int workers : {1, 2, 7}) {
      CAPTURE(workers);
      Threads own{workers};
      const hisac::Executor threads = own.executor();
      equal(serial, run(problem, &threads));
      hisac::ThreadPool pool;
      REQUIRE(pool.resize(workers).ok());
      const hisac::Executor pooled = pool.executor();
      CHECK(pooled.workers == workers);
      equal(serial, run(problem, &pooled));
    }
    for (int64_t step : {1, 3}) {
      Backwards backwards{3, step};
      const hisac::Executor executor = backwards.executor();
      equal(serial, run(problem, &executor));
    }
    OneSeat seat{5};
    const hisac::Executor executor = seat.executor();
    equal(serial, run(problem, &executor));
  }
}

TEST_CASE("a user's bits do not depend on the batch around it") {
  for (bool mean_x : {false, true}) {
    Options options;
    options.mean_x = mean_x;
    Problem problem{options};
    const Results batch = run(problem, nullptr);
    problem.offsets = {9130, 9130, 9130, 9130, 9130, 9130, 13227};  // the last user alone
    problem.candidates = {651, 651, 651, 651, 651, 651, 1300};
    const Results alone = run(problem, nullptr);
    CHECK(alone.faults == std::vector<std::string>{});
    int64_t compared = 0;
    for (size_t i = 0; i < batch.outputs.size(); ++i) {
      const std::string& name = batch.outputs[i].first;
      const auto &b = batch.outputs[i].second, &a = alone.outputs[i].second;
      CAPTURE(name);
      std::ptrdiff_t last = 0;  // bytes of the last user, at the end
      for (const char* of : {"tokens", "lse", "mean_x", "agents", "votes", "d_prototypes"})
        if (name == of) last = static_cast<std::ptrdiff_t>(b.size() / size(problem.users));
      for (const char* of : {"missing", "d_x", "d_v", "d_bias", "d_spread"})
        if (name == of) last = static_cast<std::ptrdiff_t>(b.size() / size(problem.rows) * size(13227 - 9130));
      compared += last > 0;
      CHECK(std::equal(b.end() - last, b.end(), a.end() - last));
    }
    CHECK(compared == 10);
  }
}

TEST_CASE("a result has the same bits whatever else is wanted beside it") {
  const auto result = [](const Options& options, const std::string& name) {
    const Results all = run(Problem{options}, nullptr);
    CHECK(all.faults == std::vector<std::string>{});
    for (const auto& output : all.outputs)
      if (output.first == name && !output.second.empty()) return output.second;
    FAIL("no ", name);
    return std::vector<std::byte>{};
  };
  for (hisac::Normalize normalize : {hisac::Normalize::history, hisac::Normalize::agents})
    for (hisac::Precision precision : {hisac::Precision::float32, hisac::Precision::bfloat16}) {
      Options both, tokens, mean_x, without_v;
      both.normalize = tokens.normalize = mean_x.normalize = without_v.normalize = normalize;
      both.precision = tokens.precision = mean_x.precision = without_v.precision = precision;
      both.mean_x = mean_x.mean_x = without_v.mean_x = without_v.without_v = true;
      mean_x.tokens = false;
      CHECK((result(tokens, "tokens") == result(both, "tokens")));
      CHECK((result(mean_x, "mean_x") == result(both, "mean_x")));
      CHECK((result(without_v, "mean_x") == result(both, "mean_x")));
      for (const Options& options : {tokens, mean_x, without_v}) CHECK((result(options, "lse") == result(both, "lse")));
    }
}
