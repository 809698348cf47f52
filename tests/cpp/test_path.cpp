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
  std::vector<Options> out(9);
  out[1].normalize = hisac::Normalize::agents;
  out[2].method = hisac::Method::leaf;
  out[3].missing = hisac::Missing::token;
  out[4].refine = 2;
  out[5].fanout = out[5].without_x = true;
  out[6].dtype = DType::bfloat16;
  out[7].dtype = DType::float16;
  out[8] = {DType::float16, hisac::Normalize::agents, hisac::Method::leaf, hisac::Missing::token, 1, true, true};
  return out;
}

}  // namespace

TEST_CASE("the path computes something") {
  MESSAGE("instruction set: ", std::string(hisac::active_isa()));
  const Problem problem{Options{}};
  const Results serial = run(problem, nullptr);
  CHECK(serial.faults == std::vector<std::string>{});
  for (const auto& output : serial.outputs) {
    const std::string& name = output.first;
    const std::vector<std::byte>& bytes = output.second;
    if (name == "refined") continue;  // without rounds there is none
    CAPTURE(name);
    size_t written = 0;
    for (std::byte b : bytes) written += b != std::byte{0x5a} && b != std::byte{0};
    CHECK(written > bytes.size() / 10);
  }
}

TEST_CASE("the same bits for every executor") {
  for (const Options& options : all_options()) {
    CAPTURE(static_cast<int>(options.dtype));
    CAPTURE(static_cast<int>(options.method));
    CAPTURE(options.refine);
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
  Problem problem{Options{}};
  const Results batch = run(problem, nullptr);
  problem.offsets = {9130, 9130, 9130, 9130, 9130, 9130, 13227};  // the last user alone
  problem.candidates = {651, 651, 651, 651, 651, 651, 1300};
  const Results alone = run(problem, nullptr);
  CHECK(alone.faults == std::vector<std::string>{});
  for (size_t i = 0; i < batch.outputs.size(); ++i) {
    const std::string& name = batch.outputs[i].first;
    if (name != "tokens" && name != "lse" && name != "agents" && name != "votes" && name != "d_prototypes") continue;
    CAPTURE(name);
    const auto &b = batch.outputs[i].second, &a = alone.outputs[i].second;
    const auto user = static_cast<std::ptrdiff_t>(b.size() / size(problem.users));
    CHECK(std::equal(b.end() - user, b.end(), a.end() - user));
  }
}
