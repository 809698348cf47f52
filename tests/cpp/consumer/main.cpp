// SPDX-License-Identifier: Apache-2.0
// A small service: a catalogue of items, encoded once; a user's history as the ids of items; a request compresses the
// history and lets candidates attend to the tokens.
#include <hisac/hisac.h>

#include <algorithm>
#include <cmath>
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

/// Scratch, aligned to 64 as a workspace has to be.
using Scratch = std::unique_ptr<std::byte, decltype(&std::free)>;
static Scratch scratch(size_t bytes) {
  return {static_cast<std::byte*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)), &std::free};
}

constexpr int64_t kItems = 5000, D = 16, V = 32, L = 2, M = 50;
constexpr int64_t kLongest = 10000, kMostCandidates = 200;

/// What all requests share, and no request changes.
struct Catalogue {
  Codebook book;
  std::vector<float> x, v;     // [items, D], [items, V]
  std::vector<int32_t> codes;  // [items, L]

  /// A batch of one user, who bought these items. Offsets are read when a verb runs.
  Histories history(const int64_t* items, const int64_t* bounds, int64_t n) const {
    Histories one;
    one.x = rows(x.data(), kItems, D);
    one.v = rows(v.data(), kItems, V);
    one.codes = array(codes.data(), kItems, L);
    one.x_ids = one.v_ids = ids(items, n);  // an id outside the catalogue, such as -1, is an absent behaviour
    one.offsets = offsets(bounds, 1);
    return one;
  }
};

/// The memory of one request thread, made at start-up for the largest request.
class Worker {
 public:
  Worker(const Catalogue& catalogue, const Executor& executor) : catalogue_(catalogue) {
    context_.executor = &executor;
    params_.vote.budget = M;  // the temperature is the codebook's
    made_.tokens = {rows(tokens_.data(), M, V), array(lse_.data(), 1, M)};
    made_.log_share = array(log_share_.data(), 1, M);
    made_.agents.count = array(&count_, 1);
    const int64_t bounds[] = {0, kLongest};
    Histories largest = catalogue.history(nullptr, bounds, 0);
    largest.longest = largest.rows = kLongest;
    const size_t bytes = std::max(compress_workspace(context_, catalogue.book, params_, largest, made_),
                                  attend_workspace(context_, attention(nullptr, bounds, kMostCandidates)));
    scratch_ = scratch(bytes);
    context_.workspace = array(scratch_.get(), bytes);
  }

  /// lse [n]: how well each candidate meets the tokens; out [n, V]: their mean, weighted by that.
  Status score(const std::vector<int64_t>& items, const std::vector<float>& candidates, float* out, float* lse) {
    const int64_t n = static_cast<int64_t>(candidates.size()) / V, bounds[] = {0, static_cast<int64_t>(items.size())};
    const Histories user = catalogue_.history(items.data(), bounds, bounds[1]);
    if (Status s = compress(context_, catalogue_.book, params_, user, made_); !s.ok()) return s;
    const int64_t all[] = {0, n};
    return attend(context_, attention(candidates.data(), all, n), {rows(out, n, V), array(lse, n, 1)});
  }
  int32_t agents() const { return count_; }

 private:
  /// One head, and the tokens as they are; a trained model has matrices for keys and values.
  AttendInputs attention(const float* candidates, const int64_t* bounds, int64_t n) const {
    AttendInputs in;
    in.q = rows(candidates, n, V);
    in.keys = in.values = rows(tokens_.data(), M, V);
    in.agents = M;
    in.heads = 1;
    in.candidates = offsets(bounds, 1);
    in.bias = array(log_share_.data(), 1, M);  // -inf where an agent is absent
    return in;
  }

  const Catalogue& catalogue_;
  CompressParams params_;
  std::vector<float> tokens_ = std::vector<float>(M * V), lse_ = std::vector<float>(M), log_share_ = lse_;
  int32_t count_ = 0;
  Compressed made_;
  Scratch scratch_ = scratch(0);
  Context context_;
};

int main() {
  auto noise = [seed = 1u]() mutable {
    return static_cast<float>((seed = seed * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1.f;
  };

  // Start-up. A service has Codebook::load(path, &book) in place of `build`, and tables of its own.
  Catalogue catalogue;
  std::vector<float> coarse(64 * D), fine(64 * D);
  catalogue.x.resize(kItems * D);
  catalogue.v.resize(kItems * V);
  for (auto* numbers : {&coarse, &fine, &catalogue.x, &catalogue.v})
    for (float& x : *numbers) x = noise();
  const Array<const float, 2> centers[L] = {array<const float>(coarse.data(), 64, D),
                                            array<const float>(fine.data(), 64, D)};
  require(Codebook::build(centers, L, &catalogue.book, nullptr, 0.5f));
  ThreadPool pool;
  require(pool.resize(2));
  const Executor executor = pool.executor();
  catalogue.codes.resize(kItems * L);
  {
    Context context;
    context.executor = &executor;
    const size_t bytes = encode_workspace(context, catalogue.book);
    const Scratch once = scratch(bytes);
    context.workspace = array(once.get(), bytes);
    require(
        encode(context, catalogue.book, rows(catalogue.x.data(), kItems, D), array(catalogue.codes.data(), kItems, L)));
  }
  Worker worker(catalogue, executor);

  // A request: nothing is allocated in `compress` and `attend`.
  std::vector<int64_t> items(8000);
  for (int64_t& item : items) item = static_cast<int64_t>((noise() + 1) / 2 * (kItems - 1));
  items[7] = -1;
  std::vector<float> candidates(100 * V), features(candidates.size()), lse(100);
  for (float& x : candidates) x = noise();
  require(worker.score(items, candidates, features.data(), lse.data()));
  const auto best = std::max_element(lse.begin(), lse.end()) - lse.begin();
  const bool found = worker.agents() == M && std::isfinite(lse[static_cast<size_t>(best)]);
  std::printf("%d agents; candidate %d of %zu meets them best\n", worker.agents(), static_cast<int>(best), lse.size());
  require(worker.score({}, candidates, features.data(), lse.data()));
  std::printf("a new user: %d agents, lse %.0f\n", worker.agents(), static_cast<double>(lse[0]));
#ifdef CONSUMER_CUDA
  const Status cuda = enable_cuda();  // then Context{.device = Device::cuda, .stream = ..} and arrays on the device
  std::printf("%s\n", cuda.ok() ? "CUDA: ready" : cuda.what());
#endif
  return found && worker.agents() == 0 && std::isinf(lse[0]) ? 0 : 1;
}
