// SPDX-License-Identifier: Apache-2.0
// A context on CUDA: refused before enable_cuda and by `fit`, shapes checked first, then on the device's kernels: by
// `sum_rows`, whose own test this is; the other verbs come this way in tests/cuda/test_cuda.py.
#include "hisac/cuda.h"
#include "simt_test.h"

namespace {

using namespace hisac;

const Context on_device{{}, nullptr, Device::cuda, nullptr, {}};

void expect(const Status& status, Code code, const char* text) {
  if (status.code() != code || std::string(status.what()) != text)
    test::fail("got %s, expected %s", status.what(), text);
}

template <class Call>
void reaches_the_device(const char* verb, Call call) {
  test::name("%s", verb);
  const int64_t before = simt::counts.launches;
  const Status status = call();
  if (!status.ok()) test::fail("%s", status.what());
  if (simt::counts.launches == before) test::fail("no kernel ran");
}

struct Listed {
  std::vector<float> rows;
  std::vector<int64_t> order, begin;
  int64_t count, width;
  std::vector<float> sums(const Context& context) const {
    test::Guarded<float> out(test::size((static_cast<int64_t>(begin.size()) - 1) * width));
    const Status status =
        sum_rows(context, {rows.data(), {count, width}}, {order.data(), {static_cast<int64_t>(order.size())}},
                 {begin.data(), {static_cast<int64_t>(begin.size())}},
                 {out.data(), {static_cast<int64_t>(begin.size()) - 1, width}});
    if (!status.ok()) test::fail("%s", status.what());
    if (!out.intact()) test::fail("a result's end was overwritten");
    return out.values();
  }
};

Listed listed(uint64_t seed) {
  test::Random r(seed);
  Listed p;
  p.count = 1 + r.below(50);
  p.width = 1 + r.below(70);
  p.rows = test::uniform(r, p.count * p.width);
  const int64_t groups = r.below(20);
  for (int64_t i = 0; i < 200; ++i) p.order.push_back(r.below(p.count + 4) - 2);  // some outside
  for (int64_t g = 0; g <= groups; ++g) p.begin.push_back(g == 0 && r.below(2) ? -3 : r.below(220));
  return p;
}

}  // namespace

int main(int argc, char** argv) {
  test::options(argc, argv);
  test::name("before enable_cuda");
  const Listed p = listed(0);
  float unused[1] = {};
  expect(sum_rows(on_device, {unused, {0, 1}}, {p.order.data(), {1}}, {p.begin.data(), {1}}, {unused, {0, 1}}),
         Code::not_implemented, "sum_rows: expected enable_cuda() before a call on CUDA");
  if (const Status status = enable_cuda(); !status.ok()) test::fail("%s", status.what());
  expect(fit(on_device, {}, {}, nullptr, nullptr), Code::not_implemented,
         "fit: expected a context on the CPU, got one on CUDA");
  expect(sum_rows(on_device, {unused, {0, 1}}, {p.order.data(), {1}}, {p.begin.data(), {2}}, {unused, {0, 1}}),
         Code::invalid_argument, "sum_rows: begin expected [1], got [2]");
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const Listed q = listed(seed);
    std::vector<float> got;
    if (q.begin.size() > 1) reaches_the_device("sum_rows", [&] { return got = q.sums(on_device), Status(); });
    const std::vector<float> cpu = q.sums({});
    if (got.size() != cpu.size() || (!cpu.empty() && std::memcmp(got.data(), cpu.data(), cpu.size() * 4) != 0))
      test::fail("sum_rows: other bits than the CPU's");
  }
  return test::done();
}
