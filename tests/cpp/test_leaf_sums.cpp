// SPDX-License-Identifier: Apache-2.0
// Leaf sums are the definition's, stand in order, add up, and are the same bits for any number of workers.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "definition.h"
#include "support.h"

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
            {bias.data(), {rows}},      {spread.data(), {rows}},     {codes.data(), {rows, 2}}};
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
    in.histories = test::histories(offsets);
    in.bias = {bias.data(), {rows}};
    in.spread = {spread.data(), {rows}};
    in.codes = {codes.data(), {rows, 2}};
    in.book = &book;
  }
  Codebook book;
  std::vector<int64_t> offsets;
  int64_t rows;
  std::vector<float> x, v, bias, spread;
  std::vector<int32_t> codes;
  RouteInputs in;
};

}  // namespace

TEST_CASE("leaf_sums: means, masses and spreads are the definition's") {
  Random random(50);
  Batch batch(random, {0, 9000, 9000, 9100});
  Sums sums(batch.rows);
  REQUIRE(test::exactly(leaf_sums_workspace(test::sizing(1), batch.in, 9000), nullptr,
                        [&](const Context& c) { return leaf_sums(c, batch.in, sums.out()); }));
  CHECK(sums.intact());
  CHECK(sums.offsets.data()[1] == sums.offsets.data()[2]);
  for (int64_t b = 0; b < kUsers; ++b) {
    definition::User user;
    std::vector<uint64_t> leaf;
    for (int64_t i = batch.offsets[test::size(b)]; i < batch.offsets[test::size(b + 1)]; ++i) {
      const float *const x = batch.x.data() + i * kWidth, *const v = batch.v.data() + i * kValues;
      const int32_t* const codes = batch.codes.data() + i * 2;
      if (!batch.book.valid(codes) || std::isnan(x[0]) || std::isinf(batch.bias[test::size(i)])) continue;
      user.x.push_back({x, x + kWidth});
      user.v.push_back({v, v + kValues});
      user.bias.push_back(double(batch.bias[test::size(i)]));
      user.spread.push_back(double(batch.spread[test::size(i)]));
      leaf.push_back(batch.book.leaf(codes));
    }
    const int64_t first = sums.offsets.data()[b], n = sums.offsets.data()[b + 1] - first;
    if (leaf.empty()) {
      CHECK(n == 0);
      continue;
    }
    const definition::User expected = definition::by_leaf(user, leaf);
    REQUIRE(n == static_cast<int64_t>(expected.x.size()));
    std::sort(leaf.begin(), leaf.end());
    leaf.erase(std::unique(leaf.begin(), leaf.end()), leaf.end());
    for (int64_t g = 0; g < n; ++g) {
      CHECK(batch.book.leaf(sums.codes.data() + (first + g) * 2) == leaf[test::size(g)]);
      CHECK(double(sums.bias.data()[first + g]) == doctest::Approx(expected.bias[test::size(g)]).epsilon(1e-6));
      CHECK(double(sums.spread.data()[first + g]) == doctest::Approx(expected.spread[test::size(g)]).epsilon(1e-5));
      for (int64_t d = 0; d < kWidth; ++d)
        CHECK(double(sums.x.data()[(first + g) * kWidth + d]) ==
              doctest::Approx(expected.x[test::size(g)][test::size(d)]).epsilon(2e-6).scale(1));
      for (int64_t d = 0; d < kValues; ++d)
        CHECK(double(sums.v.data()[(first + g) * kValues + d]) ==
              doctest::Approx(expected.v[test::size(g)][test::size(d)]).epsilon(2e-6).scale(1));
    }
  }
}

TEST_CASE("leaf_sums: the same bits for any workers and any batch") {
  Random random(51);
  Batch batch(random, {0, 30000, 30050, 52000});
  Sums serial(batch.rows);
  REQUIRE(test::exactly(leaf_sums_workspace(test::sizing(1), batch.in, 30000), nullptr,
                        [&](const Context& c) { return leaf_sums(c, batch.in, serial.out()); }));
  for (int workers : {2, 7}) {
    test::Backwards manner{workers, 1};
    const Executor executor = manner.executor();
    Sums shared(batch.rows);
    REQUIRE(test::exactly(leaf_sums_workspace(test::sizing(workers), batch.in, 30000), &executor,
                          [&](const Context& c) { return leaf_sums(c, batch.in, shared.out()); }));
    CHECK(std::memcmp(serial.x.data(), shared.x.data(), test::size(serial.x.count()) * 4) == 0);
    CHECK(std::memcmp(serial.v.data(), shared.v.data(), test::size(serial.v.count()) * 4) == 0);
    CHECK(std::memcmp(serial.spread.data(), shared.spread.data(), test::size(serial.rows) * 4) == 0);
    CHECK(std::memcmp(serial.bias.data(), shared.bias.data(), test::size(serial.rows) * 4) == 0);
  }
  const int64_t last[] = {batch.offsets[2], batch.offsets[3]}, first = serial.offsets.data()[2];
  RouteInputs alone = batch.in;
  alone.histories = {last, last + 1, DType::int64, 1};
  Sums one(batch.rows);
  LeafSums out = one.out();
  out.offsets.shape[0] = 2;
  REQUIRE(test::exactly(leaf_sums_workspace(test::sizing(1), alone, 21950), nullptr,
                        [&](const Context& c) { return leaf_sums(c, alone, out); }));
  const int64_t n = one.offsets.data()[1];
  REQUIRE(n == serial.offsets.data()[3] - first);
  CHECK(std::memcmp(one.x.data(), serial.x.data() + first * kWidth, test::size(n * kWidth) * 4) == 0);
  CHECK(std::memcmp(one.bias.data(), serial.bias.data() + first, test::size(n) * 4) == 0);
}

TEST_CASE("leaf_sums: errors") {
  Random random(52);
  Batch batch(random, {0, 10, 10, 20});
  Sums sums(20);
  test::Workspace workspace(1 << 20);
  const Context context{workspace.array(), nullptr};
  const auto error = [&](auto spoil) {
    RouteInputs in = batch.in;
    LeafSums out = sums.out();
    spoil(in, out);
    const Status status = leaf_sums(context, in, out);
    CHECK(status.code() == Code::invalid_argument);
    return std::string(status.what());
  };
  const char* const shapes =
      "leaf_sums: out expected offsets [4] and at least 20 rows of x [7], v [5], bias, spread and codes [2]";
  CHECK(error([](RouteInputs&, LeafSums& out) { out.x.shape[0] = 19; }) == shapes);
  CHECK(error([](RouteInputs&, LeafSums& out) { out.v.shape[1] = 4; }) == shapes);
  CHECK(error([](RouteInputs&, LeafSums& out) { out.bias.shape[0] = 19; }) == shapes);
  CHECK(error([](RouteInputs&, LeafSums& out) { out.spread.shape[0] = 0; }) == shapes);
  CHECK(error([](RouteInputs&, LeafSums& out) { out.offsets.shape[0] = 3; }) == shapes);
  CHECK(error([](RouteInputs&, LeafSums& out) { out.codes.shape[1] = 3; }) == shapes);
  CHECK(error([](RouteInputs& in, LeafSums&) { in.spread.shape[0] = 19; }) ==
        "leaf_sums: spread expected [20], got [19]");
  CHECK(error([](RouteInputs& in, LeafSums&) { in.codes = {}; }) ==
        "leaf_sums: codes expected where x is not given and with the leaf method, got none");
  CHECK(error([](RouteInputs& in, LeafSums&) { in.book = nullptr; }) ==
        "leaf_sums: codebook expected, got an empty one");
  const Status small = leaf_sums({}, batch.in, sums.out());
  CHECK(std::string(small.what()).find("leaf_sums: workspace expected at least ") == 0);
}
