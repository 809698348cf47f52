// SPDX-License-Identifier: Apache-2.0
// States for tests: in memory of exactly their size, of random items, and what the verbs make of them.
#pragma once
#include <doctest/doctest.h>

#include <memory>

#include "support.h"

namespace states {

using namespace hisac;
using test::Guarded;
using test::Workspace;

/// A state in memory of exactly its size.
struct Held {
  std::unique_ptr<Guarded<std::byte>> memory;
  UserState state;

  Array<std::byte, 1> lend(size_t bytes) {
    memory = std::make_unique<Guarded<std::byte>>(static_cast<int64_t>(bytes));
    return {memory->data(), {static_cast<int64_t>(bytes)}};
  }
  void make(const Codebook& book, const StateParams& params) {
    const size_t bytes = UserState::bytes(book, params);
    REQUIRE(UserState::create(book, params, lend(bytes), &state).ok());
  }
};

inline Held copy(const UserState& state, DType type, int64_t room) {
  Held out;
  const auto memory = out.lend(state.serialised_bytes(type, room));
  REQUIRE(state.serialise(type, room, memory).ok());
  REQUIRE(UserState::parse(memory, &out.state).ok());
  return out;
}

/// Runs change(context) in a workspace of exactly `bytes`.
template <class Change>
inline void change(size_t bytes, Change run) {
  CHECK(test::exactly(bytes, nullptr, run));
}

struct alignas(64) Line {
  std::byte bytes[64];
};

/// The sums of a state, in the order of leaves.
struct Sums {
  std::vector<Line> memory;
  Histories h;

  Sums(const UserState& state, const Codebook& book, bool packed) {
    const size_t bytes = state.sums_bytes(book, packed);
    memory.resize(bytes / 64 + 1);
    REQUIRE(state.sums(book, kEpoch, packed, {memory[0].bytes, {static_cast<int64_t>(bytes)}}, &h).ok());
  }
  std::vector<float> rows(const Rows& table, const Ids& ids) const {
    std::vector<float> out;
    for (int64_t i = 0; i < h.codes.shape[0]; ++i) {
      const float* const row = static_cast<const float*>(table.data) + (ids ? ids[i] : i) * table.width;
      out.insert(out.end(), row, row + table.width);
    }
    return out;
  }
  std::vector<float> floats(const Array<const float, 1>& a) const {
    return std::vector<float>(a.data, a.data + a.shape[0]);
  }
};

/// A state of so many leaves, of random items, and all that its calls take.
struct Served {
  test::Random random{71};
  int64_t width, wide, items;
  Codebook book;
  std::vector<float> x, v;
  std::vector<int32_t> codes;
  std::vector<int64_t> ids, times;
  StateItems tables;
  Held held;

  explicit Served(StateParams params, int64_t n = 300, int64_t d = 6, std::vector<int64_t> sizes = {12, 16})
      : width(d), wide(params.width), items(n), book(test::codebook(random, sizes, d)) {
    x = test::uniform(random, items * width);
    v = test::uniform(random, items * wide);
    codes.resize(test::size(items * 2));
    Workspace workspace(encode_workspace({}, book));
    REQUIRE(encode({workspace.array()}, book, test::rows(x, width), {codes.data(), {items, 2}}).ok());
    for (int64_t i = 0; i < 4 * items; ++i) {
      ids.push_back(random.below(items));
      times.push_back(10 * i);
    }
    tables = {test::rows(x, width), test::rows(v, wide), {codes.data(), {items, 2}}, {}, params.model_tag};
    held.make(book, params);
  }
  StateEvents events(int64_t first, int64_t n) const {
    return {hisac::ids(ids.data() + first, n), {}, {times.data() + first, {n}}, {}};
  }
  Status append(const Context& context, int64_t first, int64_t n) {
    return held.state.append(context, book, tables, events(first, n));
  }
  void fill(int64_t n) {
    change(held.state.workspace(), [&](const Context& c) { return append(c, 0, n); });
  }
};

struct Made {
  std::vector<float> tokens, lse;
  std::vector<int32_t> codes, count;
  std::vector<int64_t> votes;
  Compressed out;
  CompressParams params;
  float tau = 0.3f;

  Made(const Codebook& book, int64_t m, int64_t wide)
      : tokens(test::size(m * wide)),
        lse(test::size(m)),
        codes(test::size(m * book.levels())),
        count(1),
        votes(test::size(m)) {
    params.vote.budget = m;
    params.route.temperature = {&tau, {1}};
    out.tokens = {hisac::rows(tokens.data(), m, wide), {lse.data(), {1, m}}};
    out.agents = {{codes.data(), {1, m, book.levels()}}, {votes.data(), {1, m}}, {count.data(), {1}}};
  }
};

}  // namespace states
