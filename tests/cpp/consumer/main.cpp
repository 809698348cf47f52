// SPDX-License-Identifier: Apache-2.0
// One request: a user's history of T behaviours becomes M tokens, that is, rows to attend to.
#include <hisac/hisac.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

using namespace hisac;

static void require(const Status& status) {
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

  // Once: a codebook (in a service: Codebook::load(path, &book), before readers see it), threads, and memory for the
  // largest request.
  Codebook book;
  const Array<const float, 2> centers[L] = {{coarse.data(), {64, D}}, {fine.data(), {64, D}}};
  require(Codebook::build(centers, L, &book));
  ThreadPool pool;
  require(pool.resize(2));
  const Executor executor = pool.executor();
  constexpr size_t kScratch = size_t{16} << 20;
  const std::unique_ptr<std::byte, decltype(&std::free)> scratch(
      static_cast<std::byte*>(std::aligned_alloc(64, kScratch)), &std::free);
  const Context context{{scratch.get(), {kScratch}}, &executor};

  // Each request, into buffers that a service would keep: no call of hisac's below allocates.
  std::vector<int32_t> codes(T * L), kept(M * L), count(1);
  std::vector<int64_t> votes(M), offsets{0, T};
  std::vector<float> prototypes(M * D), tokens(M * V), lse(M);
  const Agents agents{{kept.data(), {1, M, L}}, {votes.data(), {1, M}}, {count.data(), {1}}, book.fingerprint()};
  const float temperature = 1.f;
  Histories history;
  history.x = {x.data(), DType::float32, T, D};
  history.v = {v.data(), DType::float32, T, V};
  history.offsets = {&offsets[0], &offsets[1], DType::int64, 1};
  history.codes = {codes.data(), {T, L}};
  VoteParams voting;
  voting.budget = M;
  RouteParams routing;
  routing.temperature = {&temperature, {1}};
  const RouteAgents to{{prototypes.data(), {1, M, D}}, {count.data(), {1}}};
  const Tokens out{{tokens.data(), DType::float32, M, V}, {lse.data(), {1, M}}, {}};
  require(encode(context, book, history.x, {codes.data(), {T, L}}));
  require(vote(context, book, voting, history, agents));
  require(hisac::prototypes(context, book, agents, {prototypes.data(), {1, M, D}}));
  require(route(context, nullptr, routing, history, to, out));

  std::printf("%d agents, the first with %d of %d votes, lse %.3f\n", count[0], static_cast<int>(votes[0]),
              static_cast<int>(T), static_cast<double>(lse[0]));
#ifdef CONSUMER_CUDA
  const Status cuda = enable_cuda();  // then Context{.device = Device::cuda, .stream = ..} and arrays on the device
  std::printf("%s\n", cuda.ok() ? "CUDA: ready" : cuda.what());
#endif
  return count[0] == M && votes[0] > 0 ? 0 : 1;
}
