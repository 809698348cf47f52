// SPDX-License-Identifier: Apache-2.0
// `route_backward` of cuda/route_backward.cu, run by the emulator, beside the CPU's: every gradient within a share of
// the sum of its terms' moduli, the same bits for any order of threads and any machine, and no user spoilt by another.
#include <map>

#include "route_problem.h"

namespace {

using namespace hisac;
using test::Random, test::users;

enum { kV, kTemperature, kBias, kX, kPrototypes, kGradients };
const char* const kNames[] = {"v", "temperature", "bias", "x", "prototypes"};

struct Problem : test::Problem {
  std::vector<float> d_tokens, d_lse, tokens, lse;
  int wanted = 31;  // gradients, a bit each
};

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

int64_t token_rows(const Problem& p) { return p.agents + (p.params.missing == Missing::token); }

/// The gradients of what route returns.
void fill_back(Random& r, Problem& p) {
  const int64_t tokens = users(p) * token_rows(p);
  p.d_tokens = test::rounded(test::uniform(r, tokens * p.values), p.v_type);
  if (r.below(4)) p.d_lse = test::uniform(r, tokens);
}

/// Everything but the histories' offsets and the sizes.
void fill(Random& r, Problem& p, float tau) {
  p.x = test::uniform(r, p.rows * p.width);
  p.v = test::uniform(r, p.rows * p.values);
  p.prototypes = test::uniform(r, users(p) * p.agents * p.width);
  p.temperature = {tau * (1 + 0.5f * r.uniform())};
  fill_back(r, p);
}

void use_leaves(Problem& p) {
  p.params.method = Method::leaf;
  p.wanted &= 1 << kV | 1 << kTemperature;
  if (!p.wanted) p.wanted = 1 << kV;
}

Problem random_problem(uint64_t seed) {
  seed += 5548;  // from here on something of everything
  Random r(seed + 33288);
  Problem p;
  static_cast<test::Problem&>(p) = test::random_problem(seed);
  p.params.refine = 0;
  if (const int64_t n = p.ends.back() - p.starts.back(); n > 1500 || r.below(3) == 0)  // rows of nobody
    p.ends.back() -= n > 1500 ? n - 1500 : n / 3;
  const bool gathered = seed % 2, leaf = r.below(3) == 0;
  if (leaf) test::add_codes(seed, p);
  if (gathered) test::gather(seed, p);
  for (float& y : p.v)  // rows that were absent may be present now
    if (gathered && seed % 8 != 3 && !std::isfinite(y)) y = 1;
  for (float& t : p.temperature) t *= 4;
  p.wanted = r.below(2) ? 31 : 1 + static_cast<int>(r.below(31));
  if (p.codes_only) p.wanted &= ~(1 << kX);
  if (leaf) use_leaves(p);
  fill_back(r, p);
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
  p.params.missing = Missing::token;
  fill(r, p, 5);
  p.x[5] = NAN;
  p.v[test::size(70 * p.values + 71)] = p.x[test::size(70 * p.width)] = INFINITY;
  if (normalize == Normalize::history) return p;
  test::shuffle_items(r, p);
  p.v_ids = test::shuffle_rows(r, p, p.values, &p.v);
  return p;
}

Problem wide_problem() {
  Random r(2);
  Problem p;
  p.starts = {0, 40};
  p.ends = {40, 75};
  p.rows = 75;
  p.agents = 9;
  p.width = 520;
  p.values = 256;
  p.params.normalize = Normalize::agents;
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
  test::add_codes(3, p);
  return p;
}

/// verb(held, params, forward, gradients); every array of its exact size, of hostile bits where it is written.
template <class Verb>
Result run(const Problem& p, bool clamp, Verb verb) {
  test::Held held(p, clamp);
  test::Guarded<std::byte> d_tokens(test::encoded(p.d_tokens, p.v_type)), tokens(test::encoded(p.tokens, p.v_type));
  const int64_t b = users(p), m = token_rows(p), taus = static_cast<int64_t>(p.temperature.size());
  RouteParams params = p.params;
  params.temperature = {p.temperature.data(), {taus}};
  RouteForward forward{{d_tokens.data(), p.v_type, b * m, p.values},
                       {},
                       {tokens.data(), p.v_type, b * m, p.values},
                       {p.lse.data(), {b, m}}};
  if (!p.d_lse.empty()) forward.d_lse = {p.d_lse.data(), {b, m}};
  const auto size = [&](int k, int64_t n) { return p.wanted >> k & 1 ? n : 0; };
  test::Guarded<float> gradient[] = {
      test::Guarded<float>(size(kV, p.rows * p.values)), test::Guarded<float>(size(kTemperature, taus)),
      test::Guarded<float>(size(kBias, p.rows)), test::Guarded<float>(size(kX, p.rows * p.width)),
      test::Guarded<float>(size(kPrototypes, b * p.agents * p.width))};
  RouteGradients out;
  if (p.wanted & 1 << kV) out.v = {gradient[kV].data(), {p.rows, p.values}};
  if (p.wanted & 1 << kTemperature) out.temperature = {gradient[kTemperature].data(), {taus}};
  if (p.wanted & 1 << kBias) out.bias = {gradient[kBias].data(), {p.rows}};
  if (p.wanted & 1 << kX) out.x = {gradient[kX].data(), {p.rows, p.width}};
  if (p.wanted & 1 << kPrototypes) out.prototypes = {gradient[kPrototypes].data(), {b, p.agents, p.width}};
  const Status status = verb(held, params, forward, out);
  if (!status.ok()) test::fail("%s", status.what());
  Result result;
  for (int k = 0; k < kGradients; ++k) {
    if (!gradient[k].intact()) test::fail("d_%s's end was overwritten", kNames[k]);
    result.gradient[k] = gradient[k].values();
  }
  return result;
}

/// The forward's tokens and lse, of the CPU.
void go_forward(Problem& p) {
  const test::Result out = test::on_cpu(p);
  p.tokens = out.tokens;
  p.lse = out.lse;
}

Result on_cpu(const Problem& p) {
  return run(p, true,
             [](const test::Held& h, const RouteParams& params, const RouteForward& f, const RouteGradients& out) {
               test::Workspace workspace(
                   route_backward_workspace(test::sizing(1), h.book, params, h.in, h.agents, out, h.in.behaviours()));
               return hisac::route_backward({workspace.array(), nullptr}, h.book, params, h.in, h.agents, f, out);
             });
}

Result on_cuda(const Problem& p) {
  return run(p, false,
             [&](const test::Held& h, const RouteParams& params, const RouteForward& f, const RouteGradients& out) {
               test::Workspace workspace(
                   cuda::route_backward_workspace({}, h.book, params, h.in, h.agents, out, test::longest(p)));
               test::Workspace image(test::image_size(p));
               const Context context = test::context_of(p, workspace, image);
               const Status status = cuda::route_backward(context, h.book, params, h.in, h.agents, f, out);
               if (!workspace.intact()) test::fail("the workspace's end was overwritten");
               return status;
             });
}

Problem copied(const Problem& p) {
  Problem q = p;
  static_cast<test::Problem&>(q) = test::copied(p);
  return q;
}

double norm_of(const float* p, int64_t n) {
  double sum = 0;
  for (int64_t d = 0; d < n; ++d) sum += double(p[d]) * p[d];
  return sum;
}

/// What a user's agents meet: a present behaviour, or those of a leaf as one.
struct Row {
  std::vector<double> x, v;                         // v: the largest moduli
  double bias = 0, spread = 0;                      // with the leaf's own
  double norm = 0, most_spread = 0;                 // the largest |x| and spread
  std::vector<std::pair<int64_t, double>> weights;  // of behaviours
};

/// A user's rows, and its absent behaviours that have a v, of a problem whose rows are where their behaviours are.
std::vector<Row> rows_of(const Problem& p, int64_t user, std::vector<int64_t>* absent) {
  std::map<std::vector<int32_t>, std::vector<int64_t>> groups;
  const auto element = [](const std::vector<float>& a, int64_t i) {
    return a.empty() ? 0.0 : double(a[test::size(i)]);
  };
  const auto x_norm = [&](int64_t i) { return norm_of(&p.x[test::size(i * p.width)], p.width); };
  const int64_t levels = p.codes.empty() ? 0 : p.book->levels();
  for (int64_t i = p.starts[test::size(user)]; i < std::min(p.rows, p.ends[test::size(user)]); ++i) {
    const double spread = element(p.spread, i);
    bool here = x_norm(i) < 0x1p100 && std::isfinite(element(p.bias, i)) && spread >= 0 && std::isfinite(spread),
         whole = true;
    std::vector<int32_t> codes(p.codes.begin() + i * levels, p.codes.begin() + (i + 1) * levels);
    for (int l = 0; l < levels; ++l) here = here && codes[test::size(l)] >= 0 && codes[test::size(l)] < p.book->size(l);
    for (int64_t c = 0; c < p.values; ++c) whole = whole && std::isfinite(p.v[test::size(i * p.values + c)]);
    if (p.params.method == Method::exact) codes = {static_cast<int32_t>(i)};
    if (here)
      groups[codes].push_back(i);
    else if (whole && p.params.missing == Missing::token)
      absent->push_back(i);
  }
  std::vector<Row> rows;
  for (const auto& group : groups) {
    Row row;
    row.x.resize(test::size(p.width));
    row.v.resize(test::size(p.values));
    double max_logit = -HUGE_VAL, mass = 0, squares = 0, square = 0;
    for (const int64_t i : group.second) max_logit = std::max(max_logit, element(p.bias, i));
    for (const int64_t i : group.second) mass += std::exp(element(p.bias, i) - max_logit);
    for (const int64_t i : group.second) {
      const double share = std::exp(element(p.bias, i) - max_logit) / mass;
      row.weights.push_back({i, share});
      for (int64_t d = 0; d < p.width; ++d) row.x[test::size(d)] += share * element(p.x, i * p.width + d);
      for (int64_t c = 0; c < p.values; ++c) {
        const double y = std::fabs(element(p.v, i * p.values + c));
        if (!(y <= row.v[test::size(c)])) row.v[test::size(c)] = y;
      }
      squares += share * (x_norm(i) + element(p.spread, i));
      row.norm = std::max(row.norm, std::sqrt(x_norm(i)));
      row.most_spread = std::max(row.most_spread, element(p.spread, i));
    }
    for (const double x : row.x) square += x * x;
    row.bias = max_logit + std::log(mass);
    row.spread = squares - square;
    rows.push_back(row);
  }
  return rows;
}

/// The moduli of every gradient's terms, by the definition in float64, and the share of them that may be wrong: split
/// or rounded operands and float32 norms in a logit of at most `reach`, float32 sums, and those of leaves.
struct Terms {
  std::vector<double> gradient[kGradients];
  double share = 0;
};

Terms terms_of(const Problem& p) {
  Terms t;
  const int64_t b = users(p), m = token_rows(p), taus = static_cast<int64_t>(p.temperature.size());
  const int64_t sizes[] = {p.rows * p.values, taus, p.rows, p.rows * p.width, b * p.agents * p.width};
  for (int k = 0; k < kGradients; ++k) t.gradient[k].assign(test::size(sizes[k]), 0);
  const auto element = [](const std::vector<float>& a, int64_t i) { return double(a[test::size(i)]); };
  double reach = 0, largest = 1;
  for (int64_t u = 0; u < b; ++u) {
    const int64_t count = p.count.empty() ? p.agents : std::min<int64_t>(p.count[test::size(u)], p.agents);
    std::vector<int64_t> agents, absent;
    for (int64_t a = 0; a < count; ++a)
      if (p.temperature[taus == 1 ? 0 : test::size(a)] > 0) agents.push_back(a);
    std::vector<double> size(agents.size());  // of dlse - dtoken . token
    for (size_t j = 0; j < agents.size(); ++j) {
      const int64_t token = u * m + agents[j];
      size[j] = p.d_lse.empty() ? 0 : std::fabs(element(p.d_lse, token));
      for (int64_t c = 0; c < p.values; ++c)
        size[j] += std::fabs(element(p.d_tokens, token * p.values + c) * element(p.tokens, token * p.values + c));
    }
    for (const Row& row : rows_of(p, u, &absent)) {
      std::vector<double> z(agents.size()), dz(agents.size()), far(agents.size());
      double max_logit = -HUGE_VAL, total = 0, sum = 0;
      for (size_t j = 0; j < agents.size(); ++j) {
        const float* const q = &p.prototypes[test::size((u * p.agents + agents[j]) * p.width)];
        double d = row.spread;
        for (int64_t k = 0; k < p.width; ++k) d += std::pow(row.x[test::size(k)] - double(q[k]), 2);
        const double tau = p.temperature[taus == 1 ? 0 : test::size(agents[j])];
        far[j] = std::pow(row.norm + std::sqrt(norm_of(q, p.width)), 2) + row.most_spread;
        z[j] = -d / tau;
        reach = std::max(reach, far[j] / tau);
        max_logit = std::max(max_logit, z[j]);
      }
      for (const double y : z) total += std::exp(y - max_logit);
      const bool softmax_over_agents = p.params.normalize == Normalize::agents;
      const double lse = softmax_over_agents ? max_logit + std::log(total) : 0;
      for (size_t j = 0; j < agents.size(); ++j) {
        const int64_t token = u * m + agents[j];
        largest = std::max(largest, std::fabs(row.bias) + std::fabs(element(p.lse, token)));
        const double w = std::exp(z[j] - lse + row.bias - element(p.lse, token));
        dz[j] = size[j];
        for (int64_t c = 0; c < p.values; ++c) {
          const double d = std::fabs(element(p.d_tokens, token * p.values + c));
          for (const auto& [i, share] : row.weights) t.gradient[kV][test::size(i * p.values + c)] += share * w * d;
          dz[j] += d * row.v[test::size(c)];
        }
        sum += dz[j] *= w;
      }
      const int64_t i = row.weights[0].first;  // of what leaves have no gradients of
      t.gradient[kBias][test::size(i)] += sum;
      for (size_t j = 0; j < agents.size(); ++j) {
        if (softmax_over_agents) dz[j] += std::exp(z[j] - lse) * sum;
        const size_t tau_at = taus == 1 ? 0 : test::size(agents[j]);
        const double tau = p.temperature[tau_at], slope = 2 * dz[j] / tau;
        t.gradient[kTemperature][tau_at] += dz[j] * far[j] / (tau * tau);
        for (int64_t k = 0; k < p.width; ++k) {
          const size_t of_x = test::size(i * p.width + k), of_p = test::size((u * p.agents + agents[j]) * p.width + k);
          const double term = slope * (std::fabs(double(p.x[of_x])) + std::fabs(double(p.prototypes[of_p])));
          t.gradient[kX][of_x] += term;
          t.gradient[kPrototypes][of_p] += term;
        }
      }
    }
    for (const int64_t i : absent)
      for (int64_t c = 0; c < p.values; ++c)
        t.gradient[kV][test::size(i * p.values + c)] +=
            std::fabs(element(p.d_tokens, (u * m + p.agents) * p.values + c)) /
            std::exp(element(p.lse, u * m + p.agents));
  }
  const double part = p.params.precision == Precision::bfloat16 ? 0x1p-8 : 0x1p-16;
  const double leaves = p.params.method == Method::leaf ? test::kSkew : 0;
  const double e =
      reach * (2 * part + 8 * leaves + double(p.width) * 0x1p-22) + leaves + (reach + largest + 8) * 0x1p-21;
  t.share = std::expm1((p.params.normalize == Normalize::agents ? 4 : 2) * e) + 4 * part +
            double(p.rows + p.agents + p.values + p.width + 64) * 0x1p-22;
  return t;
}

void compare(const Problem& p, const Result& cpu, const Result& cuda) {
  const Terms terms = terms_of(copied(p));
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
  test::check_bits(p, first, [](const Problem& q) { return on_cuda(q); });
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
  p.wanted = 31 & ~(1 << kTemperature);
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
      const int64_t of_row[] = {p.values, 0, 1, p.width, p.agents * p.width};
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
      for (const Normalize n : {Normalize::history, Normalize::agents}) check(several_tiles(n));
    else if (seed == 8)
      check(wide_problem());
    else if (seed == 9)
      for (const Method method : {Method::exact, Method::leaf}) {
        Problem p = many_users();
        if (method == Method::leaf) use_leaves(p);
        check(p);
      }
    else if (seed == 16)
      for (const Normalize n : {Normalize::history, Normalize::agents}) check_spoilt(n);
    else
      check(random_problem(seed));
  }
  return test::done();
}
