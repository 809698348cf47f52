// SPDX-License-Identifier: Apache-2.0
// `route` of cuda/route.cu, run by the emulator, beside the CPU's: values within the bound of split products,
// everything bit-identical for any order of threads, any machine and any batch around a user, and for rows of x and v
// gathered, scaled or made of codes instead of copied. And `missing` of cuda/missing.cu and
// `agent_lists` of cuda/agent_lists.cu, exactly; and `log_share` of cuda/log_share.cu.
#include "sparse_problem.h"

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
  p.with_mean_x = true;
  p.x = test::uniform(r, p.rows * p.width);
  p.v = test::uniform(r, p.rows * p.values);
  p.x[5] = NAN;
  p.v[test::size(70 * p.values + 71)] = p.x[test::size(70 * p.width)] = INFINITY;
  p.prototypes = test::uniform(r, 2 * p.agents * p.width);
  p.temperature = {1.2f};
  p.reach = 24 * 4 * 2 / 3.f / 1.2f;
  return p;
}

/// verb(context, held, out): `missing`, on the CPU or on CUDA.
template <class Verb>
std::vector<float> missing_of(const Problem& p, bool clamp, Verb verb) {
  const test::Held h(p, clamp);
  test::Guarded<float> out(p.rows);
  if (const Status status = verb(h, {out.data(), {p.rows}}); !status.ok()) test::fail("%s", status.what());
  if (!out.intact()) test::fail("a result's end was overwritten");
  return out.values();
}

void check_missing(const Problem& p) {
  const auto cpu = missing_of(p, true, [](const test::Held& h, const Array<float, 1>& out) {
    test::Workspace workspace(missing_workspace(test::sizing(1), h.book, h.in));
    return missing({workspace.array(), nullptr}, h.book, h.in, out);
  });
  const auto on_device = [](const Problem& q) {
    return missing_of(q, false, [&](const test::Held& h, const Array<float, 1>& out) {
      test::Workspace none(cuda::missing_workspace({}, h.book, h.in)), image(test::image_size(q));
      return cuda::missing(test::context_of(q, none, image), h.book, h.in, out);
    });
  };
  if (on_device(p) != cpu) test::fail("others are missing");
}

/// Masses and votes of any size, none among them, of several users; or of none.
void check_log_share(uint64_t seed) {
  Random r(seed + 900);
  const int64_t users = r.below(seed ? 40 : 1), seats = 1 + r.below(100);
  const float scale = std::ldexp(1.f, static_cast<int>(r.below(110)));
  std::vector<float> lse = test::uniform(r, users * seats);
  std::vector<int64_t> votes(lse.size());
  for (size_t i = 0; i < lse.size(); ++i) {
    const int64_t rare[] = {0, -1, INT64_MIN, INT64_MAX, int64_t{1} << 40, 1};
    votes[i] = r.below(4) ? 1 + r.below(100) : rare[r.below(6)];
    lse[i] = r.below(4) == 0 || i / test::size(seats) == 3 ? -INFINITY : lse[i] * scale;
  }
  for (const Normalize normalize : {Normalize::history, Normalize::agents})
    for (const bool with_votes : {true, false}) {
      const Array<const int64_t, 2> given{with_votes ? votes.data() : nullptr, {users, seats}};
      const auto run = [&](auto verb) {
        test::Guarded<float> out(users * seats);
        const Status status =
            verb(Context{}, normalize, {lse.data(), {users, seats}}, given, {out.data(), {users, seats}});
        if (!status.ok()) test::fail("%s", status.what());
        if (!out.intact()) test::fail("the shares' end was overwritten");
        return out.values();
      };
      const std::vector<float> cpu = run(cpu::kBackend.log_share), got = run(cuda::log_share);
      for (size_t i = 0; i < cpu.size(); ++i)
        if (got[i] != cpu[i] && !(std::fabs(got[i] - cpu[i]) <= 1e-5f + 2e-7f * std::fabs(cpu[i])))
          test::fail("log_share %zu: %g, expected %g", i, double(got[i]), double(cpu[i]));
    }
}

void check(const Problem& p) {
  check_missing(p);
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
    check_log_share(seed);
    if (seed % 3) continue;
    test::name("sparse route %llu", static_cast<unsigned long long>(seed));
    test::make_sparse(seed, p);
    check(p);
    check_lists(p);
  }
  return test::done();
}
