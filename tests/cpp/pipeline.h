// SPDX-License-Identifier: Apache-2.0
// The whole path, encode to attend and back, through the public headers, each verb in a workspace of exactly its size.
#pragma once
#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "support.h"

namespace test {

struct Options {
  DType dtype = DType::float32;
  hisac::Normalize normalize = hisac::Normalize::history;
  hisac::Precision precision = hisac::Precision::float32;
  bool mean_x = false;     // route returns it, and goes back from its gradient
  bool tokens = true;      // the same of the tokens
  bool over_sums = false;  // route reads the leaf sums
  bool together = false;   // all users' leaf sums; otherwise each user's lie where its rows do
  bool whole = false;      // weights are int64
  bool fanout = false, beam = false, without_x = false, without_v = false;
  int64_t sparse = 0;
  bool lists = false;  // that are kept with the agents
};

/// Random numbers of a type, within [-1, 1).
inline std::vector<std::byte> values(Random& random, DType dtype, int64_t n) {
  std::vector<std::byte> out(size(n * bytes_of(dtype)));
  for (int64_t i = 0; i < n; ++i) {
    const float x = random.uniform();
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint16_t half = static_cast<uint16_t>(bits >> 16);  // bfloat16: the upper half
    if (dtype == DType::float16) half = static_cast<uint16_t>((0x2c00 + random.below(0x1000)) | random.below(2) << 15);
    if (dtype == DType::float32)
      std::memcpy(out.data() + i * 4, &x, 4);
    else
      std::memcpy(out.data() + i * 2, &half, 2);
  }
  return out;
}

/// Histories of 9,000, 0, 1, 64, 65 and 4,097 rows, some rows absent; the same for the same seed.
struct Problem {
  static constexpr int64_t kWidth = 20, kValues = 12, kHeads = 2, kKey = 5, kSeats = 12;
  Options options;
  std::vector<int64_t> offsets{0, 9000, 9000, 9001, 9065, 9130, 13227};
  std::vector<int64_t> candidates{0, 600, 601, 601, 650, 651, 1300};
  int64_t rows = 13227, users = 6, pairs = 1300;
  hisac::Codebook book;
  std::vector<std::byte> x, v, q, keys, values_, d_tokens, d_out;
  std::vector<int64_t> whole_weights;
  std::vector<float> weights, bias, temperature, token_bias, d_lse, d_mean_x, d_sums, d_out_lse;

  explicit Problem(const Options& o) : options(o) {
    Random random(1);
    const DType t = o.dtype;
    book = codebook(random, {6, 5}, kWidth);
    x = values(random, t, rows * kWidth);
    v = values(random, t, rows * kValues);
    const uint16_t nan16 = 0x7fff;
    const float nan32 = std::numeric_limits<float>::quiet_NaN();
    for (int64_t i = 7; i < rows; i += 97) {  // no embedding: absent
      const void* const from = t == DType::float32 ? static_cast<const void*>(&nan32) : &nan16;
      std::memcpy(x.data() + i * kWidth * bytes_of(t), from, size(bytes_of(t)));
    }
    q = values(random, t, pairs * kHeads * kKey);
    keys = values(random, t, users * kSeats * kHeads * kKey);
    values_ = values(random, t, users * kSeats * kHeads * kValues);
    d_tokens = values(random, o.over_sums ? DType::float32 : t, users * kSeats * kValues);
    d_out = values(random, t, pairs * kHeads * kValues);
    weights = uniform(random, rows, 2);
    bias = uniform(random, rows);
    temperature = {2.f};
    token_bias = uniform(random, users * kSeats);
    d_lse = uniform(random, users * kSeats);
    d_mean_x = uniform(random, users * kSeats * kWidth);
    d_sums = uniform(random, rows * kWidth);
    d_out_lse = uniform(random, pairs * kHeads);
    for (int64_t i = 0; i < rows; ++i) whole_weights.push_back(random.below(int64_t{1} << random.below(40)) - 3);
  }
  hisac::Rows rows_of(const std::vector<std::byte>& data, int64_t width) const {
    return {data.data(), options.dtype, static_cast<int64_t>(data.size()) / width / bytes_of(options.dtype), width};
  }
};

/// Every output of the path, as bytes.
struct Results {
  std::vector<std::pair<std::string, std::vector<std::byte>>> outputs;
  std::vector<std::string> faults;  // a Status, or memory overrun

  template <class T>
  void keep(const char* name, Guarded<T>& memory) {
    if (!memory.intact()) faults.push_back(std::string(name) + ": wrote out of bounds");
    const std::byte* const p = reinterpret_cast<const std::byte*>(memory.data());
    outputs.push_back({name, std::vector<std::byte>(p, p + size(memory.count()) * sizeof(T))});
  }
  template <class Verb>
  void call(const char* name, size_t bytes, const hisac::Executor* executor, Verb verb) {
    Workspace workspace(bytes);
    const hisac::Status status = verb(hisac::Context{workspace.array(), executor});
    if (!status.ok()) faults.push_back(std::string(name) + ": " + status.what());
    if (!workspace.intact()) faults.push_back(std::string(name) + ": wrote past its workspace");
  }
};

inline Results run(const Problem& p, const hisac::Executor* executor) {
  using namespace hisac;
  constexpr int64_t d = Problem::kWidth, w = Problem::kValues, h = Problem::kHeads, m = Problem::kSeats;
  const Options& o = p.options;
  const int workers = workers_of({{}, executor});
  const int64_t levels = p.book.levels(), t = p.rows, users = p.users, n = p.pairs;
  const Rows x = p.rows_of(p.x, d);
  Results r;

  Guarded<int32_t> codes(t * levels);
  r.call("encode", encode_workspace(test::sizing(workers), p.book), executor,
         [&](const Context& c) { return encode(c, p.book, x, {codes.data(), {t, levels}}); });
  r.keep("codes", codes);

  Histories in;
  in.x = x;
  in.v = p.rows_of(p.v, w);
  in.offsets = test::spans(p.offsets);
  in.codes = {codes.data(), {t, levels}};
  in.bias = {p.bias.data(), {t}};
  in.weights = {p.weights.data(), DType::float32, t};
  if (o.whole) in.weights = {p.whole_weights.data(), DType::int64, t};

  VoteParams voting;
  if (o.fanout) voting = {0, {4, 3}};
  if (o.beam) voting = {0, {}, {5, m}};
  if (!o.fanout && !o.beam) voting.budget = m;
  Guarded<int32_t> agent_codes(users * m * levels), count(users);
  Guarded<int64_t> votes(users * m);
  r.call("vote", vote_workspace(test::sizing(workers), p.book, voting, in), executor, [&](const Context& c) {
    return vote(c, p.book, voting, in,
                {{agent_codes.data(), {users, m, levels}}, {votes.data(), {users, m}}, {count.data(), {users}}});
  });
  r.keep("agents", agent_codes);
  r.keep("votes", votes);
  r.keep("count", count);

  Guarded<float> prototypes(users * m * d);
  r.call("prototypes", 0, executor, [&](const Context& c) {
    return hisac::code_prototypes(c, p.book, {agent_codes.data(), {users * m, levels}},
                                  {prototypes.data(), {users * m, d}});
  });
  r.keep("prototypes", prototypes);

  if (o.without_x) in.x = {};
  if (o.without_v) in.v = {};
  Guarded<float> absent(t);
  r.call("missing", missing_workspace(test::sizing(workers), &p.book, in), executor,
         [&](const Context& c) { return missing(c, &p.book, in, {absent.data(), {t}}); });
  r.keep("missing", absent);

  Guarded<float> sum_x(t * d), sum_v(t * in.v.width), sum_bias(t), sum_spread(t);
  Guarded<int64_t> sum_starts(users + 1), sum_ends(users), sum_votes(t);
  Guarded<int32_t> sum_codes(t * levels);
  const LeafSums sums{{sum_x.data(), {t, d}},
                      {in.v.data ? sum_v.data() : nullptr, {t, in.v.width}},
                      {sum_starts.data(), o.together ? sum_starts.data() + 1 : sum_ends.data(), users},
                      {sum_codes.data(), {t, levels}},
                      {sum_bias.data(), {t}},
                      {sum_spread.data(), {t}},
                      {sum_votes.data(), {t}}};
  r.call("leaf_sums", leaf_sums_workspace(test::sizing(workers), p.book, in), executor,
         [&](const Context& c) { return leaf_sums(c, p.book, in, sums); });
  r.keep("sum_starts", sum_starts);
  r.keep("sum_ends", sum_ends);
  r.keep("sum_x", sum_x);
  r.keep("sum_v", sum_v);
  r.keep("sum_bias", sum_bias);
  r.keep("sum_spread", sum_spread);
  r.keep("sum_codes", sum_codes);
  r.keep("sum_votes", sum_votes);

  const Codebook* const book = o.over_sums && !o.sparse ? nullptr : &p.book;
  const Histories routed = o.over_sums ? sums.histories() : in;
  const int64_t wide = routed.v.width, of_tokens = o.tokens ? wide : 0, of_mean_x = o.mean_x ? d : 0;
  const DType type = routed.v.dtype;
  RouteParams routing{o.normalize, {p.temperature.data(), {1}}, o.precision, o.sparse};
  RouteAgents agents{{prototypes.data(), {users, m, d}}, {count.data(), {users}}};
  const int64_t nodes = p.book.size(0), k = std::min(o.sparse, m);
  Guarded<int32_t> lists(users * nodes * k);
  r.call("agent_lists", agent_lists_workspace(test::sizing(workers), p.book, agents), executor,
         [&](const Context& c) { return agent_lists(c, p.book, agents, {lists.data(), {users, nodes, k}}); });
  r.keep("lists", lists);
  if (o.sparse) agents.codes = {agent_codes.data(), {users, m, levels}};
  if (o.lists) agents.lists = {lists.data(), {users, nodes, k}};
  Guarded<std::byte> tokens(users * m * of_tokens * bytes_of(type));
  Guarded<float> lse(users * m), mean_x(users * m * of_mean_x);
  Tokens returned{{}, {lse.data(), {users, m}}};
  if (of_tokens) returned.tokens = {tokens.data(), type, users * m, wide};
  if (of_mean_x) returned.mean_x = {mean_x.data(), {users, m, d}};
  r.call("route", route_workspace(test::sizing(workers), book, routing, routed, agents, returned), executor,
         [&](const Context& c) { return route(c, book, routing, routed, agents, returned); });
  r.keep("tokens", tokens);
  r.keep("lse", lse);
  r.keep("mean_x", mean_x);

  const int64_t to_x = !o.mean_x && routed.x.data ? d : 0;
  RouteForward forward{{}, {lse.data(), {users, m}}, {}, {}, {p.d_lse.data(), {users, m}}, {}};
  if (of_tokens) forward.tokens = {tokens.data(), type, users * m, wide};
  if (of_tokens) forward.d_tokens = {p.d_tokens.data(), type, users * m, wide};
  if (of_mean_x) forward.mean_x = {mean_x.data(), {users, m, d}};
  if (of_mean_x) forward.d_mean_x = {p.d_mean_x.data(), {users, m, d}};
  Guarded<float> d_x(t * to_x), d_v(t * wide), d_bias(t), d_spread(t), d_prototypes(users * m * d), d_temperature(1);
  RouteGradients gradients{{},
                           {},
                           {d_bias.data(), {t}},
                           {d_spread.data(), {t}},
                           {d_prototypes.data(), {users, m, d}},
                           {d_temperature.data(), {1}}};
  if (to_x) gradients.x = {d_x.data(), {t, d}};
  if (wide) gradients.v = {d_v.data(), {t, wide}};
  r.call("route_backward",
         route_backward_workspace(test::sizing(workers), book, routing, routed, agents, forward, gradients), executor,
         [&](const Context& c) { return route_backward(c, book, routing, routed, agents, forward, gradients); });
  r.keep("d_x", d_x);
  r.keep("d_v", d_v);
  r.keep("d_bias", d_bias);
  r.keep("d_spread", d_spread);
  r.keep("d_prototypes", d_prototypes);
  r.keep("d_temperature", d_temperature);

  LeafSumsForward summed{sums.histories()};  // goes back from what route gave, or from anything
  const float* const any = p.d_sums.data();
  summed.d_x = {to_x && o.over_sums ? d_x.data() : any, {t, d}};
  if (wide) summed.d_v = {o.over_sums ? d_v.data() : any, {t, wide}};
  summed.d_bias = {o.over_sums ? d_bias.data() : any, {t}};
  summed.d_spread = {o.over_sums ? d_spread.data() : any, {t}};
  Guarded<float> d_leaf_v(t * wide), d_leaf_bias(t);
  LeafSumsGradients to_leaves{{}, {d_leaf_bias.data(), {t}}};
  if (wide) to_leaves.v = {d_leaf_v.data(), {t, wide}};
  r.call("leaf_sums_backward", leaf_sums_backward_workspace(test::sizing(workers), p.book, in, to_leaves), executor,
         [&](const Context& c) { return leaf_sums_backward(c, p.book, in, summed, to_leaves); });
  r.keep("d_leaf_v", d_leaf_v);
  r.keep("d_leaf_bias", d_leaf_bias);

  const int64_t key = Problem::kKey;
  const AttendInputs attention{p.rows_of(p.q, key),
                               p.rows_of(p.keys, key),
                               p.rows_of(p.values_, w),
                               m,
                               h,
                               test::spans(p.candidates),
                               {p.token_bias.data(), {users, m}},
                               0.5f};
  Guarded<std::byte> out(n * h * w * bytes_of(o.dtype));
  Guarded<float> out_lse(n * h);
  r.call("attend", attend_workspace(test::sizing(workers), attention), executor, [&](const Context& c) {
    return attend(c, attention, {{out.data(), o.dtype, n * h, w}, {out_lse.data(), {n, h}}});
  });
  r.keep("out", out);
  r.keep("out_lse", out_lse);

  Guarded<float> d_q(n * h * key), d_keys(users * m * h * key), d_values(users * m * h * w), d_token_bias(users * m);
  r.call("attend_backward", attend_backward_workspace(test::sizing(workers), attention), executor,
         [&](const Context& c) {
           return attend_backward(c, attention,
                                  {p.rows_of(p.d_out, w),
                                   {p.d_out_lse.data(), {n, h}},
                                   {out.data(), o.dtype, n * h, w},
                                   {out_lse.data(), {n, h}}},
                                  {{d_q.data(), {n, h, key}},
                                   {d_keys.data(), {users, m, h, key}},
                                   {d_values.data(), {users, m, h, w}},
                                   {d_token_bias.data(), {users, m}}});
         });
  r.keep("d_q", d_q);
  r.keep("d_keys", d_keys);
  r.keep("d_values", d_values);
  r.keep("d_token_bias", d_token_bias);
  return r;
}

}  // namespace test
