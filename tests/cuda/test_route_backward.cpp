// SPDX-License-Identifier: Apache-2.0
// `route_backward` of cuda/route_backward.cu, run by the emulator, beside the CPU's: every gradient within a share of
// the sum of its terms' moduli, the same bits for any order of threads and any machine, and no user spoilt by another.
#include "sparse_problem.h"

namespace {

using namespace hisac;
using test::Random, test::users;

enum { kX, kV, kBias, kSpread, kPrototypes, kTemperature, kGradients };
const char* const kNames[] = {"x", "v", "bias", "spread", "prototypes", "temperature"};
constexpr int kAll = (1 << kGradients) - 1;

struct Problem : test::Problem {
  std::vector<float> tokens, lse, means, d_tokens, d_lse, d_means;  // of the forward; means: of x
  int wanted = kAll;                                                // gradients, a bit each
  std::vector<int64_t> x_rows, v_rows;                              // of tables; none: all
};

int64_t of_x(const Problem& p) { return p.x_ids.empty() || p.x_rows.empty() ? test::items(p) : test::count(p.x_rows); }
int64_t of_v(const Problem& p) {
  return p.v_ids.empty() || p.v_rows.empty() ? test::table(p.v, p.values) : test::count(p.v_rows);
}

using Gradients = std::vector<float>[kGradients];
struct Result {
  Gradients gradient;
  bool operator==(const Result& o) const {
    for (int k = 0; k < kGradients; ++k)
      if (gradient[k].size() != o.gradient[k].size() ||
          (!gradient[k].empty() && std::memcmp(gradient[k].data(), o.gradient[k].data(), gradient[k].size() * 4) != 0))
        return false;
    return true;
  }
};

/// The gradients of what route returns.
void fill_back(Random& r, Problem& p) {
  const int64_t tokens = users(p) * p.agents;
  if (p.with_mean_x) p.d_means = test::uniform(r, tokens * p.width);
  if (p.with_tokens && (r.below(4) || !p.with_mean_x))
    p.d_tokens = test::rounded(test::uniform(r, tokens * p.values), p.v_type);
  if (r.below(4)) p.d_lse = test::uniform(r, tokens);
  if (p.codes_only || p.with_mean_x) p.wanted &= ~(1 << kX);
  if (!p.values) p.wanted &= ~(1 << kV);
  if (!p.wanted) p.wanted = 1 << kSpread;
}

/// Everything but the histories' offsets and the sizes.
void fill(Random& r, Problem& p, float tau) {
  p.x = test::uniform(r, p.rows * p.width);
  p.v = test::uniform(r, p.rows * p.values);
  p.prototypes = test::uniform(r, users(p) * p.agents * p.width);
  p.temperature = {tau * (1 + 0.5f * r.uniform())};
  fill_back(r, p);
}

Problem random_problem(uint64_t seed) {
  seed += 5548;  // from here on something of everything
  Random r(seed + 33288);
  Problem p;
  static_cast<test::Problem&>(p) = test::random_problem(seed);
  if (const int64_t n = p.ends.back() - p.starts.back(); n > 1500 || r.below(3) == 0)  // rows of nobody
    p.ends.back() -= n > 1500 ? n - 1500 : n / 3;
  const bool gathered = seed % 2;
  if (gathered) test::gather(seed, p);
  for (float& y : p.v)  // rows that were absent may be present now
    if (gathered && seed % 8 != 3 && !std::isfinite(y)) y = 1;
  for (float& t : p.temperature) t *= 4;
  p.wanted = r.below(2) ? kAll : 1 + static_cast<int>(r.below(kAll));
  fill_back(r, p);
  p.x_rows = test::some_rows(r, test::items(p));
  p.v_rows = test::some_rows(r, test::table(p.v, p.values));
  return p;
}

/// Agents in several tiles by histories of several, some shared; the sums of agents need sweeps of their own.
Problem several_tiles(Normalize normalize) {
  Random r(1);
  Problem p;
  p.starts = {0, 90, 300, 100};
  p.ends = {90, 430, 330, 100};
  p.rows = 440;
  p.agents = 100;
  p.width = 24;
  p.values = 72;
  p.params.normalize = normalize;
  p.with_mean_x = normalize == Normalize::history;
  fill(r, p, 5);
  p.x[5] = NAN;
  p.v[test::size(70 * p.values + 71)] = p.x[test::size(70 * p.width)] = INFINITY;
  if (normalize == Normalize::history) return p;
  test::shuffle_items(r, p);
  p.v_ids = test::shuffle_rows(r, p, p.values, &p.v);
  return p;
}

/// x and v in several chunks of columns.
Problem wide_problem(bool mean_x) {
  Random r(2);
  Problem p;
  p.starts = {0, 40};
  p.ends = {40, 75};
  p.rows = 75;
  p.agents = 9;
  p.width = 520;
  p.values = 256;
  p.params.normalize = Normalize::agents;
  p.with_mean_x = mean_x;
  fill(r, p, 100);
  return p;
}

/// More users than a block has threads, all in the same rows.
Problem many_users() {
  Random r(4);
  Problem p;
  p.rows = 40;
  for (int64_t i = 0; i < 100; ++i) {
    p.starts.push_back(r.below(p.rows));
    p.ends.push_back(std::min(p.rows, p.starts.back() + (i / 32 == 1 ? 0 : r.below(4))));  // a warp without any
  }
  p.agents = 3;
  p.width = p.values = 8;
  fill(r, p, 4);
  return p;
}

/// verb(held, params, forward, gradients); every array of its exact size, of hostile bits where it is written.
template <class Verb>
Result run(const Problem& p, bool clamp, Verb verb) {
  test::Held held(p, clamp);
  test::Guarded<std::byte> d_tokens(test::encoded(p.d_tokens, p.v_type)), tokens(test::encoded(p.tokens, p.v_type));
  const int64_t b = users(p), m = p.agents, taus = static_cast<int64_t>(p.temperature.size());
  RouteParams params = p.params;
  params.temperature = {p.temperature.data(), {taus}};
  RouteForward forward{{}, {p.lse.data(), {b, m}}, {}, {}};
  if (p.with_tokens) forward.tokens = {tokens.data(), p.v_type, b * m, p.values};
  if (p.with_mean_x) forward.mean_x = {p.means.data(), {b, m, p.width}};
  if (!p.d_tokens.empty()) forward.d_tokens = {d_tokens.data(), p.v_type, b * m, p.values};
  if (!p.d_lse.empty()) forward.d_lse = {p.d_lse.data(), {b, m}};
  if (p.with_mean_x) forward.d_mean_x = {p.d_means.data(), {b, m, p.width}};
  const auto size = [&](int k, int64_t n) { return p.wanted >> k & 1 ? n : 0; };
  test::Guarded<float> gradient[] = {test::Guarded<float>(size(kX, of_x(p) * p.width)),
                                     test::Guarded<float>(size(kV, of_v(p) * p.values)),
                                     test::Guarded<float>(size(kBias, p.rows)),
                                     test::Guarded<float>(size(kSpread, p.rows)),
                                     test::Guarded<float>(size(kPrototypes, b * m * p.width)),
                                     test::Guarded<float>(size(kTemperature, taus))};
  RouteGradients out;
  if (p.wanted & 1 << kX) out.x = {gradient[kX].data(), {of_x(p), p.width}};
  if (p.wanted & 1 << kV) out.v = {gradient[kV].data(), {of_v(p), p.values}};
  if (p.wanted & 1 << kBias) out.bias = {gradient[kBias].data(), {p.rows}};
  if (p.wanted & 1 << kSpread) out.spread = {gradient[kSpread].data(), {p.rows}};
  if (p.wanted & 1 << kPrototypes) out.prototypes = {gradient[kPrototypes].data(), {b, m, p.width}};
  if (p.wanted & 1 << kTemperature) out.temperature = {gradient[kTemperature].data(), {taus}};
  if (!p.x_ids.empty() && !p.x_rows.empty()) out.x_rows = ids(p.x_rows.data(), of_x(p));
  if (!p.v_ids.empty() && !p.v_rows.empty()) out.v_rows = ids(p.v_rows.data(), of_v(p));
  const Status status = verb(held, params, forward, out);
  if (!status.ok()) test::fail("%s", status.what());
  Result result;
  for (int k = 0; k < kGradients; ++k) {
    if (!gradient[k].intact()) test::fail("d_%s's end was overwritten", kNames[k]);
    result.gradient[k] = gradient[k].values();
  }
  return result;
}

/// The forward's results, of the CPU.
void go_forward(Problem& p) {
  const test::Result out = test::on_cpu(p);
  p.tokens = out.tokens;
  p.lse = out.lse;
  p.means = out.mean_x;
}

Result on_cpu(const Problem& p) {
  return run(
      p, true, [](const test::Held& h, const RouteParams& params, const RouteForward& f, const RouteGradients& out) {
        test::Workspace workspace(route_backward_workspace(test::sizing(1), h.book, params, h.in, h.agents, f, out));
        return hisac::route_backward({workspace.array(), nullptr}, h.book, params, h.in, h.agents, f, out);
      });
}

Result on_cuda(const Problem& p) {
  return run(p, false,
             [&](const test::Held& h, const RouteParams& params, const RouteForward& f, const RouteGradients& out) {
               Histories in = h.in;
               in.rows = test::all_rows(p);
               test::Workspace workspace(cuda::route_backward_workspace({}, h.book, params, in, h.agents, f, out));
               test::Workspace image(test::image_size(p));
               const Context context = test::context_of(p, workspace, image);
               const Status status = cuda::route_backward(context, h.book, params, in, h.agents, f, out);
               if (!workspace.intact()) test::fail("the workspace's end was overwritten");
               return status;
             });
}

Problem copied(const Problem& p) {
  Problem q = p;
  static_cast<test::Problem&>(q) = test::copied(p);
  return q;
}

/// The moduli of every gradient's terms, by the definition in float64, and the share of them that may be wrong: split
/// or rounded operands and float32 norms in a logit of at most `reach`, and float32 sums.
struct Terms {
  std::vector<double> gradient[kGradients];
  double share = 0;
};

Terms terms_of(const Problem& p) {
  Terms t;
  const int64_t b = users(p), taus = static_cast<int64_t>(p.temperature.size());
  const int64_t sizes[] = {p.rows * p.width, p.rows * p.values, p.rows, p.rows, b * p.agents * p.width, taus};
  for (int k = 0; k < kGradients; ++k) t.gradient[k].assign(test::size(sizes[k]), 0);
  const auto element = [](const std::vector<float>& a, int64_t i) {
    return a.empty() ? 0.0 : double(a[test::size(i)]);
  };
  const auto moduli = [&](const std::vector<float>& a, int64_t i, const std::vector<float>& c, int64_t j, int64_t n) {
    double sum = 0;
    for (int64_t k = 0; k < n && !a.empty(); ++k) sum += std::fabs(element(a, i * n + k) * element(c, j * n + k));
    return sum;
  };
  double reach = 0, largest = 1;
  for (int64_t u = 0; u < b; ++u) {
    const int64_t count = p.count.empty() ? p.agents : std::min<int64_t>(p.count[test::size(u)], p.agents);
    std::vector<int64_t> agents;
    for (int64_t a = 0; a < count; ++a)
      if (p.temperature[taus == 1 ? 0 : test::size(a)] > 0) agents.push_back(a);
    const std::vector<char> routed = test::routed(p, u);
    for (int64_t i = p.starts[test::size(u)]; i < std::min(p.rows, p.ends[test::size(u)]); ++i) {
      if (!test::is_present(p, i)) continue;
      const double bias = element(p.bias, i), spread = element(p.spread, i);
      const float* const x = &p.x[test::size(i * p.width)];
      std::vector<double> z(agents.size()), dz(agents.size()), far(agents.size());
      double max_logit = -HUGE_VAL, total = 0, sum = 0;
      for (size_t j = 0; j < agents.size(); ++j) {
        const float* const q = &p.prototypes[test::size((u * p.agents + agents[j]) * p.width)];
        double d = spread;
        for (int64_t k = 0; k < p.width; ++k) d += std::pow(double(x[k]) - double(q[k]), 2);
        const double tau = p.temperature[taus == 1 ? 0 : test::size(agents[j])];
        far[j] = std::pow(std::sqrt(test::norm_of(x, p.width)) + std::sqrt(test::norm_of(q, p.width)), 2) + spread;
        const int32_t node = p.params.sparse ? p.codes[test::size(2 * i)] : 0;
        z[j] = routed[test::size(node * p.agents + agents[j])] ? -d / tau : -HUGE_VAL;
        reach = std::max(reach, far[j] / tau);
        max_logit = std::max(max_logit, z[j]);
      }
      for (const double y : z) total += max_logit > -HUGE_VAL ? std::exp(y - max_logit) : 0;
      const bool softmax_over_agents = p.params.normalize == Normalize::agents;
      const double lse = softmax_over_agents && max_logit > -HUGE_VAL ? max_logit + std::log(total) : 0;
      for (size_t j = 0; j < agents.size(); ++j) {
        const int64_t a = u * p.agents + agents[j];
        if (!(std::fabs(element(p.lse, a)) < HUGE_VAL)) continue;  // no behaviour is routed to it
        largest = std::max(largest, std::fabs(bias) + std::fabs(element(p.lse, a)));
        const double w = std::exp(z[j] - lse + bias - element(p.lse, a));
        for (int64_t c = 0; c < p.values; ++c)
          t.gradient[kV][test::size(i * p.values + c)] += w * std::fabs(element(p.d_tokens, a * p.values + c));
        dz[j] = w * (std::fabs(element(p.d_lse, a)) + moduli(p.d_tokens, a, p.tokens, a, p.values) +
                     moduli(p.d_tokens, a, p.v, i, p.values) + moduli(p.d_means, a, p.means, a, p.width) +
                     moduli(p.d_means, a, p.x, i, p.width));
        sum += dz[j];
      }
      t.gradient[kBias][test::size(i)] += sum;
      for (size_t j = 0; j < agents.size(); ++j) {
        if (softmax_over_agents) dz[j] += std::exp(z[j] - lse) * sum;
        const size_t tau_at = taus == 1 ? 0 : test::size(agents[j]);
        const double tau = p.temperature[tau_at], slope = 2 * dz[j] / tau;
        t.gradient[kTemperature][tau_at] += dz[j] * far[j] / (tau * tau);
        t.gradient[kSpread][test::size(i)] += dz[j] / tau;
        for (int64_t k = 0; k < p.width; ++k) {
          const size_t of_x = test::size(i * p.width + k), of_p = test::size((u * p.agents + agents[j]) * p.width + k);
          const double term = slope * (std::fabs(double(p.x[of_x])) + std::fabs(double(p.prototypes[of_p])));
          t.gradient[kX][of_x] += term;
          t.gradient[kPrototypes][of_p] += term;
        }
      }
    }
  }
  const double part = p.params.precision == Precision::bfloat16 ? 0x1p-8 : 0x1p-16;
  const double e = reach * (2 * part + double(p.width) * 0x1p-22) + (reach + largest + 8) * 0x1p-21;
  t.share = std::expm1((p.params.normalize == Normalize::agents ? 4 : 2) * e) + 4 * part +
            double(p.rows + p.agents + p.values + p.width + 64) * 0x1p-22;
  return t;
}

/// Of rows that were copied out of p's tables, as those of the tables.
template <class Gradient>
void in_tables(const Problem& p, Gradient& gradient) {
  gradient[kX] = test::in_table(gradient[kX], p.x_ids, test::items(p), p.width, p.x_rows);
  gradient[kV] = test::in_table(gradient[kV], p.v_ids, test::table(p.v, p.values), p.values, p.v_rows);
}

void compare(const Problem& p, const Result& cpu, const Result& cuda) {
  Terms terms = terms_of(copied(p));
  in_tables(p, terms.gradient);
  for (int k = 0; k < kGradients; ++k)
    for (size_t i = 0; i < cpu.gradient[k].size(); ++i) {
      const double expected = cpu.gradient[k][i], got = cuda.gradient[k][i],
                   bound = terms.share * terms.gradient[k][i] + 1e-36;
      if (!std::isfinite(terms.gradient[k][i])) continue;  // by a v that is not
      if (!(std::fabs(expected - got) <= bound))
        test::fail("d_%s %zu: %g, expected %g within %g", kNames[k], i, got, expected, bound);
      if (terms.gradient[k][i] == 0 && got != 0) test::fail("d_%s %zu: %g, expected nothing", kNames[k], i, got);
    }
}

void check(Problem p) {
  go_forward(p);
  const Result first = on_cuda(p);
  compare(p, on_cpu(p), first);
  test::check_bits(p, first, [&](const Problem& q) {
    Result result = on_cuda(q);
    if (!q.gathered()) in_tables(p, result.gradient);
    return result;
  });
}

/// A problem, and the same with sparse routing.
void check_both(uint64_t seed, Problem p) {
  check(p);
  test::name("sparse route_backward %llu", static_cast<unsigned long long>(seed));
  test::make_sparse(seed, p);
  check(p);
}

/// What one user has that is not finite stays with it, and with the temperature.
void check_spoilt(Normalize normalize) {
  Random r(3);
  Problem p;
  p.starts = {0, 30, 75};
  p.ends = {30, 75, 90};
  p.rows = 90;
  p.agents = 20;
  p.width = 8;
  p.values = 8;
  p.params.normalize = normalize;
  p.wanted = kAll & ~(1 << kTemperature);
  fill(r, p, 2);
  go_forward(p);
  const Result sound = on_cuda(p);
  const int64_t token = p.agents + 3;
  float* const places[] = {&p.v[test::size(40 * p.values + 1)], &p.d_tokens[test::size(token * p.values)],
                           &p.lse[test::size(token)],                    // weights beyond float32
                           &p.prototypes[test::size(token * p.width)]};  // an absent agent
  const float spoils[] = {NAN, NAN, -200, INFINITY};
  for (int what = 0; what < 4; ++what) {
    const float kept = *places[what];
    *places[what] = spoils[what];
    const Result got = on_cuda(p);
    *places[what] = kept;
    for (int k = 0; k < kGradients; ++k) {
      const int64_t of_row[] = {p.width, p.values, 1, 1, p.agents * p.width, 0};
      for (size_t i = 0; i < got.gradient[k].size(); ++i) {
        const int64_t row = static_cast<int64_t>(i) / of_row[k];
        const bool belongs = k == kPrototypes ? row == 1 : row >= 30 && row < 75;
        if (!belongs && std::memcmp(&got.gradient[k][i], &sound.gradient[k][i], 4) != 0)
          test::fail("spoilt by %d: d_%s %zu is %g", what, kNames[k], i, double(got.gradient[k][i]));
        if (what == 3 && !std::isfinite(got.gradient[k][i])) test::fail("an absent agent: d_%s %zu", kNames[k], i);
      }
    }
    bool spoilt = false;
    for (const float y : got.gradient[kPrototypes]) spoilt |= !std::isfinite(y);
    if (what != 3 && !spoilt) test::fail("spoilt by %d: nothing came of it", what);
  }
}

}  // namespace

int main(int argc, char** argv) {
  test::options(argc, argv);
  for (uint64_t seed = test::first; seed < test::last; ++seed) {
    test::name("route_backward %llu", static_cast<unsigned long long>(seed));
    const size_t sizes[] = {size_t{99} << 10, size_t{163} << 10, size_t{227} << 10};
    const bool tiles = seed == 11;
    simt::options.machine = {tiles ? 1 : 2, tiles ? size_t{80} << 10 : sizes[seed % 3]};
    if (tiles)
      for (const Normalize n : {Normalize::history, Normalize::agents}) check_both(seed, several_tiles(n));
    else if (seed == 8)
      for (const bool mean_x : {false, true}) check(wide_problem(mean_x));
    else if (seed == 9)
      check(many_users());
    else if (seed == 16)
      for (const Normalize n : {Normalize::history, Normalize::agents}) check_spoilt(n);
    else if (seed % 3 == 1)
      check_both(seed, random_problem(seed));
    else
      check(random_problem(seed));
  }
  return test::done();
}
