// SPDX-License-Identifier: Apache-2.0
// A user's state: runs recorded from its definition, replayed; what is derived from it; its bytes, and what is no
// state.
#include "states.h"
#include "vectors.h"

using namespace hisac;
using namespace states;
using vectors::Case;

namespace {

enum Operation : int64_t { kAppend, kExpire, kForget, kMerge, kReturn, kMigrate };

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
          if (state.migrated()) source = {&kept, nullptr, nullptr, true};
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

}  // namespace

TEST_CASE("recorded runs") {
  const auto cases = vectors::cases("state");
  CHECK(cases.size() == 5);
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
        off = std::max(off, std::fabs(double(near.tokens[i]) - double(expected.tokens[i])));
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

TEST_CASE("odd heads with a right checksum") {  // a fuzzer found them
  Served served({20, 0, 3, 0, false});
  served.fill(40);
  UserState& state = served.held.state;
  int64_t* const head = reinterpret_cast<int64_t*>(state.data());
  constexpr size_t kWidth = 7, kSeen = 22;
  CHECK(head[kWidth] == 6);
  CHECK(head[kSeen] == 40);
  head[kSeen] = int64_t{1} << 60;  // the most that is counted
  served.fill(10);
  state.seal();
  UserState back;
  CHECK(UserState::parse({state.data(), {state.size()}}, &back).ok());
  head[kSeen] = (int64_t{1} << 60) + 1;
  state.seal();
  CHECK(UserState::parse({state.data(), {state.size()}}, &back).code() == Code::corrupt_file);
  head[kSeen] = 50;
  head[kWidth] = 5;
  state.seal();
  REQUIRE(UserState::parse({state.data(), {state.size()}}, &back).ok());
  Workspace workspace(size_t{1} << 12);
  const Status status = served.append({workspace.array(), nullptr}, 0, 4);
  CHECK(std::string(status.what()) == "append: codebook expected of D = 5, got 6");
}
