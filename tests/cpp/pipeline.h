// SPDX-License-Identifier: Apache-2.0
// The whole path, encode to attend and back, through the public headers, each verb in a workspace of exactly its size.
#pragma once
#include <limits>
#include <string>
#include <utility>

#include "support.h"

namespace test {

struct Options {
  DType dtype = DType::float32;
  hisac::Normalize normalize = hisac::Normalize::history;
  hisac::Method method = hisac::Method::exact;
  hisac::Missing missing = hisac::Missing::drop;
  int refine = 0;
  bool fanout = false, without_x = false;
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
  std::vector<float> weights, bias, temperature, token_bias, d_lse, d_out_lse;

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
    keys = values(random, t, users * tokens() * kHeads * kKey);
    values_ = values(random, t, users * tokens() * kHeads * kValues);
    d_tokens = values(random, t, users * tokens() * kValues);
    d_out = values(random, t, pairs * kHeads * kValues);
    weights = uniform(random, rows, 2);
    bias = uniform(random, rows);
    temperature = {2.f};
    token_bias = uniform(random, users * tokens());
    d_lse = uniform(random, users * tokens());
    d_out_lse = uniform(random, pairs * kHeads);
  }
  int64_t tokens() const { return kSeats + (options.missing == hisac::Missing::token); }
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
  const int64_t levels = p.book.levels(), t = p.rows, users = p.users, mt = p.tokens(), n = p.pairs;
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
  in.weights = {p.weights.data(), {t}};

  VoteParams voting;
  if (o.fanout) voting = {0, {4, 3}};
  if (!o.fanout) voting.budget = m;
  Guarded<int32_t> agent_codes(users * m * levels), count(users);
  Guarded<int64_t> votes(users * m);
  r.call("vote", vote_workspace(test::sizing(workers), p.book, voting, t), executor, [&](const Context& c) {
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

  RouteParams routing{o.normalize, o.method, o.missing, o.refine, {p.temperature.data(), {1}}};
  RouteAgents agents{{prototypes.data(), {users, m, d}}, {count.data(), {users}}};
  if (o.without_x) in.x = {};
  Guarded<std::byte> tokens(users * mt * w * bytes_of(o.dtype));
  Guarded<float> lse(users * mt), refined(o.refine ? users * m * d : 0);
  r.call("route", route_workspace(test::sizing(workers), &p.book, routing, in, agents, t), executor,
         [&](const Context& c) {
           return route(c, &p.book, routing, in, agents,
                        {{tokens.data(), o.dtype, users * mt, w},
                         {lse.data(), {users, mt}},
                         {o.refine ? refined.data() : nullptr, {users, m, d}}});
         });
  r.keep("tokens", tokens);
  r.keep("lse", lse);
  r.keep("refined", refined);

  if (o.refine) agents.prototypes.data = refined.data();
  routing.refine = 0;
  const bool exact = o.method == Method::exact, dx = exact && !o.without_x;
  Guarded<float> d_v(t * w), d_temperature(1), d_bias(exact ? t : 0), d_x(dx ? t * d : 0),
      d_prototypes(exact ? users * m * d : 0);
  RouteGradients gradients{{d_v.data(), {t, w}}, {d_temperature.data(), {1}}, {}, {}, {}};
  if (exact) gradients.bias = {d_bias.data(), {t}};
  if (dx) gradients.x = {d_x.data(), {t, d}};
  if (exact) gradients.prototypes = {d_prototypes.data(), {users, m, d}};
  r.call("route_backward", route_backward_workspace(test::sizing(workers), &p.book, routing, in, agents, gradients, t),
         executor, [&](const Context& c) {
           return route_backward(c, &p.book, routing, in, agents,
                                 {p.rows_of(p.d_tokens, w),
                                  {p.d_lse.data(), {users, mt}},
                                  {tokens.data(), o.dtype, users * mt, w},
                                  {lse.data(), {users, mt}}},
                                 gradients);
         });
  r.keep("d_v", d_v);
  r.keep("d_temperature", d_temperature);
  r.keep("d_bias", d_bias);
  r.keep("d_x", d_x);
  r.keep("d_prototypes", d_prototypes);

  const int64_t key = Problem::kKey;
  const AttendInputs attention{p.rows_of(p.q, key),
                               p.rows_of(p.keys, key),
                               p.rows_of(p.values_, w),
                               mt,
                               h,
                               test::spans(p.candidates),
                               {p.token_bias.data(), {users, mt}},
                               0.5f};
  Guarded<std::byte> out(n * h * w * bytes_of(o.dtype));
  Guarded<float> out_lse(n * h);
  r.call("attend", attend_workspace(test::sizing(workers), attention), executor, [&](const Context& c) {
    return attend(c, attention, {{out.data(), o.dtype, n * h, w}, {out_lse.data(), {n, h}}});
  });
  r.keep("out", out);
  r.keep("out_lse", out_lse);

  Guarded<float> d_q(n * h * key), d_keys(users * mt * h * key), d_values(users * mt * h * w), d_token_bias(users * mt);
  r.call("attend_backward", attend_backward_workspace(test::sizing(workers), attention), executor,
         [&](const Context& c) {
           return attend_backward(c, attention,
                                  {p.rows_of(p.d_out, w),
                                   {p.d_out_lse.data(), {n, h}},
                                   {out.data(), o.dtype, n * h, w},
                                   {out_lse.data(), {n, h}}},
                                  {{d_q.data(), {n, h, key}},
                                   {d_keys.data(), {users, mt, h, key}},
                                   {d_values.data(), {users, mt, h, w}},
                                   {d_token_bias.data(), {users, mt}}});
         });
  r.keep("d_q", d_q);
  r.keep("d_keys", d_keys);
  r.keep("d_values", d_values);
  r.keep("d_token_bias", d_token_bias);
  return r;
}

}  // namespace test
