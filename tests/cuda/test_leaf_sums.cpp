// SPDX-License-Identifier: Apache-2.0
// `leaf_sums` of cuda/leaf_sums.cu and `route` over them, run by the emulator, beside the CPU's: leaves exactly, sums
// within a bound, everything bit-identical for any order of threads and any machine, and for rows copied.
#include "route_problem.h"

namespace {

using namespace hisac;
using test::Guarded, test::kSkew, test::Problem, test::Random, test::Result;

struct Sums {
  std::vector<float> x, v, bias, spread;
  std::vector<int32_t> codes;
  std::vector<int64_t> offsets;
  bool operator==(const Sums& o) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * 4) == 0);
    };
    return same(x, o.x) && same(v, o.v) && same(bias, o.bias) && same(spread, o.spread) && codes == o.codes &&
           offsets == o.offsets;
  }
};

/// Rows of all histories.
int64_t entries(const Problem& p) {
  int64_t rows = 0;
  for (size_t b = 0; b < p.starts.size(); ++b) rows += std::max<int64_t>(0, std::min(p.ends[b], p.rows) - p.starts[b]);
  return rows;
}

/// verb(book, histories, out): the sums that there are, in arrays of so many rows.
template <class Verb>
Sums sums_of(const Problem& p, bool clamp, int64_t rows, Verb verb) {
  test::Held held(p, clamp);
  const int64_t levels = p.book->levels(), users = test::users(p);
  Guarded<float> x(rows * p.width), v(rows * p.values), bias(rows), spread(rows);
  Guarded<int32_t> codes(rows * levels);
  Guarded<int64_t> offsets(users + 1);
  const Status status = verb(*held.book, held.in,
                             LeafSums{{x.data(), {rows, p.width}},
                                      {v.data(), {rows, p.values}},
                                      {offsets.data(), {users + 1}},
                                      {codes.data(), {rows, levels}},
                                      {bias.data(), {rows}},
                                      {spread.data(), {rows}}});
  if (!status.ok()) test::fail("%s", status.what());
  for (bool intact : {x.intact(), v.intact(), bias.intact(), spread.intact(), codes.intact(), offsets.intact()})
    if (!intact) test::fail("a result's end was overwritten");
  Sums out{x.values(), v.values(), bias.values(), spread.values(), codes.values(), offsets.values()};
  const int64_t n = std::min(std::max<int64_t>(out.offsets.back(), 0), rows);
  out.x.resize(test::size(n * p.width));
  out.v.resize(test::size(n * p.values));
  out.bias.resize(test::size(n));
  out.spread.resize(test::size(n));
  out.codes.resize(test::size(n * levels));
  return out;
}

Sums sums_on_cpu(const Problem& p) {
  return sums_of(p, true, entries(p), [](const Codebook& book, const Histories& in, const LeafSums& out) {
    test::Workspace workspace(leaf_sums_workspace(test::sizing(1), book, in, in.behaviours()));
    return leaf_sums({workspace.array(), nullptr}, book, in, out);
  });
}

Sums sums_on_cuda(const Problem& p, int64_t rows, int64_t longest) {
  return sums_of(p, false, rows, [&](const Codebook& book, const Histories& in, const LeafSums& out) {
    test::Workspace workspace(cuda::leaf_sums_workspace({}, book, in, longest));
    test::Workspace image(test::image_size(p));
    const Status status = cuda::leaf_sums(test::context_of(p, workspace, image), book, in, out);
    if (!workspace.intact()) test::fail("the workspace's end was overwritten");
    return status;
  });
}

Sums sums_on_cuda(const Problem& p) { return sums_on_cuda(p, entries(p), test::longest(p)); }

/// A workspace may be asked for before the codes are there.
void check_sizes(const Problem& p) {
  const test::Held h(p, false);
  Histories later = h.in;
  later.codes.data = nullptr;
  const auto size = [&](const Histories& in) {
    return cuda::route_workspace({}, h.book, p.params, in, h.agents, in.behaviours());
  };
  if (size(later) != size(h.in)) test::fail("the workspace depends on the codes' pointer");
}

/// In arrays of fewer rows, or in a workspace for shorter histories: a user has all of its sums or none.
void check_short(const Problem& p, const Sums& whole) {
  const int64_t levels = p.book->levels();
  for (const Sums& got :
       {sums_on_cuda(p, entries(p) / 2, test::longest(p)), sums_on_cuda(p, entries(p), test::longest(p) / 2)})
    for (size_t b = 0; b < p.starts.size(); ++b) {
      const int64_t first = got.offsets[b], n = got.offsets[b + 1] - first, expected = whole.offsets[b];
      const auto same = [&](const auto& x, const auto& y, int64_t width) {
        const auto* const from = x.data() + first * width;
        return std::memcmp(from, y.data() + expected * width, test::size(n * width) * sizeof *from) == 0;
      };
      if (n == 0) continue;
      if (n != whole.offsets[b + 1] - expected || !same(got.x, whole.x, p.width) || !same(got.v, whole.v, p.values) ||
          !same(got.bias, whole.bias, 1) || !same(got.codes, whole.codes, levels))
        test::fail("user %zu: sums of some of its rows", b);
    }
}

float largest(const std::vector<float>& a, float limit) {
  float y = 0;
  for (float x : a)
    if (std::fabs(x) < limit) y = std::max(y, std::fabs(x));
  return y;
}

void compare_sums(const Problem& p, const Sums& cpu, const Sums& cuda) {
  if (cpu.offsets != cuda.offsets || cpu.codes != cuda.codes) return test::fail("other leaves");
  const float x = p.codes_only ? 1.4f : largest(p.x, 1e6f) * (p.scale.empty() ? 1 : largest(p.scale, INFINITY));
  const float reach = x * x * static_cast<float>(p.width) + largest(p.spread, INFINITY);
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

/// The tokens of `route` from kept sums, absent behaviours left out.
Result from_sums(Problem p, Sums sums) {
  p.params.method = Method::exact;
  const int64_t rows = static_cast<int64_t>(sums.bias.size()), levels = p.book->levels();
  const LeafSums kept{{sums.x.data(), {rows, p.width}},
                      {sums.v.data(), {rows, p.values}},
                      {sums.offsets.data(), {static_cast<int64_t>(sums.offsets.size())}},
                      {sums.codes.data(), {rows, levels}},
                      {sums.bias.data(), {rows}},
                      {sums.spread.data(), {rows}}};
  return test::run(p, false, [&](const test::Held& h, const RouteParams& params, const Tokens& out) {
    const Histories in = kept.histories();
    test::Workspace workspace(cuda::route_workspace({}, nullptr, params, in, h.agents, rows));
    const Status status = cuda::route({workspace.array(), nullptr, Device::cuda}, nullptr, params, in, h.agents, out);
    if (!workspace.intact()) test::fail("the workspace's end was overwritten");
    return status;
  });
}

void check(Problem p) {
  const Sums first = sums_on_cuda(p);
  compare_sums(p, sums_on_cpu(p), first);
  check_short(p, first);
  p.params.method = Method::leaf;
  check_sizes(p);
  const Result tokens = test::on_cuda(p);
  const float e = p.reach * 8 * kSkew;
  test::compare(p, test::on_cpu(p), tokens, e);
  const simt::Options kept = simt::options;
  simt::options.order = simt::Order::random;
  simt::options.seed += 17;
  simt::options.machine.processors = 5;
  if (!(sums_on_cuda(p) == first)) test::fail("other sums for another order of threads and number of processors");
  if (!(test::on_cuda(p) == tokens)) test::fail("other tokens for another order of threads and number of processors");
  if (!(sums_on_cuda(test::copied(p)) == first)) test::fail("other bits for rows copied");
  simt::options = kept;
  p.params.missing = Missing::drop;
  if (p.v_type == DType::float32 && !(from_sums(p, first) == test::on_cuda(p)))
    test::fail("the leaf method is not `route` over leaf sums");
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
  p.params.missing = Missing::token;
  p.x = test::uniform(r, p.rows * p.width);
  p.v = test::uniform(r, p.rows * p.values);
  p.bias = test::uniform(r, p.rows, 3);
  for (int64_t i = 0; i < p.rows; i += 31) p.x[test::size(i * p.width)] = NAN;
  p.bias[1] = 80;  // of an absent row: it is no reference for the others
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
    check(std::move(p));
  }
  return test::done();
}
