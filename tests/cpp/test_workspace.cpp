// SPDX-License-Identifier: Apache-2.0
// A workspace that is too small or misaligned is a named error, found before any output is written.
#include <doctest/doctest.h>

#include <functional>
#include <limits>
#include <string>

#include "pipeline.h"

using namespace hisac;
using test::Guarded;
using test::Workspace;

namespace {

/// A verb over small inputs, its outputs filled with a mark.
struct Verb {
  const char* name;
  std::function<size_t(int workers)> bytes;
  std::function<Status(const Context&)> call;
  std::function<bool()> untouched;  // the outputs
};

/// All verbs, on a problem of two users; outputs live as long as this does.
class Verbs {
 public:
  std::vector<Verb> all() {
    return {
        {"encode", [this](int w) { return encode_workspace(test::sizing(w), book_); },
         [this](const Context& c) { return encode(c, book_, x_, {codes_.data(), {kRows, 2}}); },
         [this] { return codes_.holds(0x5a); }},
        {"fit", [this](int w) { return fit_workspace(test::sizing(w), fit_, kRows, kWidth); },
         [this](const Context& c) {
           const Array<float, 2> centers[] = {{centers_.data(), {4, kWidth}}};
           FitReport report;
           return fit(c, fit_, x_, centers, &report);
         },
         [this] { return centers_.holds(0x5a); }},
        {"vote", [this](int w) { return vote_workspace(test::sizing(w), book_, vote_, in_); },
         [this](const Context& c) {
           return vote(c, book_, vote_, in_,
                       {{agents_.data(), {2, kSeats, 2}}, {votes_.data(), {2, kSeats}}, {count_.data(), {2}}});
         },
         [this] { return agents_.holds(0x5a) && votes_.holds(0x5a) && count_.holds(0x5a); }},
        {"route", [this](int w) { return route_workspace(test::sizing(w), nullptr, route_, in_, to_, returned()); },
         [this](const Context& c) { return route(c, nullptr, route_, in_, to_, returned()); },
         [this] { return tokens_.holds(0x5a) && lse_.holds(0x5a) && mean_x_.holds(0x5a); }},
        {"route_backward",
         [this](int w) {
           return route_backward_workspace(test::sizing(w), nullptr, route_, in_, to_, forward(), gradients());
         },
         [this](const Context& c) { return route_backward(c, nullptr, route_, in_, to_, forward(), gradients()); },
         [this] {
           return d_v_.holds(0x5a) && d_tau_.holds(0x5a) && d_x_.holds(0x5a) && d_p_.holds(0x5a) &&
                  d_bias_.holds(0x5a) && d_spread_.holds(0x5a);
         }},
        {"missing", [this](int w) { return missing_workspace(test::sizing(w), &book_, in_); },
         [this](const Context& c) { return missing(c, &book_, in_, {absent_.data(), {kRows}}); },
         [this] { return absent_.holds(0x5a); }},
        {"leaf_sums", [this](int w) { return leaf_sums_workspace(test::sizing(w), book_, in_); },
         [this](const Context& c) { return leaf_sums(c, book_, in_, sums(sum_offsets_.data() + 1)); },
         [this] { return sums_untouched() && sum_offsets_.holds(0x5a); }},
        {"leaf_sums", [this](int w) { return leaf_sums_workspace(test::sizing(w), book_, in_); },
         [this](const Context& c) { return leaf_sums(c, book_, in_, sums(sum_ends_.data())); },
         [this] { return sums_untouched() && sum_offsets_.holds(0x5a) && sum_ends_.holds(0x5a); }},
        {"leaf_sums_backward",
         [this](int w) { return leaf_sums_backward_workspace(test::sizing(w), book_, in_, leaf_gradients()); },
         [this](const Context& c) { return leaf_sums_backward(c, book_, in_, leaf_forward(), leaf_gradients()); },
         [this] { return d_leaf_v_.holds(0x5a) && d_leaf_bias_.holds(0x5a); }},
        {"match", [this](int w) { return match_workspace(test::sizing(w), book_, matching_); },
         [this](const Context& c) {
           return match(c, book_, matching_,
                        {{node_v_.data(), DType::float32, 2 * kRows, kWidth}, {node_lse_.data(), {kRows, 2}}});
         },
         [this] { return node_v_.holds(0x5a) && node_lse_.holds(0x5a); }},
        {"match_backward", [this](int w) { return match_backward_workspace(test::sizing(w), book_, matching_); },
         [this](const Context& c) {
           return match_backward(c, book_, matching_, {}, {{d_leaf_v_.data(), {kRows, kWidth}}, {}});
         },
         [this] { return d_leaf_v_.holds(0x5a); }},
        {"attend", [this](int w) { return attend_workspace(test::sizing(w), attention_); },
         [this](const Context& c) {
           return attend(c, attention_, {{out_.data(), DType::float32, kRows, kWidth}, {out_lse_.data(), {kRows, 1}}});
         },
         [this] { return out_.holds(0x5a) && out_lse_.holds(0x5a); }},
        {"attend_backward", [this](int w) { return attend_backward_workspace(test::sizing(w), attention_); },
         [this](const Context& c) {
           return attend_backward(c, attention_, {x_, {}, x_, {bias_.data(), {kRows, 1}}},
                                  {{d_q_.data(), {kRows, 1, kWidth}},
                                   {d_k_.data(), {2, kSeats, 1, kWidth}},
                                   {d_value_.data(), {2, kSeats, 1, kWidth}},
                                   {}});
         },
         [this] { return d_q_.holds(0x5a) && d_k_.holds(0x5a) && d_value_.holds(0x5a); }},
    };
  }

  bool intact() {
    bool ok = codes_.intact() && agents_.intact() && votes_.intact() && count_.intact();
    ok = ok && sum_offsets_.intact() && sum_ends_.intact() && sum_codes_.intact() && sum_votes_.intact();
    for (Guarded<float>* a :
         {&centers_,     &tokens_,   &lse_,     &mean_x_, &d_v_,   &d_tau_,    &d_x_,        &d_p_,
          &d_bias_,      &d_spread_, &absent_,  &sum_x_,  &sum_v_, &sum_bias_, &sum_spread_, &d_leaf_v_,
          &d_leaf_bias_, &out_,      &out_lse_, &d_q_,    &d_k_,   &d_value_,  &node_v_,     &node_lse_})
      ok = a->intact() && ok;
    return ok;
  }

 private:
  Tokens returned() {
    return {{tokens_.data(), DType::float32, 2 * kSeats, kWidth},
            {lse_.data(), {2, kSeats}},
            {mean_x_.data(), {2, kSeats, kWidth}}};
  }
  RouteForward forward() {
    const Rows some = test::rows(prototypes_, kWidth);
    return {some, {given_lse_.data(), {2, kSeats}}, {}, some, {}, {}};
  }
  RouteGradients gradients() {
    return {{d_x_.data(), {kRows, kWidth}}, {d_v_.data(), {kRows, kWidth}},     {d_bias_.data(), {kRows}},
            {d_spread_.data(), {kRows}},    {d_p_.data(), {2, kSeats, kWidth}}, {d_tau_.data(), {1}}};
  }
  LeafSums sums(int64_t* ends) {
    return {{sum_x_.data(), {kRows, kWidth}}, {sum_v_.data(), {kRows, kWidth}}, {sum_offsets_.data(), ends, 2},
            {sum_codes_.data(), {kRows, 2}},  {sum_bias_.data(), {kRows}},      {sum_spread_.data(), {kRows}},
            {sum_votes_.data(), {kRows}}};
  }
  bool sums_untouched() {
    return sum_x_.holds(0x5a) && sum_v_.holds(0x5a) && sum_bias_.holds(0x5a) && sum_spread_.holds(0x5a) &&
           sum_codes_.holds(0x5a) && sum_votes_.holds(0x5a);
  }
  LeafSumsForward leaf_forward() {  // as if each behaviour were its sum
    Histories given = in_;
    given.spread = {bias_.data(), {kRows}};
    return {given, {values_.data(), {kRows, kWidth}}, {values_.data(), {kRows, kWidth}}, {}, {}};
  }
  LeafSumsGradients leaf_gradients() { return {{d_leaf_v_.data(), {kRows, kWidth}}, {d_leaf_bias_.data(), {kRows}}}; }

  static constexpr int64_t kRows = 5000, kLongest = 4990, kWidth = 5, kSeats = 7;  // long enough to be cut for workers
  test::Random random_{11};
  Codebook book_ = test::codebook(random_, {6, 5}, kWidth);
  std::vector<float> values_ = test::uniform(random_, kRows* kWidth), bias_ = test::uniform(random_, kRows),
                     prototypes_ = test::uniform(random_, 2 * kSeats * kWidth),
                     given_lse_ = test::uniform(random_, 2 * kSeats), tau_{1};
  std::vector<int64_t> offsets_{0, kLongest, kRows};
  std::vector<int32_t> given_codes_ = std::vector<int32_t>(2 * kRows, 3);
  Rows x_ = test::rows(values_, kWidth);
  Histories in_ = [this] {
    Histories h;
    h.x = h.v = x_;
    h.offsets = test::spans(offsets_);
    h.codes = {given_codes_.data(), {kRows, 2}};
    h.bias = {bias_.data(), {kRows}};
    return h;
  }();
  RouteAgents to_{{prototypes_.data(), {2, kSeats, kWidth}}, {}};
  MatchInputs matching_{in_, in_.codes, {}, in_.offsets};
  FitParams fit_ = [] {
    FitParams p;
    p.levels = 1;
    p.sizes[0] = 4;
    return p;
  }();
  VoteParams vote_ = [] {
    VoteParams p;
    p.budget = kSeats;
    return p;
  }();
  RouteParams route_{Normalize::agents, {tau_.data(), {1}}};
  AttendInputs attention_{
      x_, test::rows(prototypes_, kWidth), test::rows(prototypes_, kWidth), kSeats, 1, in_.offsets, {}, 1};
  Guarded<int32_t> codes_{kRows * 2}, agents_{2 * kSeats * 2}, count_{2}, sum_codes_{kRows * 2};
  Guarded<int64_t> votes_{2 * kSeats}, sum_offsets_{3}, sum_ends_{2}, sum_votes_{kRows};
  Guarded<float> centers_{4 * kWidth}, tokens_{2 * kSeats * kWidth}, lse_{2 * kSeats}, mean_x_{2 * kSeats * kWidth},
      d_v_{kRows * kWidth}, d_tau_{1}, d_x_{kRows * kWidth}, d_p_{2 * kSeats * kWidth}, d_bias_{kRows},
      d_spread_{kRows}, absent_{kRows}, sum_x_{kRows * kWidth}, sum_v_{kRows * kWidth}, sum_bias_{kRows},
      sum_spread_{kRows}, d_leaf_v_{kRows * kWidth}, d_leaf_bias_{kRows}, out_{kRows * kWidth}, out_lse_{kRows},
      d_q_{kRows * kWidth}, d_k_{2 * kSeats * kWidth}, d_value_{2 * kSeats * kWidth}, node_v_{2 * kRows * kWidth},
      node_lse_{2 * kRows};
};

}  // namespace

TEST_CASE("too small: an error that names the bytes, outputs untouched, nothing past the end") {
  for (int workers : {1, 3}) {
    test::Threads threads{workers};
    const Executor executor = threads.executor();
    Verbs verbs;
    for (const Verb& verb : verbs.all()) {
      CAPTURE(std::string(verb.name));
      const size_t need = verb.bytes(workers);
      for (size_t have : {size_t{0}, std::min(size_t{64}, need - 1), need / 2, need - 64, need - 1}) {
        Workspace workspace(have);
        const Status status = verb.call({workspace.array(), &executor});
        CHECK(status.code() == Code::invalid_argument);
        CHECK(std::string(status.what()) == std::string(verb.name) + ": workspace expected at least " +
                                                std::to_string(need) + " bytes, got " + std::to_string(have));
        CHECK(workspace.intact());
      }
      const Status none = verb.call({{}, &executor});
      CHECK(std::string(none.what()) ==
            std::string(verb.name) + ": workspace expected at least " + std::to_string(need) + " bytes, got 0");
      CHECK(verb.untouched());
    }
    CHECK(verbs.intact());
  }
}

TEST_CASE("exactly the bytes named are enough, and more workers need no less") {
  for (int workers : {1, 2, 3, 8}) {
    test::Threads threads{workers};
    const Executor executor = threads.executor();
    Verbs verbs;
    for (const Verb& verb : verbs.all()) {
      CAPTURE(std::string(verb.name));
      CHECK(verb.bytes(workers) >= verb.bytes(1));
      Workspace workspace(verb.bytes(workers));
      const Status status = verb.call({workspace.array(), &executor});
      CHECK(std::string(status.what()) == "");
      CHECK(workspace.intact());
      CHECK_FALSE(verb.untouched());
    }
    CHECK(verbs.intact());
  }
}

TEST_CASE("fit: scratch is what fit.h says") {
  for (int processes : {1, 2})
    for (int workers : {1, 2, 8})
      for (int64_t rows : {100, 300'000})
        for (int64_t width : {16, 100}) {
          FitParams params;
          params.levels = 3;
          params.processes = processes;
          for (int64_t* size : {&params.sizes[0], &params.sizes[1], &params.sizes[2]}) *size = 2048;
          const int64_t c = 2048, w = workers;
          int64_t said = rows * (68 + 12) + c * (24 * width + 150) + w * (72 * c + 2100 * width + 70'000);
          said += 12 * std::min(rows, 131'072 * w) + (processes > 1 ? c * (8 * width + 8) : 0);
          CHECK(fit_workspace(test::sizing(workers), params, rows, width) <= static_cast<size_t>(said + 16384));
        }
}

TEST_CASE("fit: scratch does not grow with workers times codes times width") {
  FitParams params;
  params.levels = 1;
  params.sizes[0] = 4096;
  constexpr size_t kSums = size_t{4096} * 256 * sizeof(int64_t);
  CHECK(fit_workspace(test::sizing(1), params, 6000, 256) > kSums);
  CHECK(fit_workspace(test::sizing(64), params, 6000, 256) <
        fit_workspace(test::sizing(1), params, 6000, 256) + 8 * kSums);
}

TEST_CASE("a workspace for more users, rows, workers or a longer history serves fewer and shorter") {
  const float tau = 1;
  test::Random random{2};
  const Codebook book = test::codebook(random, {300, 7}, 4);
  VoteParams by_budget, by_fanout, by_beam;
  by_budget.budget = 30;
  by_fanout.fanout[0] = 5;
  by_fanout.fanout[1] = 6;
  by_beam.beam[0] = 200;
  by_beam.beam[1] = 30;
  const auto sizes = [&](int64_t users, int64_t longest, int workers) {
    const Context context = test::sizing(workers);
    std::vector<size_t> all;
    float to;
    const float* const of = &tau;
    RouteParams params;
    params.temperature = {&tau, {1}};
    Histories in;
    in.x = {&tau, DType::float32, users * longest, 4};
    in.offsets = {nullptr, nullptr, DType::int64, users};  // not there yet
    in.longest = longest;
    in.codes = {reinterpret_cast<const int32_t*>(&tau), {users * longest, 2}};
    const RouteAgents agents{{&tau, {users, 9, 4}}, {}};
    for (const bool has_v : {true, false})
      for (const bool has_mean_x : {true, false})
        for (const Precision precision : {Precision::float32, Precision::bfloat16}) {
          params.precision = precision;
          in.v = has_v ? in.x : Rows{};
          const Tokens out{{has_v ? &to : nullptr}, {&to, {users, 9}}, {has_mean_x ? &to : nullptr, {users, 9, 4}}};
          all.push_back(route_workspace(context, &book, params, in, agents, out));
          RouteForward forward{{}, {of, {users, 9}}, {of, {users, 9, 4}}, {has_v ? of : nullptr}, {}, {}};
          if (has_mean_x) forward.d_mean_x = forward.mean_x;
          for (const bool wanted : {false, true}) {
            RouteGradients gradients;
            if (wanted) gradients = {{&to}, {&to}, {&to}, {&to}, {&to}, {&to}};
            all.push_back(route_backward_workspace(context, &book, params, in, agents, forward, gradients));
          }
        }
    in.v = in.x;
    all.push_back(leaf_sums_workspace(context, book, in));
    all.push_back(leaf_sums_backward_workspace(context, book, in, {}));
    all.push_back(missing_workspace(context, &book, in));
    for (const VoteParams& rule : {by_budget, by_fanout, by_beam})
      all.push_back(vote_workspace(context, book, rule, in));
    return all;
  };
  for (int i = 0; i < 4000; ++i) {
    const int64_t users = random.below(9), longest = random.below(1 + (int64_t{1} << random.below(18)));
    const int workers = 1 + static_cast<int>(random.below(4));
    const std::vector<size_t> small = sizes(users, longest, workers);
    const std::vector<size_t> large =
        sizes(users + random.below(3), longest + random.below(9000), workers + static_cast<int>(random.below(3)));
    CAPTURE(users);
    CAPTURE(longest);
    for (size_t verb = 0; verb < small.size(); ++verb) {
      CAPTURE(verb);
      CHECK(small[verb] <= large[verb]);
    }
  }
}

TEST_CASE("a batch that is not there yet: as for T rows a user, or for what is stated; offsets are counted") {
  const float x[6] = {};
  const int64_t bounds[] = {0, 2, 5};
  test::Random random{3};
  const Codebook book = test::codebook(random, {3, 2}, 1);
  VoteParams params;
  params.budget = 2;
  const auto bytes = [&](const Histories& in) { return vote_workspace({}, book, params, in); };
  Histories in;
  in.x = rows(x, 6, 1);
  in.codes.shape[0] = 6;
  in.codes.shape[1] = 2;
  in.offsets = {nullptr, nullptr, DType::int64, 2};
  const size_t of_six = bytes(in);
  in.longest = 3;
  const size_t of_three = bytes(in);
  in.longest = 0;
  in.offsets = offsets(bounds, 2);
  CHECK(bytes(in) == of_three);
  in.longest = 6;
  CHECK(bytes(in) == of_six);
  CHECK(of_three < of_six);
}

TEST_CASE("sizes that no call may have: no workspace suffices, said at once, and the call is refused") {
  constexpr int64_t kHuge = int64_t{1} << 60, kWide = (int64_t{1} << 57) + 1024;
  constexpr size_t kLimit = std::numeric_limits<size_t>::max() / 2;
  const Context none;
  const float tau = 1;
  const int64_t nobody[] = {0, 0};
  test::Random random{1};
  const Codebook book = test::codebook(random, {3, 2}, 4);
  for (int which = 0; which < 6; ++which) {
    CAPTURE(which);
    RouteParams params;
    params.temperature = {&tau, {1}};
    Histories in;
    in.x = {&tau, DType::float32, 0, 4};
    in.v = {&tau, DType::float32, 0, 4};
    in.offsets = {nobody, nobody + 1, DType::int64, 1};
    in.codes = {reinterpret_cast<const int32_t*>(&tau), {0, 2}};
    RouteAgents agents{{&tau, {1, 0, 4}}, {}};
    if (which == 0) in.x.width = agents.prototypes.shape[2] = kWide;
    if (which == 1) in.v.width = kWide - 1008;
    if (which == 2) agents.prototypes.shape[1] = kHuge;
    if (which == 3) in.longest = kHuge;
    if (which == 4) in.offsets.users = agents.prototypes.shape[0] = kHuge;
    if (which == 5) in.x.rows = in.v.rows = in.codes.shape[0] = kHuge;
    CHECK(route_workspace(none, &book, params, in, agents, {}) == kLimit);
    CHECK(route_backward_workspace(none, &book, params, in, agents, {}, {}) == kLimit);
    if (which != 2) CHECK(leaf_sums_workspace(none, book, in) == kLimit);
    if (which != 2) CHECK(leaf_sums_backward_workspace(none, book, in, {}) == kLimit);
    if (which != 2) CHECK(missing_workspace(none, &book, in) == kLimit);
    CompressParams compressing;
    compressing.vote.budget = 4096;
    for (const Method method : {Method::exact, Method::leaf}) {
      compressing.method = method;
      if (which != 2) CHECK(compress_workspace(none, book, compressing, in, {}) == kLimit);
    }
    if (which == 0 || which == 1) {
      const auto refused = [&](const char* verb, const Status& status) {
        CHECK(std::string(status.what()).find(verb + std::string(": expected D and V of 1 to 2^20, got ")) == 0);
      };
      refused("route", route(none, &book, params, in, agents, {{nullptr, DType::float32, 0, in.v.width}, {}}));
      refused("route_backward", route_backward(none, &book, params, in, agents, {}, {}));
      refused("leaf_sums", leaf_sums(none, book, in, {}));
      refused("leaf_sums_backward", leaf_sums_backward(none, book, in, {}, {}));
      refused("missing", missing(none, &book, in, {}));
    }
  }
  for (int64_t AttendInputs::* size : {&AttendInputs::agents, &AttendInputs::heads}) {
    AttendInputs in;
    in.q = in.keys = in.values = {&tau, DType::float32, 0, 4};
    in.heads = 1;
    in.*size = kHuge;
    CHECK(attend_workspace(none, in) == kLimit);
    CHECK(attend_backward_workspace(none, in) == kLimit);
    CHECK(attend(none, in, {}).code() == Code::invalid_argument);
  }
  MatchInputs huge_match;
  for (int64_t* size :
       {&huge_match.sums.v.width, &huge_match.sums.longest, &huge_match.codes.shape[0], &huge_match.candidates.users}) {
    *size = kHuge;
    CHECK(match_workspace(none, book, huge_match) == kLimit);
    CHECK(match_backward_workspace(none, book, huge_match) == kLimit);
    *size = 1;
  }
  VoteParams votes;
  votes.budget = 3;
  Histories endless;
  endless.codes = {nullptr, {kHuge, 2}};
  CHECK(vote_workspace(none, book, votes, endless) == kLimit);
  FitParams fitting;
  fitting.levels = 1;
  fitting.sizes[0] = 4;
  CHECK(fit_workspace(none, fitting, kHuge, 4) == kLimit);
}

TEST_CASE("misaligned: an error that says so, nothing touched") {
  Verbs verbs;
  for (const Verb& verb : verbs.all()) {
    CAPTURE(std::string(verb.name));
    for (int64_t shift : {4, 8, 32}) {
      Workspace workspace(verb.bytes(1) + 64);
      Array<std::byte, 1> inner = workspace.array();
      inner.data += shift;
      inner.shape[0] -= shift;
      const Status status = verb.call({inner, nullptr});
      char expected[128];
      std::snprintf(expected, sizeof expected, "%s: workspace expected aligned to 64 bytes, got address %p", verb.name,
                    static_cast<void*>(inner.data));
      CHECK(status.code() == Code::invalid_argument);
      CHECK(std::string(status.what()) == expected);
      CHECK(workspace.untouched());
      CHECK(verb.untouched());
    }
  }
}
