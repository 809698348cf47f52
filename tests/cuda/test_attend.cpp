// SPDX-License-Identifier: Apache-2.0
// `attend` and its backward of cuda/attend.cu, run by the emulator, beside the CPU's: every cell within the bound of
// split products; what is not finite spoils its own candidate, or its own user's head, only; everything bit-identical
// for any order of threads and any machine.
#include "simt_test.h"

namespace {

using namespace hisac;
using test::Random;

struct Problem {
  std::vector<int64_t> starts, ends;              // as given to CUDA
  std::vector<int64_t> clean_starts, clean_ends;  // as they count: in order, inside
  int64_t candidates = 0, tokens = 0, heads = 0, width = 0, values = 0;
  DType type = DType::float32;
  float scale = 1;
  std::vector<float> q, k, v, bias, d_out, d_lse;
  int64_t no_mass = -1;                           // a candidate's head whose lse the backward is told is -inf
  bool narrow = false;                            // int32 offsets
  bool d_bias = true;                             // wanted
  std::vector<int64_t> token_starts, token_ends;  // of tokens that differ in number
  int64_t users() const { return static_cast<int64_t>(starts.size()); }
  bool ragged() const { return !token_starts.empty(); }
  int64_t token_rows() const { return ragged() ? static_cast<int64_t>(k.size()) / (heads * width) : users() * tokens; }
  int64_t token(int64_t b, int64_t m, int64_t h) const { return (b * tokens + m) * heads + h; }
};

struct Result {
  std::vector<float> out, lse, d_q, d_k, d_v, d_bias;
  bool operator==(const Result& o) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * 4) == 0);
    };
    return same(out, o.out) && same(lse, o.lse) && same(d_q, o.d_q) && same(d_k, o.d_k) && same(d_v, o.d_v) &&
           same(d_bias, o.d_bias);
  }
};

void fill(Problem& p, Random& r) {
  const int64_t rows = p.users() * p.tokens * p.heads;
  p.q = test::rounded(test::uniform(r, p.candidates * p.heads * p.width), p.type);
  p.k = test::rounded(test::uniform(r, rows * p.width), p.type);
  p.v = test::rounded(test::uniform(r, rows * p.values), p.type);
  p.d_out = test::rounded(test::uniform(r, p.candidates * p.heads * p.values), p.type);
  p.scale = 6 / std::sqrt(static_cast<float>(p.width));
  int64_t ended = 0;
  for (size_t b = 0; b < p.starts.size(); ++b) {
    const auto clamp = [&](int64_t x) { return std::min(std::max<int64_t>(x, 0), p.candidates); };
    const int64_t end = std::max(clamp(p.starts[b]), clamp(p.ends[b]));
    p.clean_starts.push_back(std::max(clamp(p.starts[b]), ended));
    ended = std::max(end, ended);
    p.clean_ends.push_back(ended);
  }
}

Problem random_problem(uint64_t seed) {
  Random r(seed);
  Problem p;
  const int64_t b = r.below(9) ? 1 + r.below(5) : 0, many = r.below(b + 1);
  for (int64_t i = 0; i < b; ++i) {
    p.candidates += r.below(4) ? 0 : r.below(20);  // nobody's
    p.starts.push_back(p.candidates);
    p.candidates += i == many ? r.below(200) : r.below(4);
    p.ends.push_back(p.candidates);
  }
  p.candidates += r.below(2) ? 0 : r.below(90);
  if (b && r.below(4) == 0) {  // offsets in no order, and outside
    for (int64_t i = 0; i < b; ++i) p.starts[test::size(r.below(b))] = r.below(p.candidates + 9) - 4;
    p.ends[test::size(r.below(b))] = r.below(2) ? -7 : p.candidates + 100;
  }
  const int64_t tokens[] = {0, 1, 5, 16, 33, 64, 70}, wide[] = {1, 7, 16, 24, 40, 64, 72, 136};
  p.tokens = tokens[r.below(7)];
  p.heads = 1 + r.below(3);
  p.width = wide[r.below(8)];
  p.values = wide[r.below(8)];
  const DType types[] = {DType::float32, DType::bfloat16, DType::float16};
  p.type = types[r.below(3)];
  p.narrow = r.below(2);
  p.d_bias = r.below(4);
  fill(p, r);
  if (r.below(3)) {
    p.bias = test::uniform(r, b * p.tokens, 3);
    for (float& y : p.bias)
      if (r.below(6) == 0) y = r.below(2) ? NAN : r.below(2) ? INFINITY : -INFINITY;
    const int64_t none = r.below(3 * b + 1);  // a user without tokens
    for (int64_t m = 0; none < b && m < p.tokens; ++m) p.bias[test::size(none * p.tokens + m)] = -INFINITY;
  }
  if (r.below(2)) p.d_lse = test::uniform(r, p.candidates * p.heads);
  if (p.candidates && r.below(4) == 0) p.no_mass = r.below(p.candidates * p.heads);
  const float odd[] = {NAN, INFINITY, -INFINITY, p.type == DType::float16 ? 6e4f : 3.4e38f, 1e-40f};
  for (int i = 0; i < 3 && r.below(2); ++i) {  // whatever a value is
    std::vector<float>* const arrays[] = {&p.q, &p.k, &p.v, &p.d_out};
    std::vector<float>& a = *arrays[r.below(4)];
    if (!a.empty()) a[test::size(r.below(static_cast<int64_t>(a.size())))] = odd[r.below(5)];
  }
  for (size_t i = 0; i < p.bias.size(); ++i)  // absent tokens may hold anything
    for (int64_t h = 0; !std::isfinite(p.bias[i]) && h < p.heads; ++h) {
      const int64_t row = static_cast<int64_t>(i) * p.heads + h;
      if (r.below(3) == 0) p.k[test::size(row * p.width + r.below(p.width))] = odd[r.below(4)];
      if (r.below(3) == 0) p.v[test::size(row * p.values + r.below(p.values))] = odd[r.below(4)];
    }
  for (std::vector<float>* a : {&p.q, &p.k, &p.v, &p.d_out}) *a = test::rounded(*a, p.type);
  return p;
}

/// Wide rows in several chunks, several tiles and spans; then a user of numbers near the largest, whose outputs are
/// finite all the same, and one whose only candidate is NaN.
Problem large() {
  Random r(1);
  Problem p;
  p.starts = {0, 70, 71};
  p.ends = {70, 71, 72};
  p.candidates = 75;
  p.tokens = 70;
  p.heads = 1;
  p.width = 140;
  p.values = 136;
  fill(p, r);
  p.bias = test::uniform(r, 3 * p.tokens);
  for (int64_t m = 0; m < p.tokens; ++m) p.v[test::size(p.token(1, m, 0) * p.values)] = 3.4e38f;
  p.q[test::size(71 * p.width + 139)] = NAN;
  p.no_mass = 3;
  return p;
}

/// verb(inputs, forward, gradients), every array of its exact size.
template <class Forward, class Backward>
Result run(const Problem& p, bool clean, const Result* first, Forward attend, Backward backward) {
  test::Guarded<std::byte> q(test::encoded(p.q, p.type)), k(test::encoded(p.k, p.type)), v(test::encoded(p.v, p.type)),
      d_out(test::encoded(p.d_out, p.type));
  const std::vector<int64_t>&starts = clean ? p.clean_starts : p.starts, &ends = clean ? p.clean_ends : p.ends;
  test::Guarded<int64_t> wide_starts(starts), wide_ends(ends);
  test::Guarded<int32_t> narrow_starts(std::vector<int32_t>(starts.begin(), starts.end())),
      narrow_ends(std::vector<int32_t>(ends.begin(), ends.end()));
  test::Guarded<float> bias(p.bias), d_lse(p.d_lse);
  const int64_t n = p.candidates, h = p.heads, b = p.users(), rows = p.token_rows() * h;
  const int64_t groups = p.ragged() ? 1 : b, each = p.ragged() ? p.token_rows() : p.tokens;
  test::Guarded<int64_t> token_starts(p.token_starts), token_ends(p.token_ends);
  AttendInputs in;
  in.q = {q.data(), p.type, n * h, p.width};
  in.keys = {k.data(), p.type, rows, p.width};
  in.values = {v.data(), p.type, rows, p.values};
  in.agents = p.tokens;
  in.heads = h;
  in.candidates = {p.narrow ? (void*)narrow_starts.data() : (void*)wide_starts.data(),
                   p.narrow ? (void*)narrow_ends.data() : (void*)wide_ends.data(),
                   p.narrow ? DType::int32 : DType::int64, b};
  if (p.ragged()) in.tokens = {token_starts.data(), token_ends.data(), DType::int64, b};
  if (!p.bias.empty()) in.bias = {bias.data(), {groups, each}};
  in.scale = p.scale;
  const int64_t bytes = p.type == DType::float32 ? 4 : 2;
  test::Guarded<std::byte> out(n * h * p.values * bytes);
  test::Guarded<float> lse(n * h), d_q(n * h * p.width), d_k(rows * p.width), d_v(rows * p.values),
      d_bias(static_cast<int64_t>(p.bias.size()));
  Status status = attend(in, Attended{{out.data(), p.type, n * h, p.values}, {lse.data(), {n, h}}});
  if (!status.ok()) test::fail("%s", status.what());
  const Result result{test::decoded(out.values(), p.type), lse.values(), {}, {}, {}, {}};
  Result forward = first ? *first : result;  // both backwards from the same outputs
  if (p.no_mass >= 0) forward.lse[test::size(p.no_mass)] = -INFINITY;
  test::Guarded<std::byte> given_out(test::encoded(forward.out, p.type));
  test::Guarded<float> given_lse(forward.lse);
  AttendForward given{{d_out.data(), p.type, n * h, p.values},
                      {},
                      {given_out.data(), p.type, n * h, p.values},
                      {given_lse.data(), {n, h}}};
  if (!p.d_lse.empty()) given.d_lse = {d_lse.data(), {n, h}};
  AttendGradients gradients{{d_q.data(), {n, h, p.width}},
                            {d_k.data(), {groups, each, h, p.width}},
                            {d_v.data(), {groups, each, h, p.values}},
                            {}};
  if (in.bias && p.d_bias) gradients.bias = {d_bias.data(), {groups, each}};
  status = backward(in, given, gradients);
  if (!status.ok()) test::fail("%s", status.what());
  if (!out.intact() || !lse.intact() || !d_q.intact() || !d_k.intact() || !d_v.intact() || !d_bias.intact())
    test::fail("a result's end was overwritten");
  return {result.out, result.lse, d_q.values(), d_k.values(), d_v.values(), d_bias.values()};
}

Result on_cpu(const Problem& p) {
  return run(
      p, true, nullptr,
      [](const AttendInputs& in, const Attended& out) {
        test::Workspace workspace(attend_workspace(test::sizing(1), in));
        return hisac::attend({workspace.array(), nullptr}, in, out);
      },
      [](const AttendInputs& in, const AttendForward& forward, const AttendGradients& out) {
        test::Workspace workspace(attend_backward_workspace(test::sizing(1), in));
        return hisac::attend_backward({workspace.array(), nullptr}, in, forward, out);
      });
}

Result on_cuda(const Problem& p, const Result& first) {
  return run(
      p, false, &first,
      [](const AttendInputs& in, const Attended& out) {
        test::Workspace workspace(cuda::attend_workspace({}, in));
        const Status status = cuda::attend({workspace.array()}, in, out);
        if (!workspace.intact()) test::fail("the workspace's end was overwritten");
        return status;
      },
      [](const AttendInputs& in, const AttendForward& forward, const AttendGradients& out) {
        test::Workspace workspace(cuda::attend_backward_workspace({}, in));
        const Status status = cuda::attend_backward({workspace.array()}, in, forward, out);
        if (!workspace.intact()) test::fail("the workspace's end was overwritten");
        return status;
      });
}

/// How far each cell may be from the CPU's: twice what a kernel of split products may be from the definition. With
/// n terms of |a_i b_i|: (part + 3 (n + 16) 2^-23) sum |a_i b_i|, where two parts of a number miss it by 2^-17 and the
/// product of two low parts by 2^-16; NaN: anything will do.
struct Bounds {
  std::vector<double> out, lse, d_q, d_k, d_v, d_bias;
};

Bounds bounds(const Problem& p, const Result& forward) {
  const int64_t n_all = p.candidates, heads = p.heads, d = p.width, w = p.values;
  const auto cells = [](int64_t n) { return std::vector<double>(test::size(n)); };
  const int64_t rows = p.users() * p.tokens * heads;
  Bounds e{cells(n_all * heads * w), cells(n_all * heads), cells(n_all * heads * d),
           cells(rows * d),          cells(rows * w),      cells(p.users() * p.tokens)};
  const double split = 0x1p-15, part = p.type == DType::bfloat16 ? 0 : split;
  const auto sum = [](double parts, int64_t n) { return parts + 3 * double(n + 16) * 0x1p-23; };
  const double rounding = p.type == DType::float32 ? 0 : p.type == DType::bfloat16 ? 0x1p-7 : 0x1p-10;
  const double tiny = p.type == DType::float16 ? 0x1p-24 : 0x1p-120, huge = 0x1p120;
  const auto element = [](const std::vector<float>& a, int64_t i) { return double(a[test::size(i)]); };
  std::vector<double> z(test::size(p.tokens)), wrong(z), weight(z);
  for (int64_t b = 0; b < p.users(); ++b)
    for (int64_t n = p.clean_starts[test::size(b)]; n < p.clean_ends[test::size(b)]; ++n)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t row = n * heads + h;
        double max_logit = -INFINITY, worst = 0, total = 0,
               dot = element(p.d_lse.empty() ? std::vector<float>{0} : p.d_lse, p.d_lse.empty() ? 0 : row),
               moduli = std::fabs(dot);
        for (int64_t m = 0; m < p.tokens; ++m) {
          const double bias = p.bias.empty() ? 0 : element(p.bias, b * p.tokens + m);
          double y = 0, size = 0;
          for (int64_t c = 0; std::isfinite(bias) && c < d; ++c) {
            const double term = element(p.q, row * d + c) * element(p.k, p.token(b, m, h) * d + c);
            y += term;
            size += std::fabs(term);
          }
          size *= std::fabs(double(p.scale));
          const size_t i = test::size(m);
          z[i] = std::isfinite(bias) ? double(p.scale) * y + bias : -INFINITY;
          wrong[i] = size * sum(part, d) + (size + std::fabs(bias)) * 0x1p-20 + 0x1p-19;
          if (size > huge) wrong[i] = NAN;
          if (!std::isfinite(bias)) continue;
          max_logit = std::max(max_logit, z[i]);
          if (z[i] != z[i] || wrong[i] != wrong[i]) worst = NAN;
          worst = worst != worst ? worst : std::max(worst, wrong[i]);
        }
        if (worst != worst) max_logit = NAN;
        for (double y : z) total += max_logit == -INFINITY ? 0 : std::exp(y - max_logit);
        const double lse = max_logit + std::log(total),
                     given = row == p.no_mass ? -INFINITY : element(forward.lse, row);
        e.lse[test::size(row)] = max_logit == -INFINITY ? 0 : 2 * worst + std::fabs(lse) * 0x1p-20 + sum(0, p.tokens);
        if (p.tokens == 0)
          for (int64_t c = 0; c < d; ++c)  // spoilt with nothing to spoil: the definition and the CPU differ
            if (!std::isfinite(element(p.q, row * d + c))) e.lse[test::size(row)] = NAN;
        for (int64_t c = 0; c < w; ++c) {
          double most = 0, mean = 0;
          for (int64_t m = 0; m < p.tokens; ++m) {
            if (z[test::size(m)] == -INFINITY) continue;
            const double y = element(p.v, p.token(b, m, h) * w + c);
            most = most != most || y != y ? NAN : std::max(most, std::fabs(y));
            mean += std::exp(z[test::size(m)] - lse) * y;
          }
          double& cell = e.out[test::size(row * w + c)];
          cell = max_logit == -INFINITY ? 0 : most * (2 * std::expm1(2 * worst) + 2 * sum(split, p.tokens));
          cell += std::fabs(mean) * rounding + tiny * (max_logit != -INFINITY);
          if (!(most < INFINITY) || e.lse[test::size(row)] != e.lse[test::size(row)]) cell = NAN;
          moduli += std::fabs(element(p.d_out, row * w + c) * element(forward.out, row * w + c));
          dot -= element(p.d_out, row * w + c) * element(forward.out, row * w + c);
        }
        for (int64_t m = 0; m < p.tokens; ++m) {
          const double y = z[test::size(m)];
          // an absent token is zero, whatever it holds
          const bool here = p.bias.empty() || std::isfinite(p.bias[test::size(b * p.tokens + m)]);
          const int64_t token = p.token(b, m, h);
          double slope = dot, size = moduli;
          for (int64_t c = 0; here && c < w; ++c) {
            const double term = element(p.d_out, row * w + c) * element(p.v, token * w + c);
            slope += term;
            size += std::fabs(term);
          }
          const double probability = given == -INFINITY ? 0 : std::exp(y - given), dz = probability * std::fabs(slope);
          const double off =
              here && given != -INFINITY
                  ? probability * std::expm1(wrong[test::size(m)] + std::fabs(given) * 0x1p-20) + 0x1p-120
                  : 0;
          double dz_off = off * std::fabs(slope) + (probability + off) * size * sum(part, w) + dz * sum(split, 1);
          if (given == -INFINITY) dz_off = 0;
          if (!(size < huge)) dz_off = NAN;
          const double scale = 2 * std::fabs(double(p.scale));
          for (int64_t c = 0; c < d; ++c) {
            const double key = here ? std::fabs(element(p.k, token * d + c)) : 0,
                         query = std::fabs(element(p.q, row * d + c));
            e.d_q[test::size(row * d + c)] += scale * (dz_off + dz * sum(split, p.tokens)) * key;
            e.d_k[test::size(token * d + c)] += scale * (dz_off + dz * sum(split, n_all)) * query;
          }
          for (int64_t c = 0; c < w; ++c)
            e.d_v[test::size(token * w + c)] +=
                2 * (off + probability * sum(split, n_all)) * std::fabs(element(p.d_out, row * w + c));
          e.d_bias[test::size(b * p.tokens + m)] += 2 * (dz_off + dz * sum(0, n_all * heads));
        }
      }
  for (std::vector<double>* all : {&e.d_q, &e.d_k, &e.d_v, &e.d_bias})
    for (double& x : *all) x = x < huge ? x + (x > 0) * 0x1p-110 : NAN;
  return e;
}

void compare(const char* what, const std::vector<float>& cpu, const std::vector<float>& cuda,
             const std::vector<double>& bound) {
  for (size_t i = 0; i < cpu.size(); ++i) {
    if (bound[i] != bound[i] || cpu[i] == cuda[i]) continue;
    const double off = std::fabs(double(cpu[i]) - double(cuda[i]));
    if (!(off <= bound[i]))
      test::fail("%s %zu: %g, expected %g within %g", what, i, double(cuda[i]), double(cpu[i]), bound[i]);
  }
}

/// One user of a batch, and what the batch gave it.
Problem alone(const Problem& p, int64_t b) {
  Problem o = p;
  const int64_t first = p.clean_starts[test::size(b)], n = p.clean_ends[test::size(b)] - first;
  o.candidates = n;
  o.starts = o.clean_starts = {0};
  o.ends = o.clean_ends = {n};
  o.no_mass = p.no_mass - first * p.heads;
  if (o.no_mass < 0 || o.no_mass >= n * p.heads) o.no_mass = -1;
  return o;
}

void cut(std::vector<float>& a, int64_t first, int64_t n) {
  if (a.empty()) return;
  a = std::vector<float>(a.begin() + first, a.begin() + first + n);
}

/// No bit depends on who else is in the batch.
void check_alone(const Problem& p, int64_t b, Result cpu, Result cuda) {
  Problem o = alone(p, b);
  const int64_t rows = p.tokens * p.heads, n = o.candidates * p.heads, first = p.clean_starts[test::size(b)] * p.heads;
  for (auto* a : {&o.q, &cuda.d_q}) cut(*a, first * p.width, n * p.width);
  for (auto* a : {&o.d_out, &cpu.out, &cuda.out}) cut(*a, first * p.values, n * p.values);
  for (auto* a : {&o.d_lse, &cpu.lse, &cuda.lse}) cut(*a, first, n);
  for (auto* a : {&o.k, &cuda.d_k}) cut(*a, b * rows * p.width, rows * p.width);
  for (auto* a : {&o.v, &cuda.d_v}) cut(*a, b * rows * p.values, rows * p.values);
  for (auto* a : {&o.bias, &cuda.d_bias}) cut(*a, b * p.tokens, p.tokens);
  if (!(on_cuda(o, cpu) == cuda)) test::fail("user %lld has other bits alone", static_cast<long long>(b));
}

/// Rows [first, first + n) of `from` behind those of `to`.
void append(std::vector<float>& to, const std::vector<float>& from, int64_t first, int64_t n) {
  if (!from.empty()) to.insert(to.end(), from.begin() + first, from.begin() + first + n);
}

/// Tokens that differ in number have the bits of tokens that are absent by their bias; those of nobody no gradient.
void check_ragged(Problem padded) {
  Random r(simt::options.seed + 5);
  const int64_t users = padded.users(), most = padded.tokens, key = padded.heads * padded.width,
                value = padded.heads * padded.values;
  if (padded.bias.empty()) padded.bias.resize(test::size(users * most));
  Problem p = padded;
  p.k.clear(), p.v.clear(), p.bias.clear();
  std::vector<bool> nobody;
  const auto add = [&](int64_t from, int64_t n, bool somebody) {
    append(p.k, padded.k, from * key, n * key);
    append(p.v, padded.v, from * value, n * value);
    append(p.bias, padded.bias, from, n);
    nobody.insert(nobody.end(), test::size(n), !somebody);
  };
  for (int64_t b = 0; b < users; ++b) {
    add(b * most, std::min(most, r.below(3)), false);
    const int64_t n = r.below(most + 1);
    p.token_starts.push_back(static_cast<int64_t>(nobody.size()));
    add(b * most, n, true);
    p.token_ends.push_back(static_cast<int64_t>(nobody.size()));
    std::fill_n(padded.bias.begin() + b * most + n, most - n, -INFINITY);
  }
  const Result cpu = on_cpu(padded);
  Result expected = on_cuda(padded, cpu), found = on_cuda(p, cpu);
  Result rows{found.out, found.lse, found.d_q, {}, {}, {}};
  for (int64_t b = 0; b < users; ++b) {
    const int64_t first = p.token_starts[test::size(b)], n = p.token_ends[test::size(b)] - first;
    Result &e = expected, user;
    append(user.d_k, e.d_k, b * most * key, n * key);
    append(user.d_v, e.d_v, b * most * value, n * value);
    if (p.d_bias) append(user.d_bias, e.d_bias, b * most, n);
    Result mine;
    append(mine.d_k, found.d_k, first * key, n * key);
    append(mine.d_v, found.d_v, first * value, n * value);
    if (p.d_bias) append(mine.d_bias, found.d_bias, first, n);
    if (!(mine == user)) test::fail("user %lld's tokens by offsets have other bits", static_cast<long long>(b));
  }
  expected.d_k.clear(), expected.d_v.clear(), expected.d_bias.clear();
  if (!(rows == expected)) test::fail("tokens by offsets give other bits");
  for (size_t i = 0; i < nobody.size(); ++i) {
    if (!nobody[i]) continue;
    const auto none = [&](const std::vector<float>& a, int64_t wide) {
      return std::all_of(a.begin() + int64_t(i) * wide, a.begin() + int64_t(i + 1) * wide,
                         [](float x) { return x == 0; });
    };
    if (!none(found.d_k, key) || !none(found.d_v, value) || (p.d_bias && !none(found.d_bias, 1)))
      test::fail("a token of nobody has a gradient");
  }
}

void check(const Problem& p) {
  const Result cpu = on_cpu(p), first = on_cuda(p, cpu);
  const Bounds e = bounds(p, cpu);
  compare("out", cpu.out, first.out, e.out);
  compare("lse", cpu.lse, first.lse, e.lse);
  compare("d q", cpu.d_q, first.d_q, e.d_q);
  compare("d keys", cpu.d_k, first.d_k, e.d_k);
  compare("d values", cpu.d_v, first.d_v, e.d_v);
  compare("d bias", cpu.d_bias, first.d_bias, e.d_bias);
  // The CPU takes every token for absent where q holds a NaN. Here the results are NaN, never numbers.
  for (int64_t u = 0; p.tokens > 0 && u < p.users(); ++u)
    for (int64_t row = p.clean_starts[test::size(u)] * p.heads; row < p.clean_ends[test::size(u)] * p.heads; ++row) {
      const float* const q = p.q.data() + row * p.width;
      if (std::none_of(q, q + p.width, [](float x) { return std::isnan(x); })) continue;
      if (!std::isnan(first.lse[test::size(row)]) || !std::isnan(first.out[test::size(row * p.values)]))
        test::fail("a NaN of q was lost");
    }
  const simt::Options kept = simt::options;
  simt::options.order = simt::Order::random;
  simt::options.seed += 18;
  simt::options.machine = {1, size_t{72} << 10};  // other tiles, where rows are wide
  if (!(on_cuda(p, cpu) == first)) test::fail("other bits for another order of threads and another machine");
  if (p.users() > 0 && p.tokens > 0 && simt::options.seed % 2 == 0) check_ragged(p);
  if (p.users() > 1) check_alone(p, static_cast<int64_t>(simt::options.seed) % p.users(), cpu, first);
  simt::options = kept;
}

}  // namespace

int main(int argc, char** argv) {
  test::options(argc, argv);
  for (uint64_t seed = test::first; seed < test::last && !(simt::planted && test::faults); ++seed) {
    test::name("attend %llu", static_cast<unsigned long long>(seed));
    const size_t sizes[] = {size_t{99} << 10, size_t{163} << 10, size_t{227} << 10};
    simt::options.machine = {2, sizes[(seed + 2) % 3]};
    simt::options.seed = seed;
    check(seed ? random_problem(seed) : large());
  }
  return test::done();
}
