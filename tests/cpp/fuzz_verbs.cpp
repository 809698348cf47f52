// SPDX-License-Identifier: Apache-2.0
// Small shapes and hostile floats through every verb, in exact-size memory. No crash; encode and vote equal the
// definition (so, run under each HISAC_ISA, each other); one worker and three give the same bits; and where inputs are
// tame, nothing is NaN.
#include "definition.h"
#include "fuzz.h"

using namespace hisac;
using fuzz::Bytes;
using test::Guarded;

namespace {

/// Runs a verb serially and with three workers, each in a workspace of exactly its size.
template <class Size, class Verb>
void twice(Size size, Verb verb) {
  test::Backwards manner{3, 1};
  const Executor three = manner.executor();
  for (int round = 0; round < 2; ++round) {
    test::Workspace workspace(size(round ? 3 : 1));
    const Status status = verb(Context{workspace.array(), round ? &three : nullptr}, round);
    if (!status.ok()) std::fprintf(stderr, "%s\n", status.what());
    CHECK(status.ok());
    CHECK(workspace.intact());
  }
}

/// An output of both rounds.
template <class T>
struct Twin {
  explicit Twin(int64_t n) : first(n), second(n) {}
  Guarded<T> first, second;
  T* operator[](int round) { return (round ? second : first).data(); }
  void check(bool tame) {
    CHECK(first.intact() && second.intact());
    CHECK(std::memcmp(first.data(), second.data(), test::size(first.count()) * sizeof(T)) == 0);
    if constexpr (std::is_same_v<T, float>)
      for (int64_t i = 0; tame && i < first.count(); ++i) CHECK(!std::isnan(first.data()[i]));
  }
};

/// Floats as rows of a type, by truncation; NaN stays NaN in float32 and float16. int8: their bits.
class Typed {
 public:
  Typed(const std::vector<float>& values, DType dtype, int64_t width)
      : dtype_(dtype), width_(width), memory_(static_cast<int64_t>(values.size()) * bytes_of(dtype)) {
    for (size_t i = 0; i < values.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, &values[i], 4);
      uint16_t half = static_cast<uint16_t>(bits >> 16);
      if (dtype == DType::float16) half = to_half(values[i]);
      if (dtype == DType::int8)
        memory_.data()[i] = static_cast<std::byte>(bits >> 16);
      else if (dtype == DType::float32)
        std::memcpy(memory_.data() + i * 4, &bits, 4);
      else
        std::memcpy(memory_.data() + i * 2, &half, 2);
    }
  }
  Rows rows() { return {memory_.data(), dtype_, memory_.count() / (width_ * bytes_of(dtype_)), width_}; }

 private:
  static uint16_t to_half(float x) {
    if (std::isnan(x)) return 0x7e00;
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float magnitude = std::fabs(x);
    if (magnitude >= 65504.f) return static_cast<uint16_t>(sign | (std::isinf(x) ? 0x7c00 : 0x7bff));
    int exponent;
    const float mantissa = std::frexp(magnitude, &exponent);
    if (exponent < -13) return static_cast<uint16_t>(sign | static_cast<int>(std::ldexp(magnitude, 24)));
    return static_cast<uint16_t>(sign | (exponent + 14) << 10 | (static_cast<int>(std::ldexp(mantissa, 11)) & 0x3ff));
  }
  DType dtype_;
  int64_t width_;
  Guarded<std::byte> memory_;
};

bool any_nan(const void* data, DType dtype, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float f;
    uint16_t h;
    std::memcpy(&f, static_cast<const std::byte*>(data) + i * (dtype == DType::float32 ? 4 : 2),
                dtype == DType::float32 ? 4 : 2);
    std::memcpy(&h, &f, 2);
    const uint16_t limit = dtype == DType::bfloat16 ? 0x7f80 : 0x7c00;
    if (dtype == DType::float32 ? std::isnan(f) : (h & 0x7fff) > limit) return true;
  }
  return false;
}

struct Codes {
  Codebook book;
  int64_t rows, levels;
  std::vector<float> x;
  std::vector<int32_t> codes;
};

Codes encode_some(Bytes& in, bool hostile) {
  Codes out;
  const int64_t width = in.flag() ? in.between(1, 5) : in.between(1, 40);
  out.levels = in.between(1, 3);
  out.rows = in.byte() % 8 ? in.between(0, 90) : in.between(20, 50) * 90;
  std::vector<std::vector<float>> centers;
  std::vector<Array<const float, 2>> arrays;
  for (int64_t l = 0; l < out.levels; ++l) {
    const int64_t size = in.flag() ? in.between(1, 4) : in.between(1, 40);
    centers.push_back(in.values(size * width, hostile));
    for (float& c : centers.back())
      if (!std::isfinite(c)) c = 1;
    arrays.push_back({centers.back().data(), {size, width}});
  }
  CHECK(Codebook::build(arrays.data(), static_cast<int>(out.levels), &out.book).ok());
  out.x = in.values(out.rows * width, hostile);
  Guarded<float> x(out.x);
  Twin<int32_t> codes(out.rows * out.levels);
  twice([&](int workers) { return encode_workspace(out.book, workers); },
        [&](const Context& c, int round) {
          return encode(c, out.book, {x.data(), DType::float32, out.rows, width},
                        {codes[round], {out.rows, out.levels}});
        });
  codes.check(false);
  out.codes = codes.first.values();
  for (int64_t i = 0; i < out.rows && i < 200; ++i) {
    const auto expected = definition::encode(out.book, out.x.data() + i * width);
    for (int64_t l = 0; l < out.levels; ++l)
      CHECK(out.codes[test::size(i * out.levels + l)] == expected[test::size(l)]);
  }
  return out;
}

struct Users {
  std::vector<int64_t> starts, ends;
  Histories histories() const {
    return {starts.data(), ends.data(), DType::int64, static_cast<int64_t>(starts.size())};
  }
};

Users users(Bytes& in, int64_t rows, bool overlap) {
  Users out;
  int64_t at = 0;
  for (int64_t n = in.between(0, 4); n > 0; --n) {
    const int64_t start = overlap ? rows * in.byte() / 256 : at;
    at = n == 1 && in.flag() ? rows : start + (rows - start) * in.byte() / 255;
    out.starts.push_back(start);
    out.ends.push_back(at);
  }
  return out;
}

void vote_some(Bytes& in, const Codes& c, Users u, bool hostile) {
  VoteParams params;
  if (in.flag())
    params.budget = in.between(1, 60);
  else
    for (int64_t l = 0; l < c.levels; ++l) params.fanout[l] = in.between(1, 5);
  std::vector<int32_t> codes = c.codes;
  for (int64_t n = in.between(0, 5); n > 0 && !codes.empty(); --n)
    codes[test::size(in.byte()) % codes.size()] = static_cast<int32_t>(in.byte()) * 0x00800001 - 3;
  int64_t rows = c.rows;
  if (rows > 0 && in.between(0, 15) == 15) {  // one long history, whose leaves are counted and not sorted
    for (; rows < 2048; rows *= 2) {
      codes.resize(test::size(2 * rows * c.levels));
      std::copy_n(codes.begin(), rows * c.levels, codes.begin() + rows * c.levels);
    }
    u.starts = {0};
    u.ends = {rows};
  }
  const bool weighted = in.flag();
  Guarded<float> weights(weighted ? in.values(rows, hostile) : std::vector<float>{});
  Guarded<int32_t> given(codes);
  const int64_t n = static_cast<int64_t>(u.starts.size()), m = seats(params, static_cast<int>(c.levels));
  int64_t longest = 0;
  for (size_t b = 0; b < u.starts.size(); ++b) longest = std::max(longest, u.ends[b] - u.starts[b]);
  Twin<int32_t> agents(n * m * c.levels), count(n);
  Twin<int64_t> votes(n * m);
  twice([&](int workers) { return vote_workspace(c.book, params, longest, workers); },
        [&](const Context& context, int r) {
          return vote(context, c.book, params, {given.data(), {rows, c.levels}}, u.histories(),
                      {weighted ? weights.data() : nullptr, {rows}},
                      {{agents[r], {n, m, c.levels}}, {votes[r], {n, m}}, {count[r], {n}}});
        });
  agents.check(false);
  votes.check(false);
  count.check(false);
  for (int64_t b = 0; b < n; ++b) {
    const int64_t first = u.starts[test::size(b)];
    const auto expected = definition::vote(c.book, params, codes.data() + first * c.levels,
                                           weighted ? weights.data() + first : nullptr, u.ends[test::size(b)] - first);
    CHECK(test::size(count[0][b]) == expected.size());
    for (size_t a = 0; a < expected.size(); ++a) {
      CHECK(votes[0][b * m + static_cast<int64_t>(a)] == expected[a].votes);
      for (size_t l = 0; l < test::size(c.levels); ++l)
        CHECK(agents[0][(b * m + static_cast<int64_t>(a)) * c.levels + static_cast<int64_t>(l)] ==
              expected[a].codes[l]);
    }
  }
}

/// Ids [T] into a table, some of them outside, in exact-size memory; and the table, some rows of what was given.
struct Gathered {
  std::vector<float> table;
  Guarded<int32_t> narrow;
  Guarded<int64_t> wide;
  bool is_wide;

  Gathered(Bytes& in, const std::vector<float>& rows, int64_t count, int64_t width)
      : table(rows.begin(), rows.begin() + static_cast<std::ptrdiff_t>(width * in.between(0, count))),
        narrow(count),
        wide(count),
        is_wide(in.flag()) {
    const int64_t size = static_cast<int64_t>(table.size()) / width, step = in.between(1, 7), start = in.byte();
    const int64_t odd[] = {-1, size, INT64_MIN, INT64_MAX, int64_t{1} << 32, -(int64_t{1} << 31)};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t id = i % 16 == start % 16 ? odd[i % 6] : size ? (start + i * step) % size : 0;
      wide.data()[i] = id;
      narrow.data()[i] = static_cast<int32_t>(id);
    }
  }
  Ids ids() {
    if (is_wide) return {wide.data(), DType::int64, wide.count()};
    return {narrow.data(), DType::int32, narrow.count()};
  }
};

void route_some(Bytes& in, const Codes& c, const Users& u, bool hostile) {
  const int64_t width = c.book.width(), value_width = in.flag() ? in.between(1, 5) : in.between(1, 40);
  const int64_t agents = in.flag() ? in.between(0, 5) : in.between(0, 70), n = static_cast<int64_t>(u.starts.size());
  const DType types[] = {DType::float32, DType::bfloat16, DType::float16};
  const DType type = types[in.byte() % 3];
  const auto vs = in.values(c.rows * value_width, hostile);
  Gathered some_x(in, c.x, c.rows, width), some_v(in, vs, c.rows, value_width);
  const uint8_t manner = in.byte();
  const bool x_by_id = manner & 1, v_by_id = manner & 2, int8 = manner & 4;
  Typed x(x_by_id ? some_x.table : c.x, int8 ? DType::int8 : type, width),
      v(v_by_id ? some_v.table : vs, type, value_width);
  Guarded<float> scale(in.values(manner & 8 ? 1 : x.rows().rows, hostile));
  Guarded<float> p(in.values(n * agents * width, hostile)), bias(in.values(c.rows, hostile));
  std::vector<float> taus = in.values(in.flag() ? 1 : agents, hostile);
  for (float& t : taus)
    if (!hostile) t = std::fabs(t) + 1;
  if (taus.empty()) taus = {1};
  Guarded<float> temperature(taus);
  Guarded<int32_t> count(n), codes(c.codes);
  for (int64_t b = 0; b < n; ++b) count.data()[b] = static_cast<int32_t>(in.between(0, 80)) - 4;
  RouteParams params;
  params.normalize = static_cast<Normalize>(in.between(0, 1));
  params.method = static_cast<Method>(in.between(0, 1));
  params.missing = static_cast<Missing>(in.between(0, 1));
  params.refine = static_cast<int>(in.between(0, 2));
  params.temperature = {temperature.data(), {temperature.count()}};
  RouteInputs inputs{x.rows(), v.rows(), u.histories(), {p.data(), {n, agents, width}}, {}, {}, {}, nullptr, {},
                     {},       {}};
  if (x_by_id) inputs.x_ids = some_x.ids();
  if (v_by_id) inputs.v_ids = some_v.ids();
  if (int8 && manner & 16) inputs.x_scale = {scale.data(), {scale.count()}};
  if (in.flag()) inputs.count = {count.data(), {n}};
  if (in.flag()) inputs.bias = {bias.data(), {c.rows}};
  const bool without_x = in.byte() % 4 == 0;
  if (params.method == Method::leaf || without_x || in.flag()) {
    inputs.codes = {codes.data(), {c.rows, c.levels}};
    inputs.book = &c.book;
  }
  if (without_x) {
    inputs.x = {};
    inputs.x_ids = {};
    inputs.x_scale = {};
  }
  int64_t longest = 0;
  for (size_t b = 0; b < u.starts.size(); ++b) longest = std::max(longest, u.ends[b] - u.starts[b]);

  const int64_t m = agents + (params.missing == Missing::token), bytes = type == DType::float32 ? 4 : 2;
  Twin<std::byte> tokens(n * m * value_width * bytes);
  Twin<float> lse(n * m), refined(params.refine ? n * agents * width : 0);
  twice([&](int workers) { return route_workspace(params, inputs, longest, workers); },
        [&](const Context& context, int r) {
          return route(context, params, inputs,
                       {{tokens[r], type, n * m, value_width},
                        {lse[r], {n, m}},
                        {params.refine ? refined[r] : nullptr, {n, agents, width}}});
        });
  tokens.check(false);
  lse.check(!hostile);
  refined.check(!hostile);
  if (!hostile) CHECK(!any_nan(tokens[0], type, n * m * value_width));

  if (params.refine) inputs.prototypes.data = refined[0];
  params.refine = 0;
  const bool exact = params.method == Method::exact, want_x = exact && !without_x;
  Typed d_tokens(in.values(n * m * value_width, hostile), type, value_width);
  Guarded<float> d_lse(in.values(n * m, hostile));
  Twin<float> dv(c.rows * value_width), dtau(temperature.count()), dbias(exact ? c.rows : 0),
      dx(want_x ? c.rows * width : 0), dp(exact ? n * agents * width : 0);
  const uint8_t wanted = in.byte();
  const auto gradients = [&](int r) {
    RouteGradients g;
    if (wanted & 1) g.v = {dv[r], {c.rows, value_width}};
    if (wanted & 2) g.temperature = {dtau[r], {temperature.count()}};
    if (wanted & 4 && exact) g.bias = {dbias[r], {c.rows}};
    if (wanted & 8 && want_x) g.x = {dx[r], {c.rows, width}};
    if (wanted & 16 && exact) g.prototypes = {dp[r], {n, agents, width}};
    return g;
  };
  twice([&](int workers) { return route_backward_workspace(params, inputs, gradients(0), longest, workers); },
        [&](const Context& context, int r) {
          return route_backward(context, params, inputs,
                                {{d_tokens.rows().data, type, n * m, value_width},
                                 {d_lse.data(), {n, m}},
                                 {tokens[0], type, n * m, value_width},
                                 {lse[0], {n, m}}},
                                gradients(r));
        });
  for (Twin<float>* g : {&dv, &dtau, &dbias, &dx, &dp}) g->check(!hostile);

  const int64_t groups = in.between(0, 9);
  Guarded<int64_t> order(in.between(0, 40)), begin(groups + 1);
  for (int64_t i = 0; i < order.count(); ++i) order.data()[i] = in.byte() % 8 ? in.byte() % (c.rows + 1) : INT64_MIN;
  for (int64_t g = 0; g <= groups; ++g) begin.data()[g] = in.byte() % 8 ? in.byte() % 44 : INT64_MAX;
  Guarded<float> rows(vs);
  Twin<float> sums(groups * value_width);
  twice([](int) { return size_t{0}; },
        [&](const Context& context, int r) {
          return sum_rows(context, {rows.data(), {c.rows, value_width}}, {order.data(), {order.count()}},
                          {begin.data(), {groups + 1}}, {sums[r], {groups, value_width}});
        });
  sums.check(!hostile);
}

void attend_some(Bytes& in, bool hostile) {
  const int64_t heads = in.between(1, 3), key = in.flag() ? in.between(1, 4) : in.between(1, 40);
  const int64_t value_width = in.flag() ? in.between(1, 4) : in.between(1, 40);
  const int64_t tokens = in.flag() ? in.between(0, 5) : in.between(0, 70);
  const int64_t pairs = in.byte() % 8 ? in.between(0, 70) : in.between(500, 700);
  const Users u = users(in, pairs, false);
  const int64_t n = static_cast<int64_t>(u.starts.size());
  const DType types[] = {DType::float32, DType::bfloat16, DType::float16};
  const DType type = types[in.byte() % 3];
  Typed q(in.values(pairs * heads * key, hostile), type, key),
      keys(in.values(n * tokens * heads * key, hostile), type, key),
      values(in.values(n * tokens * heads * value_width, hostile), type, value_width),
      d_out(in.values(pairs * heads * value_width, hostile), type, value_width);
  Guarded<float> bias(in.values(n * tokens, hostile)), d_lse(in.values(pairs * heads, hostile));
  AttendInputs inputs{q.rows(), keys.rows(), values.rows(), tokens, heads, u.histories(), {}, in.value(false)};
  if (in.flag()) inputs.bias = {bias.data(), {n, tokens}};
  const int64_t bytes = type == DType::float32 ? 4 : 2;
  Twin<std::byte> out(pairs * heads * value_width * bytes);
  Twin<float> lse(pairs * heads);
  twice([&](int workers) { return attend_workspace(inputs, workers); },
        [&](const Context& context, int r) {
          return attend(context, inputs, {{out[r], type, pairs * heads, value_width}, {lse[r], {pairs, heads}}});
        });
  out.check(false);
  lse.check(!hostile);
  if (!hostile) CHECK(!any_nan(out[0], type, pairs * heads * value_width));
  Twin<float> dq(pairs * heads * key), dk(n * tokens * heads * key), dv(n * tokens * heads * value_width),
      db(n * tokens);
  twice([&](int workers) { return attend_backward_workspace(inputs, workers); },
        [&](const Context& context, int r) {
          AttendGradients g{{dq[r], {pairs, heads, key}},
                            {dk[r], {n, tokens, heads, key}},
                            {dv[r], {n, tokens, heads, value_width}},
                            {}};
          if (inputs.bias) g.bias = {db[r], {n, tokens}};
          return attend_backward(context, inputs,
                                 {d_out.rows(),
                                  {d_lse.data(), {pairs, heads}},
                                  {out[0], type, pairs * heads, value_width},
                                  {lse[0], {pairs, heads}}},
                                 g);
        });
  for (Twin<float>* g : {&dq, &dk, &dv, &db}) g->check(!hostile);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  const uint8_t what = in.byte();
  const bool hostile = what & 1;
  if (what & 2) {
    attend_some(in, hostile);
    return 0;
  }
  const Codes codes = encode_some(in, hostile);
  const Users u = users(in, codes.rows, in.flag());
  if (what & 4)
    vote_some(in, codes, u, hostile);
  else
    route_some(in, codes, u, hostile);
  return 0;
}
