// SPDX-License-Identifier: Apache-2.0
// A user's state: runs recorded from its definition, replayed; bytes and what is no state; the words of its errors; no
// allocation and no system call; states that threads hand to one another and read at once.
#include <doctest/doctest.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <mutex>

#include "counting.h"
#include "right.h"
#include "vectors.h"

using namespace hisac;
using test::Guarded;
using test::invalid;
using test::is;
using test::Workspace;
using vectors::Case;

namespace {

enum Operation : int64_t { kAppend, kExpire, kForget, kMerge, kReturn, kMigrate };

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

Held copy(const UserState& state, DType type, int64_t room) {
  Held out;
  const auto memory = out.lend(state.serialised_bytes(type, room));
  REQUIRE(state.serialise(type, room, memory).ok());
  REQUIRE(UserState::parse(memory, &out.state).ok());
  return out;
}

/// Runs change(context) in a workspace of exactly `bytes`.
template <class Change>
void change(size_t bytes, Change run) {
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

class Run {
 public:
  explicit Run(const Case& c) : c_(c), books_{vectors::book(c), other_book()} {
    const auto& o = c["options"].longs;
    StateParams params{o[0], o[1], c["v"].width(), o[2], o[3] != 0, 9, 1};
    for (Held& held : held_) held.make(books_[0], params);
    for (int k = 0; k < 2; ++k)
      items_[k] = {c["x"].rows(), c["v"].rows(), {c[k ? "other_codes" : "codes"].ints.data(), {40, 2}}, {}, 9};
  }

  void play() {
    const auto& steps = c_["steps"].longs;
    for (size_t i = 0; i < steps.size(); i += 8) {
      step(steps.data() + i);
      for (const Held& held : held_) note(held.state);
    }
    c_.check_integers("log", log_);
    for (int k = 0; k < 2; ++k) check(std::to_string(k), held_[k].state, books_[of_[k]]);
  }

 private:
  Codebook other_book() const {
    Case other("other");
    other.add("book", c_["other"]);
    return vectors::book(other);
  }

  StateEvents events(int64_t first, int64_t last) const {
    const int64_t n = last - first;
    return {ids(c_["ids"].longs.data() + first, n),
            {c_["weights"].floats.data() + first, {n}},
            {c_["times"].longs.data() + first, {n}},
            {c_["positions"].longs.data() + first, {n}}};
  }

  void step(const int64_t* s) {
    Held& held = held_[s[1]];
    UserState& state = held.state;
    const Codebook& book = books_[of_[s[1]]];
    const StateItems& items = items_[of_[s[1]]];
    const StateEvents given = events(s[2], s[3]), kept = events(s[4], s[5] < s[4] ? s[4] : s[5]);
    switch (s[0]) {
      case kAppend:
        return change(state.workspace(), [&](const Context& c) { return state.append(c, book, items, given); });
      case kExpire:
        return change(state.workspace(),
                      [&](const Context& c) { return state.expire(c, book, items, s[4], s[5], s[6]); });
      case kForget:
        return change(state.workspace(), [&](const Context& c) {
          StateKept source{nullptr,
                           [](void* ctx, const int32_t*, StateEvents* out) {
                             *out = *static_cast<const StateEvents*>(ctx);
                             return Status();
                           },
                           const_cast<StateEvents*>(&kept)};
          if (s[2] % 2) source = {&kept};
          return state.forget(c, book, items, given.ids, source);
        });
      case kMerge:
        if (of_[0] != of_[1]) return;
        return change(state.workspace(),
                      [&](const Context& c) { return state.merge(c, book, items, held_[1 - s[1]].state); });
      case kReturn: {
        Held compact = copy(state, DType::float32, state.leaves());
        held = copy(compact.state, DType::float32, state.params().leaves);
        return;
      }
      default: {
        Held made;
        const Codebook& to = books_[1 - of_[s[1]]];
        const auto memory = made.lend(UserState::bytes(to, state.params()));
        change(state.migrate_workspace({}, to),
               [&](const Context& c) { return state.migrate(c, book, to, memory, &made.state, nullptr); });
        of_[s[1]] = 1 - of_[s[1]];
        held = std::move(made);
      }
    }
  }

  void note(const UserState& state) {
    StateStats s;
    const Codebook& book = books_[state.fingerprint() == books_[0].fingerprint() ? 0 : 1];
    REQUIRE(state.stats(book, nullptr, nullptr, &s).ok());
    for (const int64_t n : {state.epoch(), state.position(), static_cast<int64_t>(state.revision()), s.leaves, s.ring,
                            s.seen, s.votes, s.dropped_leaves, s.dropped_votes})
      log_.push_back(n);
    const Sums sums(state, book, true);
    for (int64_t i = 0; i < s.leaves; ++i)
      log_.push_back(static_cast<int64_t>(book.leaf(sums.h.codes.data + i * book.levels())));
    const int64_t* const votes = static_cast<const int64_t*>(sums.h.weights.data);
    log_.insert(log_.end(), votes, votes + s.leaves);
    std::vector<int64_t> rows(test::size(s.ring)), times(test::size(s.ring));
    std::vector<float> share(test::size(s.ring));
    float table;
    REQUIRE(state.recent({{rows.data(), {s.ring}}, {times.data(), {s.ring}}, {share.data(), {s.ring}}}, &table).ok());
    log_.insert(log_.end(), rows.begin(), rows.end());
    log_.insert(log_.end(), times.begin(), times.end());
    CHECK(held_[0].memory->intact());
    CHECK(held_[1].memory->intact());
  }

  void check(const std::string& k, const UserState& state, const Codebook& book) {
    const Sums sums(state, book, false), packed(state, book, true);
    std::vector<int32_t> codes;
    const Histories& h = sums.h;
    for (int64_t i = 0; i < h.codes.shape[0]; ++i)
      for (int64_t l = 0; l < book.levels(); ++l)
        codes.push_back(h.codes.data[(h.x_ids ? h.x_ids[i] : i) * book.levels() + l]);
    CHECK(std::equal(codes.begin(), codes.end(), packed.h.codes.data));
    c_.check_floats("v " + k, sums.rows(h.v, h.v_ids));
    CHECK(sums.rows(h.v, h.v_ids) == packed.rows(packed.h.v, {}));
    c_.check_floats("bias " + k, sums.floats(h.bias));
    if (!state.params().mean_x) return;
    c_.check_floats("x " + k, sums.rows(h.x, h.x_ids));
    c_.check_floats("spread " + k, sums.floats(h.spread));
  }

  const Case& c_;
  Codebook books_[2];
  StateItems items_[2];
  Held held_[2];
  int of_[2] = {0, 0};
  std::vector<int64_t> log_;
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

}  // namespace

TEST_CASE("recorded runs") {
  const auto cases = vectors::cases("state");
  CHECK(cases.size() == 4);
  for (const Case& c : cases) {
    CAPTURE(c.name());
    Run(c).play();
  }
}

TEST_CASE("tokens and matches are those of the verbs over the sums, whatever the room and the type") {
  for (const bool mean_x : {true, false}) {
    Served served({150, 7, 5, 400, mean_x});
    served.fill(900);
    const UserState& state = served.held.state;
    CHECK(state.leaves() > 40);
    const Sums sums(state, served.book, false), packed(state, served.book, true);
    Made expected(served.book, 20, 5), got(served.book, 20, 5);
    change(compress_workspace({}, served.book, expected.params, sums.h, expected.out),
           [&](const Context& c) { return compress(c, served.book, expected.params, sums.h, expected.out); });
    change(state.compress_workspace({}, served.book, got.params, got.out),
           [&](const Context& c) { return state.compress(c, served.book, got.params, got.out); });
    CHECK(got.tokens == expected.tokens);
    CHECK(got.codes == expected.codes);
    CHECK(got.votes == expected.votes);
    std::vector<float> v(300 * 2 * 5), lse(600), same_v(v), same_lse(lse);
    const Array<const int32_t, 2> asked{served.codes.data(), {300, 2}};
    const int64_t bounds[] = {0, 300};
    MatchInputs in;
    in.sums = packed.h;
    in.codes = asked;
    in.candidates = offsets(bounds, 1);
    change(match_workspace({}, served.book, in), [&](const Context& c) {
      return match(c, served.book, in, {hisac::rows(v.data(), 600, 5), {lse.data(), {300, 2}}});
    });
    change(state.match_workspace({}, served.book, asked, {}), [&](const Context& c) {
      return state.match(c, served.book, asked, {}, {hisac::rows(same_v.data(), 600, 5), {same_lse.data(), {300, 2}}});
    });
    CHECK(v == same_v);
    CHECK(lse == same_lse);
    for (const DType type : {DType::float32, DType::bfloat16, DType::int8}) {
      Held served_form = copy(state, type, state.leaves());
      Made near(served.book, 20, 5);
      change(served_form.state.compress_workspace({}, served.book, near.params, near.out),
             [&](const Context& c) { return served_form.state.compress(c, served.book, near.params, near.out); });
      CHECK(near.codes == expected.codes);
      CHECK(near.votes == expected.votes);
      if (type == DType::float32) CHECK(served_form.state.type() == DType::float32);
      double off = 0;
      for (size_t i = 0; i < near.tokens.size(); ++i)
        off = std::fmax(off, std::fabs(double(near.tokens[i]) - double(expected.tokens[i])));
      CHECK(off < (type == DType::float32 ? 1e-5 : 0.05));
    }
  }
}

TEST_CASE("sizes are those of the formula") {
  test::Random random(5);
  const Codebook book = test::codebook(random, {16, 16}, 64);
  StateParams params{160, 0, 64};
  CHECK(UserState::bytes(book, params) == 256 + 160 * (28 + 4 * 128));
  Held held;
  held.make(book, params);
  CHECK(held.state.serialised_bytes(DType::int8, 160) == 256 + 160 * (28 + 128));
  CHECK(held.state.serialised_bytes(DType::bfloat16, 160) == 256 + 160 * (24 + 2 * 128));
  params.mean_x = false;
  held.make(book, params);
  CHECK(UserState::bytes(book, params) == 256 + 160 * (24 + 4 * 64));
  CHECK(held.state.serialised_bytes(DType::int8, 160) == (256 + 160 * (22 + 64) + 63) / 64 * 64);
  params.ring = 32;
  CHECK(UserState::bytes(book, params) == 256 + 160 * (24 + 4 * 64) + 32 * 16);
}

TEST_CASE("a changed byte is no state, nor is a part of one") {
  Served served({40, 3, 2});
  served.fill(100);
  served.held.state.seal();
  const UserState& state = served.held.state;
  const int64_t size = state.size();
  for (const DType type : {DType::float32, DType::int8}) {
    Held whole = copy(state, type, state.leaves());
    const int64_t bytes = whole.state.size();
    for (int64_t at = 0; at < bytes; at += at < 256 ? 1 : 37) {
      whole.memory->data()[at] ^= std::byte{1};
      UserState none;
      CHECK(UserState::parse({whole.memory->data(), {bytes}}, &none).code() == Code::corrupt_file);
      CHECK(!none);
      whole.memory->data()[at] ^= std::byte{1};
    }
    UserState none;
    CHECK(UserState::parse({whole.memory->data(), {bytes - 64}}, &none).code() == Code::corrupt_file);
    CHECK(UserState::parse({whole.memory->data(), {255}}, &none).code() == Code::corrupt_file);
    CHECK(UserState::parse({whole.memory->data(), {bytes}}, &none).ok());
  }
  UserState again;
  CHECK(UserState::parse({state.data(), {size}}, &again).ok());
  CHECK(again.revision() == state.revision());
}

TEST_CASE("errors say what was expected, and change nothing") {
  Served served({8, 2, 3, 0, true, 7});
  served.fill(30);
  UserState& state = served.held.state;
  state.seal();
  const std::vector<std::byte> before(state.data(), state.data() + state.size());
  Workspace workspace(state.workspace());
  Context context{workspace.array(), nullptr};
  const StateEvents some = served.events(0, 4);
  StateItems items = served.tables;
  const auto append = [&] { return state.append(context, served.book, items, some); };
  items.model_tag = 8;
  invalid(append(), "append: model_tag expected 7, got 8");
  items = served.tables;
  items.x = {};
  invalid(append(), "append: x expected, since the state has mean x, got none");
  items = served.tables;
  items.v.width = 2;
  items.v.rows = 300;
  invalid(append(), "append: v expected [items, 3], got [300, 2]");
  items = served.tables;
  invalid(state.append(context, served.book, items, {}), "append: ids expected for a state with a ring, got none");
  StateEvents odd = some;
  odd.times.shape[0] = 3;
  invalid(state.append(context, served.book, items, odd), "append: times expected [4], got [3]");
  const Codebook other = test::codebook(served.random, {2, 2}, 6);
  char expected[96];
  std::snprintf(expected, sizeof expected, "append: codebook expected %016llx, got %016llx",
                static_cast<unsigned long long>(served.book.fingerprint()),
                static_cast<unsigned long long>(other.fingerprint()));
  invalid(state.append(context, other, items, some), expected);
  Context on_cuda = context;
  on_cuda.device = Device::cuda;
  is(state.append(on_cuda, served.book, items, some), Code::not_implemented,
     "append: expected a context on the CPU, got one on CUDA");
  Made made(served.book, 3, 3);
  is(state.compress(on_cuda, served.book, made.params, made.out), Code::not_implemented,
     "compress: expected a context on the CPU, got one on CUDA");
  invalid(state.append({}, served.book, items, some),
          "append: workspace expected at least " + std::to_string(state.workspace()) + " bytes, got 0");
  invalid(state.forget(context, served.book, items, some.ids, {}),
          "forget: kept expected, rows or a function, since the table has their leaves, got none");
  invalid(state.merge(context, served.book, items, state), "merge: another state expected, got the same");
  Held tagged, weighed, slim;
  tagged.make(served.book, {8, 2, 3, 0, true, 6});
  weighed.make(served.book, {8, 2, 3, 0, true, 7, 1});
  invalid(state.merge(context, served.book, items, tagged.state), "merge: model_tag expected 7, got 6");
  std::snprintf(expected, sizeof expected, "merge: options expected %016llx, got %016llx",
                static_cast<unsigned long long>(state.options()),
                static_cast<unsigned long long>(weighed.state.options()));
  invalid(state.merge(context, served.book, items, weighed.state), expected);
  slim.make(served.book, {8, 2, 2, 0, true, 7});
  invalid(state.merge(context, served.book, items, slim.state), "merge: width expected 3, got 2");
  CHECK(std::equal(before.begin(), before.end(), state.data()));

  Served fresh({8, 0, 3});
  fresh.fill(3);
  Held reading = copy(fresh.held.state, DType::int8, 3), tight = copy(fresh.held.state, DType::float32, 3);
  is(reading.state.append(context, fresh.book, fresh.tables, some), Code::not_implemented,
     "append: a state of float32 expected, got int8, which is for reading");
  is(tight.state.append(context, fresh.book, fresh.tables, some), Code::out_of_memory,
     "append: room for 7 leaves expected, got 3; serialise with more room");
  UserState none;
  invalid(UserState::create(served.book, {0, 0, 3}, {}, &none),
          "state: expected leaves of 1 to 2^24, a ring of 0 to 2^24, a width of 1 to 2^20 and a half-life of 0 to "
          "2^40, got 0, 0, 3 and 0");
  CHECK(UserState::bytes(served.book, {1, 0, (1 << 20) + 1}) == 0);
  const StateParams params{8, 2, 3};
  const size_t bytes = UserState::bytes(served.book, params);
  Workspace small(bytes - 1);
  invalid(UserState::create(served.book, params, small.array(), &none),
          "state: memory expected of at least " + std::to_string(bytes) + " bytes, got " + std::to_string(bytes - 1));
  CHECK(small.untouched());
  invalid(state.serialise(DType::float32, 9, small.array()),
          "serialise: room expected " + std::to_string(state.leaves()) + " to 8, got 9");
  const Codebook wide = test::codebook(served.random, {2, 2}, 5);
  invalid(state.migrate(context, served.book, wide, small.array(), &none, nullptr),
          "migrate: codebook expected of D = 6, got 5");
}

TEST_CASE("what is delivered again changes nothing") {
  Served served({60, 4, 3, 500});
  std::vector<int64_t> positions(200);
  for (size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<int64_t>(i) * 3;
  const auto append = [&](int64_t first, int64_t n) {
    StateEvents events = served.events(first, n);
    events.positions = {positions.data() + first, {n}};
    change(served.held.state.workspace(),
           [&](const Context& c) { return served.held.state.append(c, served.book, served.tables, events); });
  };
  append(0, 100);
  served.held.state.seal();
  const std::vector<std::byte> before(served.held.state.data(), served.held.state.data() + served.held.state.size());
  append(0, 100);
  append(40, 60);
  CHECK(std::equal(before.begin(), before.end(), served.held.state.data()));
  CHECK(served.held.state.position() == 297);
  append(90, 20);
  CHECK(served.held.state.position() == 327);
}

TEST_CASE("no call allocates, or enters the system") {
  Served served({100, 5, 4, 300});
  served.fill(200);
  UserState& state = served.held.state;
  Made made(served.book, 10, 4);
  const Array<const int32_t, 2> asked{served.codes.data(), {50, 2}};
  std::vector<float> v(100 * 4), lse(100), share(5);
  std::vector<int64_t> rows(5), times(5);
  const size_t bytes =
      std::max({state.workspace(), state.compress_workspace({}, served.book, made.params, made.out),
                state.match_workspace({}, served.book, asked, {}), state.migrate_workspace({}, served.book)});
  Workspace workspace(bytes);
  const Context context{workspace.array(), nullptr};
  Guarded<std::byte> stored(static_cast<int64_t>(state.serialised_bytes(DType::float32, 100)));
  Held other, moved;
  other.make(served.book, {100, 5, 4, 300});
  const auto memory = moved.lend(UserState::bytes(served.book, state.params()));
  int64_t at = 200;
  const auto all = [&] {
    UserState back;
    StateStats stats;
    float table;
    const StateEvents kept = served.events(0, at);
    const auto mutable_stored = Array<std::byte, 1>{stored.data(), {stored.count()}};
    bool ok =
        served.append(context, at, 10).ok() && state.serialise(DType::float32, 100, mutable_stored).ok() &&
        UserState::parse(mutable_stored, &back).ok() &&
        back.append(context, served.book, served.tables, served.events(at + 10, 10)).ok() &&
        state.compress(context, served.book, made.params, made.out).ok() &&
        state.match(context, served.book, asked, {}, {hisac::rows(v.data(), 100, 4), {lse.data(), {50, 2}}}).ok() &&
        state.recent({{rows.data(), {5}}, {times.data(), {5}}, {share.data(), {5}}}, &table).ok() &&
        state.stats(served.book, &made.out.agents, nullptr, &stats).ok() &&
        other.state.append(context, served.book, served.tables, served.events(at, 30)).ok() &&
        state.merge(context, served.book, served.tables, other.state).ok() &&
        state.forget(context, served.book, served.tables, served.events(at, 2).ids, {&kept}).ok() &&
        state.expire(context, served.book, served.tables, served.times[0], 10, 1).ok() &&
        state.migrate(context, served.book, served.book, memory, &moved.state, nullptr).ok();
    state.seal();
    at += 20;
    return ok;
  };
  REQUIRE(all());  // the first call chooses the instruction set
  const counting::Scope scope;
  CHECK(all());
  CHECK(scope.count() == 0);
#ifndef HISAC_TEST_HOOKED
  const pid_t child = fork();
  if (child == 0) {  // from here on the kernel kills whoever asks for more than to exit
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT) != 0) _exit(77);
    const bool ok = all();
    syscall(SYS_exit, ok ? 0 : 1);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  REQUIRE(WIFEXITED(status));
  if (WEXITSTATUS(status) == 77)
    MESSAGE("system calls are not watched here");
  else
    CHECK(WEXITSTATUS(status) == 0);
#endif
}

TEST_CASE("threads hand a state on, and read it at once") {
  Served alone({60, 4, 3, 500}), shared({60, 4, 3, 500});
  constexpr int64_t kTurns = 40;
  for (int64_t turn = 0; turn < kTurns; ++turn)
    change(alone.held.state.workspace(), [&](const Context& c) { return alone.append(c, 10 * turn, 10); });
  std::mutex turns;
  int64_t next = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&] {
      Workspace workspace(shared.held.state.workspace());
      for (;;) {
        const std::lock_guard<std::mutex> lock(turns);
        if (next == kTurns) return;
        if (!shared.append({workspace.array(), nullptr}, 10 * next++, 10).ok()) std::abort();
      }
    });
  for (std::thread& t : threads) t.join();
  alone.held.state.seal();
  shared.held.state.seal();
  const UserState &a = alone.held.state, &b = shared.held.state;
  CHECK(std::equal(a.data(), a.data() + a.size(), b.data()));
  std::vector<Made> made;
  for (int t = 0; t < 3; ++t) made.emplace_back(shared.book, 10, 3);
  threads.clear();
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      Made mine(shared.book, 10, 3);
      Workspace workspace(b.compress_workspace({}, shared.book, mine.params, mine.out));
      if (!b.compress({workspace.array(), nullptr}, shared.book, mine.params, mine.out).ok()) std::abort();
      made[test::size(t)].tokens = mine.tokens;
    });
  for (std::thread& t : threads) t.join();
  CHECK(made[0].tokens == made[1].tokens);
  CHECK(made[0].tokens == made[2].tokens);
}
