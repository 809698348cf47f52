// SPDX-License-Identifier: Apache-2.0
// `route` of cuda/route.cu, run by the emulator, beside the CPU's: values within the bound of split products,
// everything bit-identical for any order of threads, any machine and any batch around a user, and for rows of x and v
// gathered, scaled or made of codes instead of copied.
#include "route_problem.h"

namespace {

using namespace hisac;
using test::copied, test::on_cpu, test::on_cuda, test::Problem, test::Random, test::Result;

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

void check(const Problem& p) {
  const Result first = on_cuda(p);
  test::compare(p, on_cpu(p), first);
  test::check_bits(p, first, [](const Problem& q) { return on_cuda(q); });
}

}  // namespace

int main(int argc, char** argv) {
  test::options(argc, argv);
  for (uint64_t seed = test::first; seed < test::last; ++seed) {
    test::name("route %llu", static_cast<unsigned long long>(seed));
    const size_t sizes[] = {size_t{99} << 10, size_t{163} << 10, size_t{227} << 10};
    simt::options.machine = {seed ? 2 : 1, seed ? sizes[seed % 3] : size_t{64} << 10};
    Problem p = seed ? test::random_problem(seed) : several_tiles();
    if (seed % 2) test::gather(seed, p);
    check(p);
  }
  return test::done();
}
