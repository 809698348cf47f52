// SPDX-License-Identifier: Apache-2.0
// What a C++ service sees, without Python: the latency of vote, route and attend, of compress, which is the first two
// in one call, and of a whole request, inputs coming from memory. encode and leaf_sums are not timed.
//
//   c++ -O2 -std=c++17 bench/service.cpp -I PREFIX/include -L PREFIX/lib -lhisac -pthread -o service
//   ./service [calls, 2000 by default] [threads, 1] [milliseconds of rest before each call, 0]
//
// The data are those of bench/data.py in kind, not in numbers: users with some thirty Zipf-like interests, a tenth of
// the rows off them, and long tails of leaves; x near the prototype of its code. Calls go through the users in turn.
#include <hisac/hisac.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

using namespace hisac;

namespace {

constexpr int64_t kSize = 512, D = 128, V = 64, M = 200, kHeads = 2, kCandidates = 500, L = 2;
constexpr size_t kScratch = size_t{256} << 20;

void require(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.what());
  std::exit(1);
}

template <class T>
std::vector<T> vector(int64_t n) {
  return std::vector<T>(static_cast<size_t>(n));
}

struct Service {
  std::mt19937 random{0};
  std::vector<float> centers[L];
  Codebook book;
  ThreadPool pool;
  Executor executor;
  std::unique_ptr<std::byte, decltype(&std::free)> scratch{static_cast<std::byte*>(std::aligned_alloc(64, kScratch)),
                                                           &std::free};
  Context context;

  explicit Service(int threads) {
    if (!scratch) require(Status::error(Code::out_of_memory, "out of memory for the workspace"));
    require(pool.resize(threads));
    executor = pool.executor();
    context = {{scratch.get(), {kScratch}}, &executor};
    std::normal_distribution<float> normal(0.f, 1 / std::sqrt(float(D)));
    for (int l = 0; l < L; ++l)
      for (int64_t i = 0; i < kSize * D; ++i) centers[l].push_back(normal(random) * (l ? 0.4f : 1.f));
    const Array<const float, 2> levels[L] = {{centers[0].data(), {kSize, D}}, {centers[1].data(), {kSize, D}}};
    require(Codebook::build(levels, L, &book));
  }

  std::vector<int32_t> history(int64_t rows) {
    std::uniform_real_distribution<double> uniform;
    std::uniform_int_distribution<int32_t> any(0, kSize - 1);
    int32_t liked[30];
    double share[30], all = 0;
    for (int k = 0; k < 30; ++k) {
      liked[k] = any(random);
      all += share[k] = 1.0 / (k + 1);
    }
    std::discrete_distribution<int> interest(share, share + 30);
    auto codes = vector<int32_t>(rows * L);
    for (size_t i = 0; i < codes.size(); i += L) {
      const int32_t first = uniform(random) < 0.1 ? any(random) : liked[interest(random)];
      const double tail = 5 * (std::pow(1 - uniform(random), -1 / 0.8) - 1);
      codes[i] = first;
      codes[i + 1] = (static_cast<int32_t>(std::min(tail, kSize - 1.0)) * 167 + first * 31) % kSize;
    }
    return codes;
  }

  std::vector<float> noise(int64_t n, float scale) {
    auto out = vector<float>(n);
    uint32_t seed = random();
    for (float& f : out) f = (static_cast<float>((seed = seed * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1.f) * scale;
    return out;
  }
};

/// One user's rows, and the results that its requests are written to.
struct User {
  int64_t rows, offsets[2] = {0, 0};
  std::vector<int32_t> codes;
  std::vector<float> x, v;
  std::vector<int32_t> kept = vector<int32_t>(kMaxSeats * L), count = vector<int32_t>(1);
  std::vector<int64_t> votes = vector<int64_t>(kMaxSeats);

  User(Service& s, int64_t n, bool with_rows) : rows(n), codes(s.history(n)) {
    offsets[1] = n;
    if (!with_rows) return;
    x = s.noise(n * D, 0.02f);
    v = s.noise(n * V, 1.f);
    for (int64_t i = 0; i < n; ++i) {
      float p[D];
      s.book.prototype(&codes[static_cast<size_t>(i * L)], p);
      for (int64_t d = 0; d < D; ++d) x[static_cast<size_t>(i * D + d)] += p[d];
    }
  }
  Histories history() const {
    Histories h;
    h.x = hisac::rows(x.data(), rows, D);
    h.v = hisac::rows(v.data(), rows, V);
    h.offsets = hisac::offsets(offsets, 1);
    h.codes = array(codes.data(), rows, L);
    return h;
  }
  Agents agents(int64_t m, const Codebook& book, float* prototypes = nullptr) {
    return {array(kept.data(), 1, m, L), array(votes.data(), 1, m), array(count.data(), 1), book.fingerprint(),
            array(prototypes, 1, m, D)};
  }
};

std::chrono::milliseconds rest{0};

/// Calls work(call number), each after a rest, and prints its quantiles; ns a row where rows are given.
template <class Work>
void measure(const char* name, int calls, int64_t rows, Work work) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> us;
  for (int i = -calls / 10 - 1; i < calls; ++i) {
    std::this_thread::sleep_for(rest);
    const auto start = Clock::now();
    work(std::abs(i));
    if (i >= 0) us.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  }
  std::sort(us.begin(), us.end());
  const auto at = [&](double q) { return us[static_cast<size_t>(q * static_cast<double>(us.size() - 1))]; };
  std::printf("%-24s %10.1f %10.1f %10.1f", name, at(0.5), at(0.99), us.back());
  if (rows) std::printf(" %10.2f", at(0.5) * 1e3 / static_cast<double>(rows));
  std::printf("\n");
}

void votes(Service& s, int64_t rows, int calls) {
  std::vector<User> users;
  for (int i = 0; i < 4; ++i) users.emplace_back(s, rows, false);
  for (const bool budget : {false, true}) {
    VoteParams params;
    if (budget)
      params.budget = M;
    else
      params.fanout[0] = params.fanout[1] = 16;
    const std::string name = "vote/" + std::to_string(rows / 1000) + "k " + (budget ? "budget" : "fanout");
    measure(name.c_str(), calls, rows, [&](int i) {
      User& u = users[static_cast<size_t>(i % 4)];
      require(vote(s.context, s.book, params, u.history(), u.agents(seats(params, L), s.book)));
    });
  }
}

void requests(Service& s, int64_t rows, int calls) {
  std::vector<User> users;
  for (int i = 0; i < 8; ++i) users.emplace_back(s, rows, true);  // more than a cache holds
  auto prototypes = vector<float>(M * D), tokens = vector<float>(M * V), lse = vector<float>(M);
  const auto q = s.noise(kCandidates * V, 1.f);
  auto out = vector<float>(kCandidates * V), out_lse = vector<float>(kCandidates * kHeads);
  const int64_t at[2] = {0, kCandidates};
  const float temperature = 0.1f;
  CompressParams params;
  params.vote.budget = M;
  params.route.normalize = Normalize::history;
  params.route.temperature = array(&temperature, 1);
  const Tokens kept{hisac::rows(tokens.data(), M, V), array(lse.data(), 1, M), {}};
  const auto of = [&](int i) -> User& { return users[static_cast<size_t>(i) % users.size()]; };
  const auto agents = [&](User& u) { return u.agents(M, s.book, prototypes.data()); };
  const auto whole = [&](User& u) {
    require(compress(s.context, s.book, params, u.history(), {kept, {}, u.agents(M, s.book)}));
  };
  const auto score = [&](User&) {
    const Rows keys = hisac::rows(tokens.data(), M * kHeads, V / kHeads);
    AttendInputs in;
    in.q = hisac::rows(q.data(), kCandidates * kHeads, V / kHeads);
    in.keys = in.values = keys;
    in.agents = M;
    in.heads = kHeads;
    in.candidates = offsets(at, 1);
    in.bias = array(lse.data(), 1, M);
    in.scale = 1 / std::sqrt(float(V / kHeads));
    require(attend(
        s.context, in,
        {hisac::rows(out.data(), kCandidates * kHeads, V / kHeads), array(out_lse.data(), kCandidates, kHeads)}));
  };
  measure("vote", calls, rows, [&](int i) {
    User& u = of(i);
    require(vote(s.context, s.book, params.vote, u.history(), agents(u)));
  });
  measure("route", calls, rows, [&](int i) {
    User& u = of(i);
    require(route(s.context, &s.book, params.route, u.history(), agents(u), kept));
  });
  measure("compress", calls, rows, [&](int i) { whole(of(i)); });
  measure("attend", calls, 0, [&](int i) { score(of(i)); });
  measure("compress and attend", calls, rows, [&](int i) {
    User& u = of(i);
    whole(u);
    score(u);
  });
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::max(1, std::atoi(argv[1])) : 2000, threads = argc > 2 ? std::atoi(argv[2]) : 1;
  if (argc > 3) rest = std::chrono::milliseconds(std::max(0, std::atoi(argv[3])));
  Service s(threads);
  std::printf("hisac from C++, %d threads of %u, %d calls each, %d ms apart; codes 512 x 512, D 128, V 64\n", threads,
              std::thread::hardware_concurrency(), calls, static_cast<int>(rest.count()));
  std::printf("%-24s %10s %10s %10s %10s\n", "one user", "median us", "99% us", "most us", "ns a row");
  for (const int64_t rows : {1000, 10000, 100000}) votes(s, rows, calls);
  std::printf("a request: 10,000 behaviours, 200 agents by budget, 500 candidates, 2 heads\n");
  requests(s, 10000, std::max(1, calls / 4));
}
