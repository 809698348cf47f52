// SPDX-License-Identifier: Apache-2.0
// A user's state in C++: how many bytes it has, and on one core the median time of its calls: events in memory and with
// the bytes parsed and sealed around them, tokens from the table, a state from a whole history.
//
//   c++ -O2 -std=c++17 bench/state.cpp -I PREFIX/include -L PREFIX/lib -lhisac -pthread -o state
//   ./state sizes [leaves, 160] [D, 64] [V, 64] [ring, 0]
//   ./state [calls, 400 by default]
//
// The history is that of service.cpp in kind: interests with long tails of leaves. Of the ten events of a call, as many
// have a new leaf as come so at that place of the history.
#include <hisac/hisac.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

using namespace hisac;

namespace {

void require(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.what());
  std::exit(1);
}

struct Memory {
  explicit Memory(size_t bytes) : size(bytes), data(std::aligned_alloc(64, (bytes + 127) / 64 * 64), &std::free) {}
  Array<std::byte, 1> array() const { return {static_cast<std::byte*>(data.get()), {static_cast<int64_t>(size)}}; }
  size_t size;
  std::unique_ptr<void, decltype(&std::free)> data;
};

Codebook random_book(int64_t size, int64_t width) {
  std::mt19937 random{0};
  std::normal_distribution<float> normal(0.f, 1 / std::sqrt(float(width)));
  std::vector<float> centers[2];
  for (int l = 0; l < 2; ++l)
    for (int64_t i = 0; i < size * width; ++i) centers[l].push_back(normal(random) * (l ? 0.4f : 1.f));
  const Array<const float, 2> levels[] = {{centers[0].data(), {size, width}}, {centers[1].data(), {size, width}}};
  Codebook book;
  require(Codebook::build(levels, 2, &book));
  return book;
}

/// A user's events, as ids of items that have their own x and v.
struct World {
  static constexpr int64_t kItems = 20000, kEvents = 20000;
  int64_t d, v_width;
  Codebook book;
  std::vector<float> x, v;
  std::vector<int32_t> codes;
  std::vector<int64_t> ids, times;
  StateItems items;

  /// One item in `stray` is off the interests, and has a code of level 1 of its own.
  World(int64_t d_, int64_t v_, int64_t stray) : d(d_), v_width(v_), book(random_book(512, d_)) {
    std::mt19937 random{1};
    std::normal_distribution<float> normal(0.f, 0.02f);
    std::exponential_distribution<float> tail(1.f);
    std::uniform_int_distribution<int> any(0, 511);
    std::vector<int> interests(30);
    for (int& i : interests) i = any(random);
    for (int64_t i = 0; i < kItems; ++i) {
      const size_t rank = static_cast<size_t>(tail(random) * 6) % interests.size();
      const int32_t first = i % stray ? interests[rank] : any(random);
      const int32_t code[] = {first,
                              i % stray ? (first * 31 + static_cast<int>(tail(random) * 20)) % 512 : any(random)};
      codes.insert(codes.end(), code, code + 2);
      std::vector<float> row(static_cast<size_t>(d));
      book.prototype(code, row.data());
      for (float& value : row) x.push_back(value + normal(random));
      for (int64_t k = 0; k < v_width; ++k) v.push_back(normal(random) * 50);
    }
    std::uniform_int_distribution<int64_t> item(0, kItems - 1);
    for (int64_t i = 0; i < kEvents; ++i) {
      ids.push_back(item(random));
      times.push_back(60 * i);
    }
    items = {rows(static_cast<const float*>(x.data()), kItems, d),
             rows(static_cast<const float*>(v.data()), kItems, v_width),
             {codes.data(), {kItems, 2}},
             {},
             0};
  }
  StateEvents events(int64_t first, int64_t n) const {
    return {hisac::ids(ids.data() + first, n), {}, {times.data() + first, {n}}, {}};
  }
};

/// The median time of run() in microseconds; before() is not timed.
template <class Before, class Run>
double median(int calls, Before before, Run run) {
  std::vector<double> all;
  for (int i = 0; i < calls; ++i) {
    before();
    const auto start = std::chrono::steady_clock::now();
    run();
    all.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(all.begin(), all.begin() + calls / 2, all.end());
  return all[static_cast<size_t>(calls / 2)];
}

void print_sizes(int64_t leaves, int64_t d, int64_t v, int64_t ring) {
  const Codebook book = random_book(2, d);
  for (const bool mean_x : {true, false}) {
    StateParams params{leaves, ring, v, 0, mean_x};
    Memory memory(UserState::bytes(book, params));
    UserState state;
    require(UserState::create(book, params, memory.array(), &state));
    std::printf("%d leaves, D %d, V %d, ring %d, %s mean x: float32 %zu bytes, bfloat16 %zu, int8 %zu\n", int(leaves),
                int(d), int(v), int(ring), mean_x ? "with" : "without", state.serialised_bytes(DType::float32, leaves),
                state.serialised_bytes(DType::bfloat16, leaves), state.serialised_bytes(DType::int8, leaves));
  }
}

void time_states(int calls, int64_t d, int64_t v, int64_t half_life, int64_t stray) {
  const World world(d, v, stray);
  const StateParams params{1024, 0, v, half_life};
  const size_t bytes = UserState::bytes(world.book, params);
  const Memory memory(bytes), kept(bytes);
  UserState state;
  require(UserState::create(world.book, params, memory.array(), &state));
  const Memory scratch(size_t{64} << 20);
  Context context;
  context.workspace = scratch.array();
  int64_t seen = 0;
  while (state.leaves() < 500) require(state.append(context, world.book, world.items, world.events(seen++, 1)));
  require(state.serialise(DType::float32, params.leaves, kept.array()));
  const int64_t before = state.leaves();
  int64_t made = 0, at = 0;
  const auto restore = [&] {
    std::memcpy(memory.data.get(), kept.data.get(), bytes);
    at = (at + 10) % 1000;
  };
  const auto append = [&] {
    require(state.append(context, world.book, world.items, world.events(seen + at, 10)));
    made += state.leaves() - before;
  };
  std::printf("D %d, V %d, half-life %d, 1 item in %d stray: %d leaves after %d events\n", int(d), int(v),
              int(half_life), int(stray), int(before), int(seen));
  const double in_memory = median(calls, restore, append);
  std::printf("  append of 10 events (%.1f new leaves): %.2f us\n", double(made) / calls, in_memory);
  const double in_place = median(calls, restore, [&] {
    require(UserState::parse(memory.array(), &state));
    append();
    state.seal();
  });
  const Memory compact(state.serialised_bytes(DType::float32, state.leaves()));
  std::printf("  the same with parse and seal in place, %zu bytes: %.1f us\n", bytes, in_place);
  StateParams tight = params;
  tight.leaves = 520;
  const Memory small(UserState::bytes(world.book, tight)), small_kept(small.size);
  UserState other;
  require(UserState::create(world.book, tight, small.array(), &other));
  for (int64_t i = 0; i < seen; ++i) require(other.append(context, world.book, world.items, world.events(i, 1)));
  require(other.serialise(DType::float32, tight.leaves, small_kept.array()));
  const double tight_time = median(
      calls,
      [&] {
        std::memcpy(small.data.get(), small_kept.data.get(), small.size);
        at = (at + 10) % 1000;
      },
      [&] {
        require(UserState::parse(small.array(), &other));
        require(other.append(context, world.book, world.items, world.events(seen + at, 10)));
        other.seal();
      });
  std::printf("  the same with room for 520 leaves, %zu bytes: %.1f us\n", small.size, tight_time);
  const Memory fresh(bytes);
  UserState built;
  const double building = median(
      std::max(calls / 20, 5), [&] { require(UserState::create(world.book, params, fresh.array(), &built)); },
      [&] { require(built.append(context, world.book, world.items, world.events(0, 10000))); });
  std::printf("  a state of 10,000 behaviours (%d leaves): %.2f ms\n", int(built.leaves()), building / 1000);
  restore();
  constexpr int64_t M = 100;
  std::vector<float> tokens(size_t(M * v)), lse(M), share(M);
  std::vector<int32_t> leaf(M * 2), count(1);
  std::vector<int64_t> votes(M);
  const float tau = 0.05f;
  for (const int64_t sparse : {0, 32, 16}) {
    CompressParams how;
    how.vote.budget = M;
    how.route.temperature = {&tau, {1}};
    how.route.sparse = sparse;
    Compressed out;
    out.tokens = {rows(tokens.data(), M, v), {lse.data(), {1, M}}};
    out.log_share = {share.data(), {1, M}};
    out.agents = {{leaf.data(), {1, M, 2}}, {votes.data(), {1, M}}, {count.data(), {1}}};
    const double time = median(calls, [] {}, [&] { require(state.compress(context, world.book, how, out)); });
    std::printf("  compress, M %d, sparse %d: %.1f us\n", int(M), int(sparse), time);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const auto number = [&](int i, int64_t otherwise) { return argc > i ? std::atoll(argv[i]) : otherwise; };
  if (argc > 1 && std::string(argv[1]) == "sizes") {
    print_sizes(number(2, 160), number(3, 64), number(4, 64), number(5, 0));
    return 0;
  }
  const int calls = static_cast<int>(number(1, 400));
  time_states(calls, 64, 64, 0, 10);
  time_states(calls, 128, 64, 0, 10);
  time_states(calls, 128, 64, 86400, 10);
  time_states(calls, 128, 64, 0, 1000);  // few codes of level 1, where sparse routing saves
}
