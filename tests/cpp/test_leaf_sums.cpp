// SPDX-License-Identifier: Apache-2.0
// Leaf sums are what hisac.reference says, and the same bits for any number of workers.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "support.h"
#include "vectors.h"

using namespace hisac;
using test::Guarded;
using test::Random;
using test::uniform;

namespace {

constexpr int64_t kWidth = 7, kValues = 5, kUsers = 3;

struct Sums {
  explicit Sums(int64_t most)
      : rows(most),
        x(most * kWidth),
        v(most * kValues),
        bias(most),
        spread(most),
        offsets(kUsers + 1),
        codes(most * 2) {}
  LeafSums out() {
    return {{x.data(), {rows, kWidth}}, {v.data(), {rows, kValues}}, {offsets.data(), {kUsers + 1}},
            {codes.data(), {rows, 2}},  {bias.data(), {rows}},       {spread.data(), {rows}}};
  }
  bool intact() {
    return x.intact() && v.intact() && bias.intact() && spread.intact() && offsets.intact() && codes.intact();
  }
  int64_t rows;
  Guarded<float> x, v, bias, spread;
  Guarded<int64_t> offsets;
  Guarded<int32_t> codes;
};

struct Batch {
  explicit Batch(Random& random, std::vector<int64_t> at)
      : book(test::codebook(random, {3, 2}, kWidth)),
        offsets(std::move(at)),
        rows(offsets.back()),
        x(uniform(random, rows * kWidth)),
        v(uniform(random, rows * kValues)),
        bias(uniform(random, rows, 3)),
        spread(uniform(random, rows)),
        codes(test::size(rows * 2)) {
    for (int32_t& c : codes) c = static_cast<int32_t>(random.below(40) ? random.below(2) : -1);
    for (int64_t i = 0; i < rows; ++i) codes[test::size(2 * i)] += codes[test::size(2 * i)] > 0 && random.below(2);
    for (float& s : spread) s = std::fabs(s);
    for (int64_t i = 0; i < rows; i += 31) x[test::size(i * kWidth)] = std::numeric_limits<float>::quiet_NaN();
    for (int64_t i = 1; i < rows; i += 37) bias[test::size(i)] = std::numeric_limits<float>::infinity();
    in.x = test::rows(x, kWidth);
    in.v = test::rows(v, kValues);
    in.offsets = test::spans(offsets);
    in.codes = {codes.data(), {rows, 2}};
    in.bias = {bias.data(), {rows}};
    in.spread = {spread.data(), {rows}};
  }
  Codebook book;
  std::vector<int64_t> offsets;
  int64_t rows;
  std::vector<float> x, v, bias, spread;
  std::vector<int32_t> codes;
  Histories in;
};

}  // namespace

TEST_CASE("leaf_sums: what the reference says") {
  for (const vectors::Case& c : vectors::cases("leaf_sums")) {
    const vectors::Routing r(c);
    const int64_t width = r.codebook->width(), wide = r.in.v.width, levels = r.codebook->levels();
    int64_t rows = 0;
    for (int64_t b = 0; b < r.users; ++b) rows += r.in.offsets.end(b) - r.in.offsets.start(b);
    Guarded<float> x(rows * width), v(rows * wide), bias(rows), spread(rows);
    Guarded<int64_t> offsets(r.users + 1);
    Guarded<int32_t> codes(rows * levels);
    REQUIRE(test::exactly(leaf_sums_workspace(test::sizing(1), *r.codebook, r.in, vectors::longest(c)), nullptr,
                          [&](const Context& context) {
                            return leaf_sums(context, *r.codebook, r.in,
                                             {{x.data(), {rows, width}},
                                              {v.data(), {rows, wide}},
                                              {offsets.data(), {r.users + 1}},
                                              {codes.data(), {rows, levels}},
                                              {bias.data(), {rows}},
                                              {spread.data(), {rows}}});
                          }));
    c.check_integers("sum offsets", offsets.values());
    const int64_t sums = offsets.data()[r.users];
    const auto first = [&](auto& a, int64_t n) {
      CHECK(a.intact());
      auto values = a.values();
      values.resize(test::size(sums * n));
      return values;
    };
    c.check_integers("sum codes", first(codes, levels));
    c.check_floats("sum x", first(x, width));
    c.check_floats("sum v", first(v, wide));
    c.check_floats("sum bias", first(bias, 1));
    c.check_floats("sum spread", first(spread, 1));
  }
}

TEST_CASE("leaf_sums: the same bits for any workers and any batch") {
  Random random(51);
  Batch batch(random, {0, 30000, 30050, 52000});
  Sums serial(batch.rows);
  REQUIRE(test::exactly(leaf_sums_workspace(test::sizing(1), batch.book, batch.in, 30000), nullptr,
                        [&](const Context& c) { return leaf_sums(c, batch.book, batch.in, serial.out()); }));
  for (int workers : {2, 7}) {
    test::Backwards manner{workers, 1};
    const Executor executor = manner.executor();
    Sums shared(batch.rows);
    REQUIRE(test::exactly(leaf_sums_workspace(test::sizing(workers), batch.book, batch.in, 30000), &executor,
                          [&](const Context& c) { return leaf_sums(c, batch.book, batch.in, shared.out()); }));
    CHECK(std::memcmp(serial.x.data(), shared.x.data(), test::size(serial.x.count()) * 4) == 0);
    CHECK(std::memcmp(serial.v.data(), shared.v.data(), test::size(serial.v.count()) * 4) == 0);
    CHECK(std::memcmp(serial.spread.data(), shared.spread.data(), test::size(serial.rows) * 4) == 0);
    CHECK(std::memcmp(serial.bias.data(), shared.bias.data(), test::size(serial.rows) * 4) == 0);
  }
  const int64_t last[] = {batch.offsets[2], batch.offsets[3]}, first = serial.offsets.data()[2];
  Histories alone = batch.in;
  alone.offsets = {last, last + 1, DType::int64, 1};
  Sums one(batch.rows);
  LeafSums out = one.out();
  out.offsets.shape[0] = 2;
  REQUIRE(test::exactly(leaf_sums_workspace(test::sizing(1), batch.book, alone, 21950), nullptr,
                        [&](const Context& c) { return leaf_sums(c, batch.book, alone, out); }));
  const int64_t n = one.offsets.data()[1];
  REQUIRE(n == serial.offsets.data()[3] - first);
  CHECK(std::memcmp(one.x.data(), serial.x.data() + first * kWidth, test::size(n * kWidth) * 4) == 0);
  CHECK(std::memcmp(one.bias.data(), serial.bias.data() + first, test::size(n) * 4) == 0);
}

TEST_CASE("leaf_sums: route over them is route by Method::leaf") {
  constexpr int64_t kAgents = 4;
  Random random(52);
  Batch batch(random, {0, 900, 900, 2100});
  std::vector<float> p = uniform(random, kUsers * kAgents * kWidth);
  const float tau = 2;
  RouteParams params;
  params.temperature = {&tau, {1}};
  const RouteAgents agents{{p.data(), {kUsers, kAgents, kWidth}}};
  const auto routed = [&](const Codebook* book, const RouteParams& by, const Histories& in) {
    std::vector<float> out(test::size(kUsers * kAgents * (kValues + 1)));
    float* const lse = out.data() + kUsers * kAgents * kValues;
    const Tokens to{{out.data(), DType::float32, kUsers * kAgents, kValues}, {lse, {kUsers, kAgents}}};
    REQUIRE(test::exactly(route_workspace(test::sizing(1), book, by, in, agents, in.behaviours()), nullptr,
                          [&](const Context& c) { return route(c, book, by, in, agents, to); }));
    return out;
  };
  Sums sums(batch.rows);
  REQUIRE(test::exactly(leaf_sums_workspace(test::sizing(1), batch.book, batch.in, 1200), nullptr,
                        [&](const Context& c) { return leaf_sums(c, batch.book, batch.in, sums.out()); }));
  const std::vector<float> over_sums = routed(nullptr, params, sums.out().histories());
  params.method = Method::leaf;
  CHECK(over_sums == routed(&batch.book, params, batch.in));
  CHECK(std::any_of(over_sums.begin(), over_sums.end(), [](float y) { return y != 0 && std::isfinite(y); }));
}
