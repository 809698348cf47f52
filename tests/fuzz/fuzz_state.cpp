// SPDX-License-Identifier: Apache-2.0
// Any bytes are a state or are refused; what is one, however odd its numbers, goes through every operation without a
// fault, and what comes out of that is a state again. The first byte chooses whether the bytes are taken as they are,
// or put into a state as its head and its arrays and sealed: with the right checksum the depths are reached at once.
#include <algorithm>

#include "fuzz.h"

using namespace hisac;

namespace {

constexpr int64_t kItems = 40;

/// Whole lines of so many bytes, of which a sanitizer guards the end.
class Memory {
 public:
  explicit Memory(size_t bytes) : size_(static_cast<int64_t>(bytes)), held_(size_) {}
  Array<std::byte, 1> array() { return {held_.data(), {size_}}; }

 private:
  int64_t size_;
  test::Guarded<std::byte> held_;
};

struct World {
  test::Random random{3};
  Codebook book = test::codebook(random, {5, 7}, 3), other = test::codebook(random, {9}, 3);
  std::vector<float> x = test::uniform(random, kItems * 3), v = test::uniform(random, kItems * 2);
  std::vector<int32_t> codes, other_codes;

  World() {
    for (int64_t i = 0; i < kItems * 2; ++i) codes.push_back(static_cast<int32_t>(random.below(i % 2 ? 8 : 6)) - 1);
    for (int64_t i = 0; i < kItems; ++i) other_codes.push_back(static_cast<int32_t>(random.below(10)));
  }
  StateItems items(bool of_other) const {
    const std::vector<int32_t>& own = of_other ? other_codes : codes;
    const int64_t levels = of_other ? 1 : 2;
    return {test::rows(x, 3), test::rows(v, 2), {own.data(), {kItems, levels}}, {}, 1};
  }
};

/// Calls change(context) with so much workspace; an error is one that bytes may cause.
template <class Change>
void run(size_t bytes, Change change) {
  Memory memory(bytes);
  const Status status = change(Context{memory.array(), nullptr});
  CHECK(status.ok() || status.code() == Code::not_implemented || status.code() == Code::out_of_memory ||
        status.code() == Code::invalid_argument);
}

void read(const World& world, const UserState& state) {
  const bool of_other = state.fingerprint() == world.other.fingerprint();
  const Codebook& book = of_other ? world.other : world.book;
  const StateItems items = world.items(of_other);
  const int64_t width = state.params().width;
  if (width > 64) return;
  std::vector<float> tokens(test::size(4 * width)), lse(4), v(test::size(kItems * book.levels() * width)),
      mass(test::size(kItems * book.levels())), share(test::size(state.ring()));
  std::vector<int32_t> codes(test::size(4 * book.levels())), count(1);
  std::vector<int64_t> votes(4), rows(share.size()), times(share.size());
  const float tau = 0.5f;
  CompressParams params;
  params.vote.budget = 4;
  params.route.temperature = {&tau, {1}};
  Compressed out;
  out.tokens = {hisac::rows(tokens.data(), 4, width), {lse.data(), {1, 4}}};
  out.agents = {{codes.data(), {1, 4, book.levels()}}, {votes.data(), {1, 4}}, {count.data(), {1}}};
  run(state.compress_workspace({}, book, params, out),
      [&](const Context& c) { return state.compress(c, book, params, out); });
  run(state.match_workspace({}, book, items.codes, {}), [&](const Context& c) {
    return state.match(c, book, items.codes, {},
                       {hisac::rows(v.data(), kItems * book.levels(), width), {mass.data(), {kItems, book.levels()}}},
                       7);
  });
  float table;
  StateStats stats;
  CHECK(state
            .recent({{rows.data(), {state.ring()}}, {times.data(), {state.ring()}}, {share.data(), {state.ring()}}},
                    &table)
            .ok());
  (void)state.stats(book, &out.agents, nullptr, &stats);
}

void change(const World& world, fuzz::Bytes& in, UserState& state, UserState& beside) {
  const bool of_other = state.fingerprint() == world.other.fingerprint();
  const Codebook& book = of_other ? world.other : world.book;
  const StateItems items = world.items(of_other);
  const int64_t n = in.between(0, 12);
  std::vector<int64_t> ids, times, positions;
  std::vector<float> weights;
  for (int64_t i = 0; i < n; ++i) {
    ids.push_back(in.between(-1, kItems));
    times.push_back(in.integer(true));
    positions.push_back(in.integer(in.byte() % 4 == 0));
    weights.push_back(in.value(true));
  }
  const StateEvents events{
      hisac::ids(ids.data(), n), {weights.data(), {n}}, {times.data(), {n}}, {positions.data(), {n}}};
  switch (in.byte() % 6) {
    case 0:
    case 1:
      return run(state.workspace(), [&](const Context& c) { return state.append(c, book, items, events); });
    case 2:
      return run(state.workspace(), [&](const Context& c) {
        return state.expire(c, book, items, in.integer(true), in.integer(true), in.integer(true));
      });
    case 3:
      return run(state.workspace(), [&](const Context& c) {
        return state.forget(c, book, items, events.ids, {in.flag() ? &events : nullptr});
      });
    case 4:
      return run(state.workspace(), [&](const Context& c) { return state.merge(c, book, items, beside); });
    default: {
      if (UserState::bytes(world.other, state.params()) > 1 << 20) return;
      Memory memory(UserState::bytes(world.other, state.params()));
      UserState made;
      run(state.migrate_workspace({}, world.other),
          [&](const Context& c) { return state.migrate(c, book, world.other, memory.array(), &made, nullptr); });
      if (made) read(world, made);
    }
  }
}

/// After any operations a state is one still, as it lies, compact, and in each form.
void survives(const UserState& state) {
  state.seal();
  UserState back;
  CHECK(UserState::parse({state.data(), {state.size()}}, &back).ok());
  for (const DType type : {DType::float32, DType::bfloat16, DType::int8}) {
    if (type != state.type() && state.type() != DType::float32) continue;
    Memory memory(state.serialised_bytes(type, state.leaves()));
    CHECK(state.serialise(type, state.leaves(), memory.array()).ok());
    CHECK(UserState::parse(memory.array(), &back).ok());
    CHECK(back.revision() == state.revision() && back.leaves() == state.leaves());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 8) return 0;
  static const World world;
  fuzz::Bytes in(data, size);
  const uint8_t kind = in.byte();
  const StateParams params{in.between(1, 12), in.between(0, 4),          2, in.flag() ? in.between(1, 100) : 0,
                           in.flag(),         uint64_t{in.byte() < 250}, 0};
  Memory first(UserState::bytes(world.book, params)), second(UserState::bytes(world.book, params));
  UserState state, beside;
  CHECK(UserState::create(world.book, params, first.array(), &state).ok());
  CHECK(UserState::create(world.book, params, second.array(), &beside).ok());
  for (int64_t i = in.between(0, 3); i > 0; --i) change(world, in, beside, state);
  for (int64_t i = in.between(0, 3); i > 0; --i) change(world, in, state, beside);
  if (kind % 4) {  // bytes of the input, over those of a state from the counts on, with a checksum that is right
    const size_t all = static_cast<size_t>(state.size());
    for (int64_t n = in.between(0, 12); n > 0; --n) {
      const size_t at = 32 + (size_t{in.byte()} << 8 | in.byte()) % (all - 32);
      state.data()[at] = static_cast<std::byte>(in.byte());
    }
    UserState odd;
    if (state.size() == static_cast<int64_t>(all)) state.seal();
    const Status status = UserState::parse(first.array(), &odd);
    CHECK(status.ok() || status.code() == Code::corrupt_file);
    if (!status.ok()) return 0;
    state = odd;
  } else {
    Memory any(size);
    std::memcpy(any.array().data, data, size);
    UserState odd;
    const Status status = UserState::parse(any.array(), &odd);
    CHECK(status.ok() || status.code() == Code::corrupt_file);
  }
  read(world, state);
  for (int64_t i = in.between(0, 5); i > 0; --i) {
    const bool other = in.flag();
    change(world, in, other ? beside : state, other ? state : beside);
    read(world, state);
  }
  survives(state);
  survives(beside);
  return 0;
}
