// SPDX-License-Identifier: Apache-2.0
// `route` of cuda/route.cu, run by the emulator, beside the CPU's: values within the bound of split products,
// everything bit-identical for any order of threads, any machine and any batch around a user, and for rows of x and v
// gathered, scaled or made of codes instead of copied.
#include "simt_test.h"

namespace {

using namespace hisac;
using test::Random;

struct Problem {
  std::vector<int64_t> starts, ends;
  int64_t rows = 0, agents = 0, width = 0, values = 0;
  DType x_type = DType::float32, v_type = DType::float32;
  RouteParams params;
  std::vector<float> x, v, prototypes, bias, temperature;
  std::vector<float> spread, scale;
  std::vector<int64_t> x_ids, v_ids;
  std::vector<int32_t> count, codes;
  Codebook book;
  bool narrow = false;  // int32 offsets and ids
  bool codes_only = false;
  float reach = 0;  // an upper bound of (|x| + |p|)^2 / tau
};

struct Result {
  std::vector<float> tokens, lse, refined;
  bool operator==(const Result& o) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * 4) == 0);
    };
    return same(tokens, o.tokens) && same(lse, o.lse) && same(refined, o.refined);
  }
};

int64_t table(const Problem& p, const std::vector<float>& x, int64_t width) {
  return p.codes_only && x.empty() ? 0 : static_cast<int64_t>(x.size()) / width;
}
int64_t users(const Problem& p) { return static_cast<int64_t>(p.starts.size()); }

Problem random_problem(uint64_t seed) {
  Random r(seed);
  Problem p;
  const int64_t kind = r.below(8);
  const int64_t b = kind == 0 ? 1 : 1 + r.below(5);
  const int64_t longest = kind == 0 ? 4500 : kind < 4 ? 200 : 70;
  p.rows = 0;
  for (int64_t i = 0; i < b; ++i) {
    const int64_t n = r.below(4) == 0 ? 0 : 1 + r.below(longest);
    p.starts.push_back(p.rows);
    p.rows += n;
    p.ends.push_back(p.rows);
  }
  if (r.below(3) == 0)  // histories that overlap, and offsets that lie outside
    for (int64_t i = 0; i < b; ++i) {
      p.starts[test::size(i)] = r.below(p.rows + 1);
      p.ends[test::size(i)] = r.below(8) == 0 ? p.rows + 5 : r.below(p.rows + 1);
    }
  const int64_t wide[] = {1, 7, 16, 24, 32, 40, 128, 136, 300};
  p.width = kind == 0 ? 8 + r.below(9) : wide[r.below(9)];
  const int64_t deep[] = {1, 5, 8, 16, 24, 64, 72, 130};
  p.values = kind == 0 ? 8 : deep[r.below(8)];
  p.agents = kind == 0 ? 1 + r.below(20) : r.below(5) == 0 ? 100 + r.below(80) : r.below(50);
  const DType types[] = {DType::float32, DType::bfloat16, DType::float16};
  p.x_type = types[r.below(3)];
  p.v_type = r.below(2) ? p.x_type : types[r.below(3)];
  if (r.below(4) == 0) p.params.precision = Precision::bfloat16;
  p.params.normalize = r.below(2) ? Normalize::agents : Normalize::history;
  p.params.missing = r.below(3) == 0 ? Missing::token : Missing::drop;
  p.params.refine = r.below(4) == 0 ? 1 + static_cast<int>(r.below(2)) : 0;
  p.narrow = r.below(2);
  p.x = test::rounded(test::uniform(r, p.rows * p.width), p.x_type);
  p.v = test::rounded(test::uniform(r, p.rows * p.values), p.v_type);
  p.prototypes = test::uniform(r, b * p.agents * p.width);
  const float tau = 0.05f * static_cast<float>(p.width);
  p.temperature.assign(r.below(2) ? test::size(p.agents) : 1, tau);
  for (float& t : p.temperature) t *= 1 + 0.5f * r.uniform();
  if (p.temperature.empty()) p.temperature = {tau};
  if (r.below(3) == 0)
    p.temperature[test::size(r.below(static_cast<int64_t>(p.temperature.size())))] = r.below(2) ? NAN : 0;
  p.reach = static_cast<float>(p.width) * 4 * (1 / 3.f) * 2 / (tau / 2);
  if (r.below(2)) {
    p.bias = test::uniform(r, p.rows, 3);
    for (float& y : p.bias)
      if (r.below(9) == 0) y = r.below(2) ? NAN : -INFINITY;
  }
  if (r.below(2))
    for (int64_t i = 0; i < b; ++i) p.count.push_back(static_cast<int32_t>(r.below(p.agents + 4) - 1));
  if (r.below(2)) {
    p.book = test::codebook(r, {7, 5}, p.width);
    for (int64_t i = 0; i < p.rows; ++i)
      for (int64_t c : {7, 5}) p.codes.push_back(static_cast<int32_t>(r.below(12) ? r.below(c) : r.below(2) ? -1 : c));
  }
  for (int64_t i = 0; i < p.rows && p.width; ++i)  // rows to be selected away
    if (r.below(11) == 0) {
      if (r.below(3) == 0) p.v[test::size(i * p.values + r.below(p.values))] = r.below(2) ? NAN : -INFINITY;
      p.x[test::size(i * p.width + r.below(p.width))] = p.x_type == DType::float16 ? NAN
                                                        : r.below(2)               ? INFINITY
                                                                                   : 2e15f;
    }
  return p;
}

/// The table becomes shorter; ids of its rows, some of them of none.
std::vector<int64_t> shuffle_rows(Random& r, const Problem& p, int64_t width, std::vector<float>* table) {
  const int64_t rows = std::min(1 + p.rows / 2, p.rows),
                none[] = {-1, rows, -0x80000000ll, p.narrow ? 0x7fffffff : int64_t{5} << 32};
  table->resize(test::size(rows * width));
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < p.rows; ++i) ids.push_back(r.below(9) ? r.below(rows) : none[r.below(4)]);
  return ids;
}

/// The same behaviours as a service keeps them: tables and ids, int8, codes alone, spreads.
void gather(uint64_t seed, Problem& p) {
  Random r(seed + 1000);
  if (r.below(3) == 0) {
    p.spread = test::uniform(r, p.rows);
    for (float& y : p.spread) y = r.below(12) ? std::fabs(y) : r.below(3) ? -y - 0.01f : r.below(2) ? NAN : INFINITY;
    p.reach += 1 / (0.025f * static_cast<float>(p.width));
  }
  p.codes_only = !p.codes.empty() && r.below(2);
  if (p.codes_only) {
    p.x.clear();
    p.x_type = DType::float32;
  } else {
    if (r.below(2)) p.x_ids = shuffle_rows(r, p, p.width, &p.x);
    if (r.below(3) == 0) {
      p.x_type = DType::int8;
      for (float& y : p.x) y = std::isfinite(y) ? std::nearbyint(std::max(std::min(127 * y, 127.f), -128.f)) : -128.f;
      if (const int64_t kind = r.below(3)) p.scale = test::uniform(r, kind == 1 ? 1 : table(p, p.x, p.width));
      for (float& y : p.scale) y = p.scale.size() > 1 && r.below(12) == 0 ? NAN : (1 + 0.5f * y) / 127;
      p.reach *= p.scale.empty() ? 128 * 128 : 3;
    }
  }
  if (r.below(2)) p.v_ids = shuffle_rows(r, p, p.values, &p.v);
}

/// The same with every row where its behaviour is, as float32 or its own type.
Problem copied(const Problem& p) {
  Problem q;
  q.starts = p.starts;
  q.ends = p.ends;
  q.rows = p.rows;
  q.agents = p.agents;
  q.width = p.width;
  q.values = p.values;
  q.x_type = p.x_type == DType::int8 ? DType::float32 : p.x_type;
  q.v_type = p.v_type;
  q.params = p.params;
  q.prototypes = p.prototypes;
  q.temperature = p.temperature;
  q.count = p.count;
  q.narrow = p.narrow;
  q.spread = p.spread;
  q.bias = p.bias.empty() ? std::vector<float>(test::size(p.rows)) : p.bias;
  const int64_t x_rows = table(p, p.x, p.width), v_rows = table(p, p.v, p.values);
  for (int64_t i = 0; i < p.rows; ++i) {
    const int64_t x = p.x_ids.empty() ? i : p.x_ids[test::size(i)], v = p.v_ids.empty() ? i : p.v_ids[test::size(i)];
    const bool has_x = p.codes_only || (x >= 0 && x < x_rows), has_v = v >= 0 && v < v_rows;
    const int32_t* const codes = p.codes.empty() ? nullptr : p.codes.data() + 2 * i;
    if (!has_x || !has_v || (codes && !p.book.valid(codes))) q.bias[test::size(i)] = NAN;
    for (int64_t d = 0; d < p.values; ++d) q.v.push_back(has_v ? p.v[test::size(v * p.values + d)] : NAN);
    std::vector<float> row(test::size(p.width));
    if (p.codes_only) p.book.prototype(codes, row.data());
    const float scale = p.scale.empty() || !has_x ? 1 : p.scale[p.scale.size() == 1 ? 0 : test::size(x)];
    for (int64_t d = 0; d < p.width; ++d)
      q.x.push_back(p.codes_only ? row[test::size(d)] : has_x ? p.x[test::size(x * p.width + d)] * scale : 0);
  }
  return q;
}

/// Agents in several tiles, whose normaliser needs a sweep for each.
Problem several_tiles() {
  Random r(1);
  Problem p;
  p.starts = {0, 90};
  p.ends = {90, 800};  // a unit of several tiles of rows
  p.rows = 800;
  p.agents = 100;
  p.width = 24;
  p.values = 72;
  p.params.normalize = Normalize::agents;
  p.params.missing = Missing::token;
  p.x = test::uniform(r, p.rows * p.width);
  p.v = test::uniform(r, p.rows * p.values);
  p.x[5] = NAN;
  p.v[test::size(70 * p.values + 71)] = p.x[test::size(70 * p.width)] = INFINITY;
  p.prototypes = test::uniform(r, 2 * p.agents * p.width);
  p.temperature = {1.2f};
  p.reach = 24 * 4 * 2 / 3.f / 1.2f;
  return p;
}

RouteInputs inputs(const Problem& p, const void* x, const void* v, const void* starts, const void* ends) {
  RouteInputs in;
  in.x = {p.codes_only ? nullptr : x, p.x_type, table(p, p.x, p.width), p.width};
  in.v = {v, p.v_type, table(p, p.v, p.values), p.values};
  if (!p.scale.empty()) in.x_scale = {p.scale.data(), {static_cast<int64_t>(p.scale.size())}};
  if (!p.spread.empty()) in.spread = {p.spread.data(), {p.rows}};
  in.histories = {starts, ends, p.narrow ? DType::int32 : DType::int64, users(p)};
  in.prototypes = {p.prototypes.data(), {users(p), p.agents, p.width}};
  if (!p.count.empty()) in.count = {p.count.data(), {users(p)}};
  if (!p.bias.empty()) in.bias = {p.bias.data(), {p.rows}};
  if (!p.codes.empty()) {
    in.codes = {p.codes.data(), {p.rows, 2}};
    in.book = &p.book;
  }
  return in;
}

/// verb(params, inputs, out, longest); every array of its exact size.
template <class Verb>
Result run(const Problem& p, bool clamp, Verb verb) {
  test::Guarded<std::byte> x(test::encoded(p.x, p.x_type)), v(test::encoded(p.v, p.v_type));
  std::vector<int64_t> starts = p.starts, ends = p.ends;
  for (size_t i = 0; clamp && i < starts.size(); ++i) ends[i] = std::min(std::max(starts[i], ends[i]), p.rows);
  test::Guarded<int64_t> wide_starts(starts), wide_ends(ends);
  test::Guarded<int32_t> narrow_starts(std::vector<int32_t>(starts.begin(), starts.end())),
      narrow_ends(std::vector<int32_t>(ends.begin(), ends.end()));
  const int64_t m = p.agents + (p.params.missing == Missing::token), b = users(p);
  const int64_t bytes = p.v_type == DType::float32 ? 4 : 2;
  test::Guarded<std::byte> tokens(b * m * p.values * bytes);
  test::Guarded<float> lse(b * m), refined(p.params.refine ? b * p.agents * p.width : 0), temperature(p.temperature);
  RouteParams params = p.params;
  params.temperature = {temperature.data(), {temperature.count()}};
  test::Guarded<int64_t> x_ids(p.x_ids), v_ids(p.v_ids);
  test::Guarded<int32_t> narrow_x_ids(std::vector<int32_t>(p.x_ids.begin(), p.x_ids.end())),
      narrow_v_ids(std::vector<int32_t>(p.v_ids.begin(), p.v_ids.end()));
  RouteInputs in = inputs(p, x.data(), v.data(), p.narrow ? (void*)narrow_starts.data() : (void*)wide_starts.data(),
                          p.narrow ? (void*)narrow_ends.data() : (void*)wide_ends.data());
  const DType type = p.narrow ? DType::int32 : DType::int64;
  if (!p.x_ids.empty()) in.x_ids = {p.narrow ? (void*)narrow_x_ids.data() : (void*)x_ids.data(), type, p.rows};
  if (!p.v_ids.empty()) in.v_ids = {p.narrow ? (void*)narrow_v_ids.data() : (void*)v_ids.data(), type, p.rows};
  const Tokens out{{tokens.data(), p.v_type, b * m, p.values},
                   {lse.data(), {b, m}},
                   {p.params.refine ? refined.data() : nullptr, {b, p.agents, p.width}}};
  const Status status = verb(params, in, out);
  if (!status.ok()) test::fail("%s", status.what());
  if (!tokens.intact() || !lse.intact() || !refined.intact()) test::fail("a result's end was overwritten");
  return {test::decoded(tokens.values(), p.v_type), lse.values(), refined.values()};
}

Result on_cpu(const Problem& p) {
  return run(p, true, [](const RouteParams& params, const RouteInputs& in, const Tokens& out) {
    test::Workspace workspace(route_workspace(params, in, in.behaviours(), 1));
    return hisac::route({workspace.array(), nullptr}, params, in, out);
  });
}

Result on_cuda(const Problem& p) {
  return run(p, false, [&](const RouteParams& params, const RouteInputs& in, const Tokens& out) {
    int64_t longest = 0;
    for (size_t i = 0; i < p.starts.size(); ++i) longest = std::max(longest, std::min(p.ends[i], p.rows) - p.starts[i]);
    test::Workspace workspace(cuda::route_workspace(params, in, longest));
    std::vector<float> centers;
    for (int l = 0; p.codes_only && l < p.book.levels(); ++l)
      centers.insert(centers.end(), p.book.centers(l), p.book.centers(l) + p.book.size(l) * p.width);
    test::Guarded<float> image(centers);
    Context context{workspace.array(), nullptr, Device::cuda};
    if (p.codes_only) context.codebook_image = {reinterpret_cast<const std::byte*>(image.data()), {image.count() * 4}};
    const Status status = cuda::route(context, params, in, out);
    if (!workspace.intact()) test::fail("the workspace's end was overwritten");
    return status;
  });
}

void compare(const Problem& p, const Result& cpu, const Result& cuda) {
  // of a logit: split products, the norms' rounding, exp2; and of a sum: split weights and values, float32 sums
  const float part = p.params.precision == Precision::bfloat16 ? 0x1p-8f : 0x1p-16f;
  const float e =
      p.reach * (2 * part + static_cast<float>(p.width) * 0x1p-22f) * static_cast<float>(1 + p.params.refine) +
      3 * 0x1p-20f;
  const float type = p.v_type == DType::bfloat16 ? 0x1p-7f : p.v_type == DType::float16 ? 0x1p-10f : 0;
  const float token = 2 * (std::exp(4 * e) - 1) + 4 * part + type + 1e-5f;
  const float lse = 2 * e + 1e-5f;
  const auto near = [](float a, float b, float bound) { return a == b || std::fabs(a - b) <= bound; };
  // by an infinite v of a present row: what is left depends on the parts of both
  const auto spoiled = [](float a, float b) { return !(std::fabs(a) < 1e30f) && !std::isfinite(b); };
  for (size_t i = 0; i < cpu.lse.size(); ++i)
    if (!near(cpu.lse[i], cuda.lse[i], lse + std::fabs(cpu.lse[i]) * 1e-5f))
      test::fail("lse %zu: %g, expected %g within %g", i, double(cuda.lse[i]), double(cpu.lse[i]), double(lse));
  for (size_t i = 0; i < cpu.tokens.size(); ++i)
    if (!(near(cpu.tokens[i], cuda.tokens[i], token) || spoiled(cpu.tokens[i], cuda.tokens[i])))
      test::fail("token %zu: %g, expected %g within %g", i, double(cuda.tokens[i]), double(cpu.tokens[i]),
                 double(token));
  for (size_t i = 0; i < cpu.refined.size(); ++i)
    if (!near(cpu.refined[i], cuda.refined[i], token))
      test::fail("refined %zu: %g, expected %g within %g", i, double(cuda.refined[i]), double(cpu.refined[i]),
                 double(token));
}

void check(const Problem& p, bool gathered) {
  const Result first = on_cuda(p);
  compare(p, on_cpu(p), first);
  const simt::Options kept = simt::options;
  simt::options.order = simt::Order::random;
  simt::options.seed += 17;
  simt::options.machine.processors = 5;  // other cuts of the histories
  if (!(on_cuda(p) == first)) test::fail("other bits for another order of threads and number of processors");
  simt::options.machine.shared = 512 << 10;  // as many agents a block, whatever the type of x
  if (gathered && !(on_cuda(p) == on_cuda(copied(p)))) test::fail("other bits for rows copied");
  simt::options = kept;
}

}  // namespace

int main(int argc, char** argv) {
  test::options(argc, argv);
  for (uint64_t seed = test::first; seed < test::last; ++seed) {
    test::name("route %llu", static_cast<unsigned long long>(seed));
    const size_t sizes[] = {size_t{99} << 10, size_t{163} << 10, size_t{227} << 10};
    simt::options.machine = {seed ? 2 : 1, seed ? sizes[seed % 3] : size_t{64} << 10};
    Problem p = seed ? random_problem(seed) : several_tiles();
    const bool gathered = seed % 2;
    if (gathered) gather(seed, p);
    check(p, gathered);
  }
  return test::done();
}
