// SPDX-License-Identifier: Apache-2.0
// One request: a user's history of T behaviours becomes M tokens, that is, rows to attend to.
#include <hisac/hisac.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

static void require(const hisac::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.what());
  std::exit(1);
}

int main() {
  constexpr int64_t T = 10000, D = 16, V = 32, M = 50, L = 2;
  auto noise = [seed = 1u]() mutable {
    return static_cast<float>((seed = seed * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1.f;
  };
  std::vector<float> coarse(64 * D), fine(64 * D), x(T * D), v(T * V);
  for (auto* a : {&coarse, &fine, &x, &v})
    for (float& f : *a) f = noise();

  // Once: a codebook (in a service: hisac::Codebook::load(path, &book)), threads, and memory for the largest request.
  hisac::Codebook book;
  const hisac::Array<const float, 2> centers[L] = {{coarse.data(), {64, D}}, {fine.data(), {64, D}}};
  require(hisac::Codebook::build(centers, L, &book));
  hisac::ThreadPool pool;
  require(pool.resize(2));
  const hisac::Executor executor = pool.executor();
  constexpr size_t kScratch = size_t{16} << 20;
  const std::unique_ptr<std::byte, decltype(&std::free)> scratch(
      static_cast<std::byte*>(std::aligned_alloc(64, kScratch)), &std::free);
  const hisac::Context context{{scratch.get(), {kScratch}}, &executor};

  // Each request: nothing below allocates.
  std::vector<int32_t> codes(T * L), kept(M * L), count(1);
  std::vector<int64_t> votes(M), offsets{0, T};
  std::vector<float> prototypes(M * D), tokens(M * V), lse(M);
  const hisac::Agents agents{{kept.data(), {1, M, L}}, {votes.data(), {1, M}}, {count.data(), {1}}, book.fingerprint()};
  const float temperature = 1.f;
  const hisac::Histories history{&offsets[0], &offsets[1], hisac::DType::int64, 1};
  hisac::VoteParams voting;
  voting.budget = M;
  hisac::RouteParams routing;
  routing.temperature = {&temperature, {1}};
  hisac::RouteInputs inputs;
  inputs.x = {x.data(), hisac::DType::float32, T, D};
  inputs.v = {v.data(), hisac::DType::float32, T, V};
  inputs.histories = history;
  inputs.prototypes = {prototypes.data(), {1, M, D}};
  inputs.count = {count.data(), {1}};
  require(hisac::encode(context, book, inputs.x, {codes.data(), {T, L}}));
  require(hisac::vote(context, book, voting, {codes.data(), {T, L}}, history, {}, agents));
  require(hisac::prototypes(context, book, agents, {prototypes.data(), {1, M, D}}));
  require(
      hisac::route(context, routing, inputs, {{tokens.data(), hisac::DType::float32, M, V}, {lse.data(), {1, M}}, {}}));

  std::printf("%d agents, the first with %d of %d votes, lse %.3f\n", count[0], static_cast<int>(votes[0]),
              static_cast<int>(T), static_cast<double>(lse[0]));
  return count[0] == M && votes[0] > 0 ? 0 : 1;
}
