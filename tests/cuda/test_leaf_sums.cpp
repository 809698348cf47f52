// SPDX-License-Identifier: Apache-2.0
// `leaf_sums` and `leaf_sums_backward` of cuda/, run by the emulator, beside the CPU's: leaves exactly, sums within a
// bound, gradients within one of those of the definition in float64, everything bit-identical for any order of threads
// and any machine, for sums that lie together or in places of their own, and for rows copied.
#include "route_problem.h"

namespace {

using namespace hisac;
using test::Guarded, test::kSkew, test::Problem, test::Random, test::Result;

/// Rows of all histories; of those before user b.
int64_t entries(const Problem& p, size_t b) {
  int64_t rows = 0;
  for (size_t i = 0; i < b; ++i) rows += std::max<int64_t>(0, std::min(p.ends[i], p.rows) - p.starts[i]);
  return rows;
}
int64_t entries(const Problem& p) { return test::all_rows(p); }

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

/// The sums of one user after another.
struct Sums {
  std::vector<float> x, v, bias, spread;
  std::vector<int32_t> codes;
  std::vector<int64_t> votes, sizes;
  bool operator==(const Sums& o) const {
    return same_bits(x, o.x) && same_bits(v, o.v) && same_bits(bias, o.bias) && same_bits(spread, o.spread) &&
           codes == o.codes && votes == o.votes && sizes == o.sizes;
  }
};

/// Arrays of so many rows for the sums of a problem.
class Kept {
 public:
  Kept(const Problem& p, int64_t rows, bool ragged)
      : x_(rows * p.width),
        v_(rows * p.values),
        bias_(rows),
        spread_(rows),
        codes_(rows * p.book->levels()),
        votes_(rows),
        offsets_(ragged ? test::users(p) + 1 : 2 * test::users(p)) {
    const int64_t users = test::users(p);
    out = {{x_.data(), {rows, p.width}},
           {p.values ? v_.data() : nullptr, {rows, p.values}},
           {offsets_.data(), offsets_.data() + (ragged ? 1 : users), users},
           {codes_.data(), {rows, p.book->levels()}},
           {bias_.data(), {rows}},
           {spread_.data(), {rows}},
           {votes_.data(), {rows}}};
  }

  /// The sums of all users.
  Sums take() {
    for (bool intact : {x_.intact(), v_.intact(), bias_.intact(), spread_.intact(), codes_.intact(), offsets_.intact(),
                        votes_.intact()})
      if (!intact) test::fail("a result's end was overwritten");
    Sums sums;
    for (int64_t b = 0; b < out.offsets.users; ++b) {
      const int64_t first = out.offsets.starts[b], last = out.offsets.ends[b];
      sums.sizes.push_back(last - first);
      if (first < 0 || last < first || last > bias_.count()) return test::fail("sums past the end"), sums;
      const auto append = [&](auto* to, const auto* from, int64_t width) {
        to->insert(to->end(), from + first * width, from + last * width);
      };
      append(&sums.x, x_.data(), out.x.shape[1]);
      append(&sums.v, v_.data(), out.v.shape[1]);
      append(&sums.bias, bias_.data(), 1);
      append(&sums.spread, spread_.data(), 1);
      append(&sums.codes, codes_.data(), out.codes.shape[1]);
      append(&sums.votes, votes_.data(), 1);
    }
    return sums;
  }

  LeafSums out;

 private:
  Guarded<float> x_, v_, bias_, spread_;
  Guarded<int32_t> codes_;
  Guarded<int64_t> votes_, offsets_;
};

void sum_on_cpu(const Problem& p, Kept& kept) {
  const test::Held held(p, true);
  test::Workspace workspace(leaf_sums_workspace(test::sizing(1), *held.book, held.in));
  const Status status = leaf_sums({workspace.array(), nullptr}, *held.book, held.in, kept.out);
  if (!status.ok()) test::fail("%s", status.what());
}

void sum_on_cuda(const Problem& p, Kept& kept, int64_t longest) {
  const test::Held held(p, false);
  const Histories in = test::stated(held.in, longest);
  test::Workspace workspace(cuda::leaf_sums_workspace({}, *held.book, in));
  test::Workspace image(test::image_size(p));
  const Status status = cuda::leaf_sums(test::context_of(p, workspace, image), *held.book, in, kept.out);
  if (!status.ok()) test::fail("%s", status.what());
  if (!workspace.intact()) test::fail("the workspace's end was overwritten");
}

Sums sums_on_cuda(const Problem& p, int64_t rows, bool ragged, int64_t longest) {
  Kept kept(p, rows, ragged);
  sum_on_cuda(p, kept, longest);
  return kept.take();
}

Sums sums_on_cuda(const Problem& p, bool ragged = true) {
  return sums_on_cuda(p, entries(p), ragged, test::longest(p));
}

/// In arrays of fewer rows, or in a workspace for shorter histories: a user has all of its sums or none.
void check_short(const Problem& p, const Sums& whole, bool ragged) {
  const int64_t levels = p.book->levels();
  for (const Sums& got : {sums_on_cuda(p, entries(p) / 2, ragged, test::longest(p)),
                          sums_on_cuda(p, entries(p), ragged, test::longest(p) / 2)})
    for (int64_t b = 0, first = 0, expected = 0; b < test::users(p); ++b) {
      const int64_t n = got.sizes[test::size(b)], all = whole.sizes[test::size(b)];
      const auto same = [&](const auto& x, const auto& y, int64_t width) {
        const auto* const from = x.data() + first * width;
        const size_t bytes = test::size(n * width) * sizeof *from;
        return bytes == 0 || std::memcmp(from, y.data() + expected * width, bytes) == 0;
      };
      if (n != 0 &&
          (n != all || !same(got.x, whole.x, p.width) || !same(got.v, whole.v, p.values) ||
           !same(got.bias, whole.bias, 1) || !same(got.codes, whole.codes, levels) || !same(got.votes, whole.votes, 1)))
        test::fail("user %lld: sums of some of its rows", static_cast<long long>(b));
      first += n;
      expected += all;
    }
}

void compare_sums(const Problem& p, const Sums& cpu, const Sums& cuda) {
  if (cpu.sizes != cuda.sizes || cpu.codes != cuda.codes) return test::fail("other leaves");
  if (cpu.votes != cuda.votes) return test::fail("other votes");
  const float x = test::largest_x(p);
  const float reach = x * x * static_cast<float>(p.width) + test::largest(p.spread, INFINITY);
  const auto within = [](const char* what, const std::vector<float>& a, const std::vector<float>& b, float bound) {
    for (size_t i = 0; i < a.size(); ++i)
      if (!(a[i] == b[i] || std::fabs(a[i] - b[i]) <= bound || !(std::fabs(a[i]) < INFINITY || std::isfinite(b[i]))))
        test::fail("%s %zu: %g, expected %g within %g", what, i, double(b[i]), double(a[i]), double(bound));
  };
  within("x", cpu.x, cuda.x, kSkew * x);
  within("v", cpu.v, cuda.v, kSkew);
  within("bias", cpu.bias, cuda.bias, kSkew);
  within("spread", cpu.spread, cuda.spread, 4 * kSkew * reach);
}

/// What `route` makes of kept sums.
Result route_sums(Problem p, const LeafSums& kept) {
  p.v_type = DType::float32;
  return test::run(p, false, [&](const test::Held& h, const RouteParams& params, const Tokens& out) {
    const Histories in = kept.histories();
    test::Workspace workspace(cuda::route_workspace({}, nullptr, params, in, h.agents, out));
    return cuda::route({workspace.array(), nullptr, Device::cuda}, nullptr, params, in, h.agents, out);
  });
}

// ---- gradients

/// Gradients of the sums' rows: all, or some of them.
struct Given {
  std::vector<float> x, v, bias, spread;
};
struct Gradients {
  std::vector<float> v, bias;
  bool operator==(const Gradients& o) const { return same_bits(v, o.v) && same_bits(bias, o.bias); }
};

/// verb(held, forward, out): `leaf_sums_backward`, on the CPU or on CUDA.
template <class Verb>
Gradients gradients_of(const Problem& p, bool clamp, const LeafSums& kept, const Given& given, int wanted,
                       const std::vector<int64_t>& listed, Verb verb) {
  const test::Held held(p, clamp);
  const bool some = !p.v_ids.empty() && !listed.empty();
  const int64_t of_v = some ? test::count(listed) : test::table(p.v, p.values);
  Guarded<float> v(wanted & 1 ? of_v * p.values : 0), bias(wanted & 2 ? p.rows : 0);
  LeafSumsForward forward{kept.histories()};
  const int64_t rows = kept.bias.shape[0];
  if (!given.x.empty()) forward.d_x = {given.x.data(), {rows, p.width}};
  if (!given.v.empty()) forward.d_v = {given.v.data(), {rows, p.values}};
  if (!given.bias.empty()) forward.d_bias = {given.bias.data(), {rows}};
  if (!given.spread.empty()) forward.d_spread = {given.spread.data(), {rows}};
  LeafSumsGradients out;
  if (wanted & 1) out.v = {v.data(), {of_v, p.values}};
  if (some) out.v_rows = ids(listed.data(), of_v);
  if (wanted & 2) out.bias = {bias.data(), {p.rows}};
  const Status status = verb(held, forward, out);
  if (!status.ok()) test::fail("%s", status.what());
  if (!v.intact() || !bias.intact()) test::fail("a gradient's end was overwritten");
  return {v.values(), bias.values()};
}

Gradients on_cuda(const Problem& p, const LeafSums& kept, const Given& given, int wanted,
                  const std::vector<int64_t>& listed) {
  return gradients_of(p, false, kept, given, wanted, listed, [&](const auto& h, const auto& forward, const auto& out) {
    Histories in = h.in;
    in.rows = entries(p);
    test::Workspace workspace(cuda::leaf_sums_backward_workspace({}, *h.book, in, out));
    test::Workspace image(test::image_size(p));
    const Context context = test::context_of(p, workspace, image);
    const Status status = cuda::leaf_sums_backward(context, *h.book, in, forward, out);
    if (!workspace.intact()) test::fail("the workspace's end was overwritten");
    return status;
  });
}

/// The definition in float64, and the moduli of its terms times what may be wrong of them.
struct Expected {
  std::vector<double> v, v_bound, bias, bias_bound;
};

/// Of a problem whose rows are where their behaviours are.
Expected expected_of(const Problem& p, const LeafSums& kept, const Given& given) {
  Expected e;
  for (auto* a : {&e.v, &e.v_bound}) a->assign(test::size(p.rows * p.values), 0);
  for (auto* a : {&e.bias, &e.bias_bound}) a->assign(test::size(p.rows), 0);
  const auto at = [](const std::vector<float>& a, int64_t i) { return a.empty() ? 0.0 : double(a[test::size(i)]); };
  for (size_t b = 0; b < p.starts.size(); ++b)
    for (int64_t i = p.starts[b]; i < std::min(p.rows, p.ends[b]); ++i) {
      const int64_t levels = p.book->levels();
      int64_t s = kept.offsets.starts[b];
      while (s < kept.offsets.ends[b] &&
             !std::equal(p.codes.data() + i * levels, p.codes.data() + (i + 1) * levels, kept.codes.data + s * levels))
        ++s;
      if (!test::is_present(p, i) || s == kept.offsets.ends[b]) continue;
      const double apart = at(p.bias, i) - double(kept.bias.data[s]), share = std::exp(apart);
      double sum = at(given.bias, s), moduli = std::fabs(sum), squares = 0, largest = 0;
      const auto add = [&](double d, float element, float mean) {
        const double difference = double(element) - double(mean);
        sum += d * difference;
        moduli += std::fabs(d * difference);
        return difference * difference;
      };
      const double wrong = (std::fabs(apart) + 4) * 0x1p-22;  // of a share, and of a sum of float32
      for (int64_t c = 0; c < p.values; ++c) {
        const double dv = at(given.v, s * p.values + c);
        if (!given.v.empty()) add(dv, p.v[test::size(i * p.values + c)], kept.v.data[s * p.values + c]);
        e.v[test::size(i * p.values + c)] += share * dv;
        e.v_bound[test::size(i * p.values + c)] += share * std::fabs(dv) * wrong;
      }
      for (int64_t d = 0; d < p.width; ++d) {
        largest = std::max(largest, std::fabs(double(p.x[test::size(i * p.width + d)])));
        squares += add(at(given.x, s * p.width + d), p.x[test::size(i * p.width + d)], kept.x.data[s * p.width + d]);
      }
      const double spread = at(p.spread, i), mean = double(kept.spread.data[s]);
      sum += at(given.spread, s) * (spread + squares - mean);
      moduli += std::fabs(at(given.spread, s)) * (spread + squares + mean);
      e.bias[test::size(i)] += share * sum;
      e.bias_bound[test::size(i)] += share * moduli * wrong;
    }
  return e;
}

void check_gradients(const Problem& p, uint64_t seed) {
  Random r(seed + 3000);
  const int64_t rows = entries(p);
  Kept own(p, rows, false), together(p, rows, true);
  sum_on_cuda(p, own, test::longest(p));
  sum_on_cuda(p, together, test::longest(p));
  // the same gradients for the same sums, in either place
  Given given, given_together;
  const auto fill = [&](std::vector<float> Given::* field, int64_t width) {
    if (r.below(4) == 0 || width == 0) return;
    given.*field = test::uniform(r, rows * width);
    given_together.*field = given.*field;
    for (int64_t b = 0; b < test::users(p); ++b)
      std::copy_n((given.*field).begin() + own.out.offsets.starts[b] * width,
                  (own.out.offsets.ends[b] - own.out.offsets.starts[b]) * width,
                  (given_together.*field).begin() + together.out.offsets.starts[b] * width);
  };
  fill(&Given::x, p.width);
  fill(&Given::v, p.values);
  fill(&Given::bias, 1);
  fill(&Given::spread, 1);
  int wanted = r.below(2) ? 3 : 1 + static_cast<int>(r.below(2));
  if (!p.values) wanted = 2;
  const std::vector<int64_t> listed = test::some_rows(r, test::table(p.v, p.values));
  const auto in_table = [&](auto& of_rows) {
    of_rows = test::in_table(of_rows, p.v_ids, test::table(p.v, p.values), p.values, listed);
  };
  const Gradients got = on_cuda(p, own.out, given, wanted, listed);
  const Gradients cpu =
      gradients_of(p, true, own.out, given, wanted, listed, [](const auto& h, const auto& forward, const auto& out) {
        test::Workspace workspace(leaf_sums_backward_workspace(test::sizing(1), *h.book, h.in, out));
        return leaf_sums_backward({workspace.array(), nullptr}, *h.book, h.in, forward, out);
      });
  Expected expected = expected_of(test::copied(p), own.out, given);
  in_table(expected.v);
  in_table(expected.v_bound);
  for (size_t i = 0; i < expected.v.size(); ++i) expected.v_bound[i] += std::fabs(expected.v[i]) * 0x1p-24;
  const auto within = [](const char* what, const std::vector<float>& a, const std::vector<double>& b,
                         const std::vector<double>& bound) {
    for (size_t i = 0; i < a.size(); ++i)
      if (std::isfinite(bound[i]) && !(std::fabs(double(a[i]) - b[i]) <= bound[i]))
        test::fail("%s %zu: %g, expected %g within %g", what, i, double(a[i]), b[i], bound[i]);
  };
  within("d_v", got.v, expected.v, expected.v_bound);
  within("d_bias", got.bias, expected.bias, expected.bias_bound);
  within("the CPU's d_v", cpu.v, expected.v, expected.v_bound);
  within("the CPU's d_bias", cpu.bias, expected.bias, expected.bias_bound);
  if (!(on_cuda(p, together.out, given_together, wanted, listed) == got))
    test::fail("other gradients for sums together");
  test::check_bits(p, got, [&](const Problem& q) {
    Gradients found = on_cuda(q, own.out, given, wanted, listed);
    if (!q.gathered()) in_table(found.v);
    return found;
  });
}

void check(const Problem& p, uint64_t seed) {
  Kept cpu(p, entries(p), true), cpu_own(p, entries(p), false);
  sum_on_cpu(p, cpu);
  sum_on_cpu(p, cpu_own);
  const Sums first = sums_on_cuda(p);
  compare_sums(p, cpu.take(), first);
  compare_sums(p, cpu_own.take(), first);
  if (!(sums_on_cuda(p, false) == first)) test::fail("other sums in places of their own");
  for (const bool ragged : {true, false}) check_short(p, first, ragged);
  test::check_bits(p, first, [](const Problem& q) { return sums_on_cuda(q); });
  Kept own(p, entries(p), false), together(p, entries(p), true);
  sum_on_cuda(p, own, test::longest(p));
  sum_on_cuda(p, together, test::longest(p));
  for (size_t b = 0; b < p.starts.size(); ++b)
    if (own.out.offsets.starts[b] != entries(p, b)) test::fail("user %zu has another place", b);
  if (!(route_sums(p, own.out) == route_sums(p, together.out))) test::fail("other tokens of sums together");
  check_gradients(p, seed);
}

/// Leaves that a block sums, of several column tiles, among more than the blocks take at once.
Problem long_leaves() {
  Random r(1);
  Problem p;
  p.starts = {0, 700};
  p.ends = {700, 820};
  p.rows = 820;
  p.agents = 5;
  p.width = 136;
  p.values = 72;
  p.x = test::uniform(r, p.rows * p.width);
  p.v = test::uniform(r, p.rows * p.values);
  p.bias = test::uniform(r, p.rows, 3);
  for (int64_t i = 0; i < p.rows; i += 31) p.x[test::size(i * p.width)] = NAN;
  p.bias[1] = 80;  // of an absent row: it is no reference for the others
  for (int64_t i = 0; i < p.rows; ++i) p.weights.floats.push_back(1 + r.uniform());
  p.x[test::size(p.width)] = 1e20f;
  p.prototypes = test::uniform(r, 2 * p.agents * p.width);
  p.temperature = {7};
  p.reach = 136 * 4 / 7.f;
  p.book = std::make_shared<Codebook>(test::codebook(r, {2, 90}, p.width));
  for (int64_t i = 0; i < p.rows; ++i) {
    p.codes.push_back(i % 3 == 1);
    p.codes.push_back(i % 3 == 1 ? static_cast<int32_t>(i / 3 % 90) : 0);
  }
  return p;
}

}  // namespace

int main(int argc, char** argv) {
  test::options(argc, argv);
  for (uint64_t seed = test::first; seed < test::last; ++seed) {
    test::name("leaf_sums %llu", static_cast<unsigned long long>(seed));
    simt::options.machine = {seed ? 2 : 1, size_t{227} << 10};
    Problem p = seed ? test::random_problem(seed) : long_leaves();
    if (seed) test::add_codes(seed, p);
    if (seed % 2) test::gather(seed, p);
    check(p, seed);
  }
  return test::done();
}
