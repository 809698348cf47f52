// SPDX-License-Identifier: Apache-2.0
// `route_backward` of cuda/route_backward.cu, run by the emulator, beside the CPU's: every gradient within a share of
// the sum of its terms' moduli, the same bits for any order of threads and any machine, and no user spoilt by another.
#include "simt_test.h"

namespace {

using namespace hisac;
using test::Random;

enum { kV, kTemperature, kBias, kX, kPrototypes, kGradients };
const char* const kNames[] = {"v", "temperature", "bias", "x", "prototypes"};

struct Problem {
  std::vector<int64_t> starts, ends;
  int64_t rows = 0, agents = 0, width = 0, values = 0;
  DType x_type = DType::float32, v_type = DType::float32;
  RouteParams params;
  std::vector<float> x, v, prototypes, bias, temperature, d_tokens, d_lse, tokens, lse;
  std::vector<int32_t> count, codes;
  Codebook book;
  bool narrow = false;  // int32 offsets
  int wanted = 31;      // gradients, a bit each
};

using Gradients = std::vector<float>[kGradients];
struct Result {
  Gradients of;
  bool operator==(const Result& o) const {
    for (int k = 0; k < kGradients; ++k)
      if (of[k].size() != o.of[k].size() ||
          (!of[k].empty() && std::memcmp(of[k].data(), o.of[k].data(), of[k].size() * 4) != 0))
        return false;
    return true;
  }
};

int64_t users(const Problem& p) { return static_cast<int64_t>(p.starts.size()); }
int64_t token_rows(const Problem& p) { return p.agents + (p.params.missing == Missing::token); }

/// Everything but the histories' offsets and the sizes.
void fill(Random& r, Problem& p, float tau) {
  const int64_t b = users(p), tokens = b * token_rows(p);
  p.x = test::rounded(test::uniform(r, p.rows * p.width), p.x_type);
  p.v = test::rounded(test::uniform(r, p.rows * p.values), p.v_type);
  p.prototypes = test::uniform(r, b * p.agents * p.width);
  p.d_tokens = test::rounded(test::uniform(r, tokens * p.values), p.v_type);
  if (r.below(4)) p.d_lse = test::uniform(r, tokens);
  if (p.temperature.empty()) p.temperature = {tau};
  for (float& t : p.temperature) t = tau * (1 + 0.5f * r.uniform());
}

Problem random_problem(uint64_t seed) {
  Random r(seed + 1000);
  Problem p;
  const int64_t kind = r.below(8);
  const int64_t b = kind == 0 ? 1 : 1 + r.below(5);
  const int64_t longest = kind == 0 ? 1500 : kind < 4 ? 200 : 70;
  for (int64_t i = 0; i < b; ++i) {
    const int64_t n = r.below(4) == 0 ? 0 : 1 + r.below(longest);
    p.starts.push_back(p.rows);
    p.rows += n;
    p.ends.push_back(p.rows);
  }
  const int64_t manner = r.below(4);  // of histories that overlap, and offsets that lie outside; rows of nobody
  for (int64_t i = 0; i < b && manner == 0; ++i) {
    p.starts[test::size(i)] = r.below(p.rows + 1);
    p.ends[test::size(i)] = r.below(8) == 0 ? p.rows + 5 : r.below(p.rows + 1);
  }
  if (manner == 1) p.rows += 150;
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
  p.narrow = r.below(2);
  p.wanted = r.below(2) ? 31 : 1 + static_cast<int>(r.below(31));
  if (r.below(2)) p.temperature.resize(test::size(p.agents));
  fill(r, p, 0.2f * static_cast<float>(p.width));
  if (r.below(3) == 0)
    p.temperature[test::size(r.below(static_cast<int64_t>(p.temperature.size())))] = r.below(2) ? NAN : 0;
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
  for (int64_t i = 0; i < p.rows; ++i)  // rows to be selected away
    if (r.below(11) == 0) {
      if (r.below(3) == 0) p.v[test::size(i * p.values + r.below(p.values))] = r.below(2) ? NAN : -INFINITY;
      p.x[test::size(i * p.width + r.below(p.width))] = p.x_type == DType::float16 ? NAN
                                                        : r.below(2)               ? INFINITY
                                                                                   : 2e15f;
    }
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
  for (int64_t i = 0; i < 150; ++i) {
    p.starts.push_back(r.below(p.rows));
    p.ends.push_back(std::min(p.rows, p.starts.back() + (i / 32 == 1 ? 0 : r.below(4))));  // a warp without any
  }
  p.agents = 3;
  p.width = p.values = 8;
  fill(r, p, 4);
  return p;
}

/// verb(params, inputs, forward, gradients); every array of its exact size, of hostile bits where it is written.
template <class Verb>
Result run(const Problem& p, bool clamp, Verb verb) {
  test::Guarded<std::byte> x(test::encoded(p.x, p.x_type)), v(test::encoded(p.v, p.v_type)),
      d_tokens(test::encoded(p.d_tokens, p.v_type)), tokens(test::encoded(p.tokens, p.v_type));
  std::vector<int64_t> starts = p.starts, ends = p.ends;
  for (size_t i = 0; clamp && i < starts.size(); ++i) ends[i] = std::min(std::max(starts[i], ends[i]), p.rows);
  test::Guarded<int64_t> wide_starts(starts), wide_ends(ends);
  test::Guarded<int32_t> narrow_starts(std::vector<int32_t>(starts.begin(), starts.end())),
      narrow_ends(std::vector<int32_t>(ends.begin(), ends.end()));
  const int64_t b = users(p), m = token_rows(p), taus = static_cast<int64_t>(p.temperature.size());
  RouteParams params = p.params;
  params.temperature = {p.temperature.data(), {taus}};
  RouteInputs in;
  in.x = {x.data(), p.x_type, p.rows, p.width};
  in.v = {v.data(), p.v_type, p.rows, p.values};
  in.histories = {p.narrow ? static_cast<void*>(narrow_starts.data()) : wide_starts.data(),
                  p.narrow ? static_cast<void*>(narrow_ends.data()) : wide_ends.data(),
                  p.narrow ? DType::int32 : DType::int64, b};
  in.prototypes = {p.prototypes.data(), {b, p.agents, p.width}};
  if (!p.count.empty()) in.count = {p.count.data(), {b}};
  if (!p.bias.empty()) in.bias = {p.bias.data(), {p.rows}};
  if (!p.codes.empty()) {
    in.codes = {p.codes.data(), {p.rows, 2}};
    in.book = &p.book;
  }
  RouteForward forward{{d_tokens.data(), p.v_type, b * m, p.values},
                       {},
                       {tokens.data(), p.v_type, b * m, p.values},
                       {p.lse.data(), {b, m}}};
  if (!p.d_lse.empty()) forward.d_lse = {p.d_lse.data(), {b, m}};
  const auto size = [&](int k, int64_t n) { return p.wanted >> k & 1 ? n : 0; };
  test::Guarded<float> of[] = {
      test::Guarded<float>(size(kV, p.rows * p.values)), test::Guarded<float>(size(kTemperature, taus)),
      test::Guarded<float>(size(kBias, p.rows)), test::Guarded<float>(size(kX, p.rows * p.width)),
      test::Guarded<float>(size(kPrototypes, b * p.agents * p.width))};
  RouteGradients out;
  if (p.wanted & 1 << kV) out.v = {of[kV].data(), {p.rows, p.values}};
  if (p.wanted & 1 << kTemperature) out.temperature = {of[kTemperature].data(), {taus}};
  if (p.wanted & 1 << kBias) out.bias = {of[kBias].data(), {p.rows}};
  if (p.wanted & 1 << kX) out.x = {of[kX].data(), {p.rows, p.width}};
  if (p.wanted & 1 << kPrototypes) out.prototypes = {of[kPrototypes].data(), {b, p.agents, p.width}};
  const Status status = verb(params, in, forward, out);
  if (!status.ok()) test::fail("%s", status.what());
  Result result;
  for (int k = 0; k < kGradients; ++k) {
    if (!of[k].intact()) test::fail("d_%s's end was overwritten", kNames[k]);
    result.of[k] = of[k].values();
  }
  return result;
}

/// The forward's tokens and lse, of the CPU.
void go_forward(Problem& p) {
  const int64_t b = users(p), m = token_rows(p);
  p.tokens.assign(test::size(b * m * p.values), 0);
  p.lse.assign(test::size(b * m), 0);
  test::Guarded<std::byte> tokens(test::encoded(p.tokens, p.v_type));
  std::vector<float> lse(p.lse);
  run(p, true, [&](const RouteParams& params, const RouteInputs& in, const RouteForward&, const RouteGradients&) {
    test::Workspace workspace(route_workspace(params, in, in.v.rows, 1));
    return hisac::route({workspace.array(), nullptr}, params, in,
                        {{tokens.data(), p.v_type, b * m, p.values}, {lse.data(), {b, m}}, {}});
  });
  p.lse = lse;
  p.tokens = test::decoded(tokens.values(), p.v_type);
}

Result on_cpu(const Problem& p) {
  return run(p, true,
             [](const RouteParams& params, const RouteInputs& in, const RouteForward& f, const RouteGradients& out) {
               test::Workspace workspace(route_backward_workspace(params, in, out, in.v.rows, 1));
               return hisac::route_backward({workspace.array(), nullptr}, params, in, f, out);
             });
}

Result on_cuda(const Problem& p) {
  return run(p, false,
             [](const RouteParams& params, const RouteInputs& in, const RouteForward& f, const RouteGradients& out) {
               test::Workspace workspace(cuda::route_backward_workspace(params, in, out, in.v.rows));
               const Status status = cuda::route_backward({workspace.array()}, params, in, f, out);
               if (!workspace.intact()) test::fail("the workspace's end was overwritten");
               return status;
             });
}

double norm_of(const float* p, int64_t n) {
  double sum = 0;
  for (int64_t d = 0; d < n; ++d) sum += double(p[d]) * p[d];
  return sum;
}

/// The moduli of every gradient's terms, by the definition in float64, and the share of them that may be wrong: split
/// or rounded operands and float32 norms in a logit of at most `reach`, and float32 sums.
struct Terms {
  std::vector<double> of[kGradients];
  double share = 0;
};

Terms terms_of(const Problem& p) {
  Terms t;
  const int64_t b = users(p), m = token_rows(p), taus = static_cast<int64_t>(p.temperature.size());
  const int64_t sizes[] = {p.rows * p.values, taus, p.rows, p.rows * p.width, b * p.agents * p.width};
  for (int k = 0; k < kGradients; ++k) t.of[k].assign(test::size(sizes[k]), 0);
  const auto at = [](const std::vector<float>& a, int64_t i) { return double(a[test::size(i)]); };
  double reach = 0, largest = 1;
  for (int64_t u = 0; u < b; ++u) {
    const int64_t count = p.count.empty() ? p.agents : std::min<int64_t>(p.count[test::size(u)], p.agents);
    const int64_t start = p.starts[test::size(u)], end = std::min(p.rows, p.ends[test::size(u)]);
    std::vector<int64_t> agents;
    for (int64_t a = 0; a < count; ++a)
      if (p.temperature[taus == 1 ? 0 : test::size(a)] > 0) agents.push_back(a);
    std::vector<double> size(agents.size());  // of dlse - dtoken . token
    for (size_t j = 0; j < agents.size(); ++j) {
      const int64_t token = u * m + agents[j];
      size[j] = p.d_lse.empty() ? 0 : std::fabs(at(p.d_lse, token));
      for (int64_t c = 0; c < p.values; ++c)
        size[j] += std::fabs(at(p.d_tokens, token * p.values + c) * at(p.tokens, token * p.values + c));
    }
    for (int64_t i = start; i < end; ++i) {
      const double squares = norm_of(&p.x[test::size(i * p.width)], p.width), bias = p.bias.empty() ? 0 : at(p.bias, i);
      bool here = squares < 0x1p100 && std::isfinite(bias), whole = true;
      for (int64_t l = 0; l < 2 && !p.codes.empty(); ++l) {
        const int32_t code = p.codes[test::size(i * 2 + l)];
        here = here && code >= 0 && code < (l ? 5 : 7);
      }
      for (int64_t c = 0; c < p.values; ++c) whole = whole && std::isfinite(p.v[test::size(i * p.values + c)]);
      if (!here) {
        for (int64_t c = 0; c < p.values && whole && p.params.missing == Missing::token; ++c)
          t.of[kV][test::size(i * p.values + c)] +=
              std::fabs(at(p.d_tokens, (u * m + p.agents) * p.values + c)) / std::exp(at(p.lse, u * m + p.agents));
        continue;
      }
      std::vector<double> z(agents.size()), dz(agents.size()), far(agents.size());
      double top = -HUGE_VAL, total = 0, sum = 0;
      for (size_t j = 0; j < agents.size(); ++j) {
        const float* const q = &p.prototypes[test::size((u * p.agents + agents[j]) * p.width)];
        double d = 0;
        for (int64_t k = 0; k < p.width; ++k) {
          const double away = at(p.x, i * p.width + k) - double(q[k]);
          d += away * away;
        }
        const double tau = p.temperature[taus == 1 ? 0 : test::size(agents[j])];
        far[j] = std::pow(std::sqrt(squares) + std::sqrt(norm_of(q, p.width)), 2);
        z[j] = -d / tau;
        reach = std::max(reach, far[j] / tau);
        top = std::max(top, z[j]);
      }
      for (const double y : z) total += std::exp(y - top);
      const bool shares = p.params.normalize == Normalize::agents;
      const double lse = shares ? top + std::log(total) : 0;
      for (size_t j = 0; j < agents.size(); ++j) {
        const int64_t token = u * m + agents[j];
        largest = std::max(largest, std::fabs(bias) + std::fabs(at(p.lse, token)));
        const double w = std::exp(z[j] - lse + bias - at(p.lse, token));
        dz[j] = size[j];
        for (int64_t c = 0; c < p.values; ++c) {
          const double d = std::fabs(at(p.d_tokens, token * p.values + c));
          t.of[kV][test::size(i * p.values + c)] += w * d;
          dz[j] += d * std::fabs(at(p.v, i * p.values + c));
        }
        sum += dz[j] *= w;
      }
      t.of[kBias][test::size(i)] += sum;
      for (size_t j = 0; j < agents.size(); ++j) {
        if (shares) dz[j] += std::exp(z[j] - lse) * sum;
        const size_t tau_at = taus == 1 ? 0 : test::size(agents[j]);
        const double tau = p.temperature[tau_at], slope = 2 * dz[j] / tau;
        t.of[kTemperature][tau_at] += dz[j] * far[j] / (tau * tau);
        for (int64_t k = 0; k < p.width; ++k) {
          const size_t of_x = test::size(i * p.width + k), of_p = test::size((u * p.agents + agents[j]) * p.width + k);
          const double term = slope * (std::fabs(double(p.x[of_x])) + std::fabs(double(p.prototypes[of_p])));
          t.of[kX][of_x] += term;
          t.of[kPrototypes][of_p] += term;
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

void compare(const Problem& p, const Result& cpu, const Result& cuda) {
  const Terms terms = terms_of(p);
  for (int k = 0; k < kGradients; ++k)
    for (size_t i = 0; i < cpu.of[k].size(); ++i) {
      const double expected = cpu.of[k][i], got = cuda.of[k][i], bound = terms.share * terms.of[k][i] + 1e-36;
      if (!(std::fabs(expected - got) <= bound))
        test::fail("d_%s %zu: %g, expected %g within %g", kNames[k], i, got, expected, bound);
      if (terms.of[k][i] == 0 && got != 0) test::fail("d_%s %zu: %g, expected nothing", kNames[k], i, got);
    }
}

void check(Problem&& p) {
  go_forward(p);
  const Result first = on_cuda(p);
  compare(p, on_cpu(p), first);
  const simt::Options kept = simt::options;
  simt::options.order = simt::Order::random;
  simt::options.seed += 17;
  simt::options.machine.processors = 5;  // other cuts of the histories
  if (!(on_cuda(p) == first)) test::fail("other bits for another order of threads and number of processors");
  simt::options = kept;
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
      for (size_t i = 0; i < got.of[k].size(); ++i) {
        const int64_t at = static_cast<int64_t>(i) / of_row[k];
        const bool own = k == kPrototypes ? at == 1 : at >= 30 && at < 75;
        if (!own && std::memcmp(&got.of[k][i], &sound.of[k][i], 4) != 0)
          test::fail("spoilt by %d: d_%s %zu is %g", what, kNames[k], i, double(got.of[k][i]));
        if (what == 3 && !std::isfinite(got.of[k][i])) test::fail("an absent agent: d_%s %zu", kNames[k], i);
      }
    }
    bool spoilt = false;
    for (const float y : got.of[kPrototypes]) spoilt |= !std::isfinite(y);
    if (what != 3 && !spoilt) test::fail("spoilt by %d: nothing came of it", what);
  }
}

}  // namespace

int main(int argc, char** argv) {
  test::options(argc, argv);
  for (uint64_t seed = test::first; seed < test::last; ++seed) {
    test::name("route_backward %llu", static_cast<unsigned long long>(seed));
    const size_t sizes[] = {size_t{99} << 10, size_t{163} << 10, size_t{227} << 10};
    simt::options.machine = {seed ? 2 : 1, seed ? sizes[seed % 3] : size_t{80} << 10};
    if (seed == 0)
      for (const Normalize n : {Normalize::history, Normalize::agents}) check(several_tiles(n));
    else if (seed == 8)
      check(wide_problem());
    else if (seed == 9)
      check(many_users());
    else if (seed == 16)
      for (const Normalize n : {Normalize::history, Normalize::agents}) check_spoilt(n);
    else
      check(random_problem(seed));
  }
  return test::done();
}
