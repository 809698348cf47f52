// SPDX-License-Identifier: Apache-2.0
// Leaf sums are what hisac.reference says, and they and their gradients have the same bits for any number of workers.
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

/// Memory for the sums of some users: of all together, or of each where its rows are.
struct Sums {
  explicit Sums(int64_t most, bool all_together = true, int64_t wide = kValues)
      : rows(most),
        together(all_together),
        x(most * kWidth),
        v(most * wide),
        bias(most),
        spread(most),
        starts(kUsers + 1),
        ends(kUsers),
        votes(most),
        codes(most * 2) {}
  LeafSums out(int64_t users = kUsers) {
    return {{x.data(), {rows, kWidth}},
            {v.data(), {rows, v.count() / rows}},
            {starts.data(), together ? starts.data() + 1 : ends.data(), users},
            {codes.data(), {rows, 2}},
            {bias.data(), {rows}},
            {spread.data(), {rows}},
            {votes.data(), {rows}}};
  }
  bool intact() {
    return x.intact() && v.intact() && bias.intact() && spread.intact() && starts.intact() && ends.intact() &&
           votes.intact() && codes.intact();
  }
  /// The bytes of a user's sums.
  std::vector<std::byte> of(int64_t user) {
    std::vector<std::byte> all;
    const int64_t start = starts.data()[user], end = (together ? starts.data() + 1 : ends.data())[user];
    const auto add = [&](auto& memory) {
      const int64_t each = memory.count() / rows * static_cast<int64_t>(sizeof *memory.data());
      const std::byte* const at = reinterpret_cast<const std::byte*>(memory.data());
      all.insert(all.end(), at + start * each, at + end * each);
    };
    for (Guarded<float>* a : {&x, &v, &bias, &spread}) add(*a);
    add(codes);
    add(votes);
    return all;
  }
  int64_t rows;
  bool together;
  Guarded<float> x, v, bias, spread;
  Guarded<int64_t> starts, ends, votes;
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
    for (int64_t i = 0; i < rows; ++i) weights.push_back(random.below(1000) - 10);
    in.x = test::rows(x, kWidth);
    in.v = test::rows(v, kValues);
    in.offsets = test::spans(offsets);
    in.codes = {codes.data(), {rows, 2}};
    in.bias = {bias.data(), {rows}};
    in.spread = {spread.data(), {rows}};
    in.weights = {weights.data(), DType::int64, rows};
  }
  Codebook book;
  std::vector<int64_t> offsets, weights;
  int64_t rows;
  std::vector<float> x, v, bias, spread;
  std::vector<int32_t> codes;
  Histories in;
};

/// leaf_sums by so many workers, in a workspace of exactly its size.
bool summed(const Codebook& book, const Histories& in, const LeafSums& out, int workers = 1) {
  test::Backwards manner{workers, 1};
  const Executor executor = manner.executor();
  return test::exactly(leaf_sums_workspace(test::sizing(workers), book, in), workers > 1 ? &executor : nullptr,
                       [&](const Context& c) { return leaf_sums(c, book, in, out); });
}

struct Manner {
  int workers = 1;
  int64_t first = 0;  // the number of the first user
  bool ones = false;  // every gradient is 1, in the first column of x and of v; otherwise of each user and leaf its own
  bool want_v = true, want_bias = true;
};

/// leaf_sums_backward from gradients of some of the sums' fields, in a workspace of exactly its size.
struct Back {
  std::vector<float> v, bias;

  Back(const Codebook& book, const Histories& in, Sums& sums, const std::string& of, const Manner& manner = {}) {
    const int64_t s = sums.rows, t = in.behaviours(), users = in.offsets.users;
    const LeafSums out = sums.out(users);
    std::vector<float> dx(test::size(s * kWidth), 1e30f), dv(test::size(s * kValues), 1e30f),
        dbias(test::size(s), 1e30f), dspread(test::size(s), 1e30f);
    for (int64_t b = 0; b < users; ++b)
      for (int64_t i = out.offsets.starts[b]; i < out.offsets.ends[b]; ++i) {
        Random random(
            static_cast<uint64_t>((manner.first + b) * 100 + out.codes.data[2 * i] * 10 + out.codes.data[2 * i + 1]));
        const auto draw = [&](int64_t column) { return manner.ones ? float(column == 0) : random.uniform(); };
        for (int64_t d = 0; d < kWidth; ++d) dx[test::size(i * kWidth + d)] = draw(d);
        for (int64_t d = 0; d < kValues; ++d) dv[test::size(i * kValues + d)] = draw(d);
        dbias[test::size(i)] = draw(0);
        dspread[test::size(i)] = draw(0);
      }
    const auto has = [&](const char* name) { return (" " + of + " ").find(std::string(" ") + name + " ") < of.size(); };
    LeafSumsForward forward{out.histories()};
    if (has("x")) forward.d_x = {dx.data(), {s, kWidth}};
    if (has("v")) forward.d_v = {dv.data(), {s, kValues}};
    if (has("bias")) forward.d_bias = {dbias.data(), {s}};
    if (has("spread")) forward.d_spread = {dspread.data(), {s}};
    Guarded<float> to_v(manner.want_v ? t * kValues : 0), to_bias(manner.want_bias ? t : 0);
    LeafSumsGradients to;
    if (manner.want_v) to.v = {to_v.data(), {t, kValues}};
    if (manner.want_bias) to.bias = {to_bias.data(), {t}};
    test::Backwards ranges{manner.workers, 1};
    const Executor executor = ranges.executor();
    REQUIRE(test::exactly(leaf_sums_backward_workspace(test::sizing(manner.workers), book, in, to),
                          manner.workers > 1 ? &executor : nullptr,
                          [&](const Context& c) { return leaf_sums_backward(c, book, in, forward, to); }));
    CHECK((to_v.intact() && to_bias.intact()));
    v = to_v.values();
    bias = to_bias.values();
  }
};

}  // namespace

TEST_CASE("leaf_sums: what the reference says") {
  for (const vectors::Case& c : vectors::cases("leaf_sums"))
    for (bool together : {true, false}) {
      const vectors::Routing r(c);
      const int64_t width = r.codebook->width(), wide = r.in.v.width, levels = r.codebook->levels();
      std::vector<int64_t> behind{0};  // the rows of the users before each
      for (int64_t b = 0; b < r.users; ++b)
        behind.push_back(behind.back() + r.in.offsets.end(b) - r.in.offsets.start(b));
      const int64_t rows = behind.back();
      Guarded<float> x(rows * width), v(rows * wide), bias(rows), spread(rows);
      Guarded<int64_t> starts(r.users + 1), ends(r.users), votes(rows);
      Guarded<int32_t> codes(rows * levels);
      const LeafSums out{{x.data(), {rows, width}},
                         {v.data(), {rows, wide}},
                         {starts.data(), together ? starts.data() + 1 : ends.data(), r.users},
                         {codes.data(), {rows, levels}},
                         {bias.data(), {rows}},
                         {spread.data(), {rows}},
                         {votes.data(), {rows}}};
      const size_t bytes = leaf_sums_workspace(test::sizing(1), *r.codebook, r.in);
      REQUIRE(test::exactly(bytes, nullptr,
                            [&](const Context& context) { return leaf_sums(context, *r.codebook, r.in, out); }));
      const Spans spans = out.histories().offsets;
      std::vector<int64_t> counted{0}, at;  // offsets, and the row of each sum
      for (int64_t b = 0; b < r.users; ++b) {
        CHECK(spans.start(b) == (together ? counted.back() : behind[test::size(b)]));
        counted.push_back(counted.back() + spans.end(b) - spans.start(b));
        for (int64_t s = spans.start(b); s < spans.end(b); ++s) at.push_back(s);
      }
      c.check_integers("sum offsets", counted);
      CHECK((starts.intact() && ends.intact()));
      const auto of_sums = [&](auto& a, int64_t n) {
        CHECK(a.intact());
        auto values = a.values();
        values.clear();
        for (int64_t s : at) values.insert(values.end(), a.data() + s * n, a.data() + (s + 1) * n);
        return values;
      };
      c.check_integers("sum codes", of_sums(codes, levels));
      c.check_integers("sum weights", of_sums(votes, 1));
      c.check_floats("sum x", of_sums(x, width));
      if (wide) c.check_floats("sum v", of_sums(v, wide));
      c.check_floats("sum bias", of_sums(bias, 1));
      c.check_floats("sum spread", of_sums(spread, 1));
    }
}

TEST_CASE("leaf_sums: the same bits for any workers, any batch, and wherever they lie") {
  Random random(51);
  Batch batch(random, {0, 30000, 30050, 52000});
  Sums serial(batch.rows);
  REQUIRE(summed(batch.book, batch.in, serial.out()));
  for (int workers : {1, 2, 7})
    for (bool together : {true, false}) {
      Sums shared(batch.rows, together);
      REQUIRE(summed(batch.book, batch.in, shared.out(), workers));
      CHECK(shared.intact());
      for (int64_t b = 0; b < kUsers; ++b) {
        CHECK(!serial.of(b).empty());
        CHECK((shared.of(b) == serial.of(b)));
        if (!together) CHECK(shared.starts.data()[b] == batch.offsets[test::size(b)]);
      }
      if (together) CHECK(shared.ends.holds(0x5a));
    }
  const int64_t last[] = {batch.offsets[2], batch.offsets[3]};
  Histories alone = batch.in;
  alone.offsets = {last, last + 1, DType::int64, 1};
  for (bool together : {true, false}) {
    Sums one(batch.rows, together);
    REQUIRE(summed(batch.book, alone, one.out(1)));
    CHECK((one.of(0) == serial.of(2)));
  }
}

TEST_CASE("leaf_sums: between the sums of users that lie apart nothing is written") {
  Random random(53);
  Batch batch(random, {0, 3000, 3500, 3500});  // each of a user's leaves has a present row
  Sums apart(batch.rows, false);
  REQUIRE(summed(batch.book, batch.in, apart.out()));
  Guarded<float> untouched(batch.rows * kWidth);
  for (int64_t b = 0; b < kUsers; ++b) {
    const int64_t end = apart.ends.data()[b], next = batch.offsets[test::size(b) + 1];
    const auto same = [&](auto& memory, int64_t n) {
      return std::memcmp(memory.data() + end * n, untouched.data(),
                         test::size((next - end) * n) * sizeof *memory.data()) == 0;
    };
    CHECK((b == 2 || next > end));
    CHECK((same(apart.x, kWidth) && same(apart.v, kValues) && same(apart.bias, 1) && same(apart.spread, 1) &&
           same(apart.codes, 2) && same(apart.votes, 1)));
  }
}

TEST_CASE("leaf_sums: without v the other sums have the same bits") {
  Random random(54);
  Batch batch(random, {0, 30000, 30000, 31000});
  Sums with(batch.rows), without(batch.rows, true, 0);
  REQUIRE(summed(batch.book, batch.in, with.out()));
  batch.in.v = {};
  REQUIRE(summed(batch.book, batch.in, without.out()));
  const int64_t n = with.starts.data()[kUsers];
  const auto same = [n](auto& a, auto& b, int64_t width) {
    return std::memcmp(a.data(), b.data(), test::size(n * width) * sizeof *a.data()) == 0;
  };
  CHECK((n > 0 && with.starts.values() == without.starts.values()));
  CHECK((same(with.x, without.x, kWidth) && same(with.codes, without.codes, 2)));
  CHECK((same(with.bias, without.bias, 1) && same(with.spread, without.spread, 1)));
  CHECK(same(with.votes, without.votes, 1));
}

TEST_CASE("leaf_sums: with a leaf that only votes the others have the same bits, and so have their gradients") {
  Random random(58);
  Batch batch(random, {0, 30000, 30050, 52000});
  std::vector<int32_t> without = batch.codes;
  const auto votes_only = [&](int64_t i) {
    return batch.codes[test::size(2 * i)] == 1 && batch.codes[test::size(2 * i + 1)] == 0;
  };
  for (int64_t i = 0; i < batch.rows; ++i) {
    if (!votes_only(i)) continue;
    batch.bias[test::size(i)] = std::numeric_limits<float>::quiet_NaN();
    without[test::size(2 * i)] = -1;
  }
  Histories fewer = batch.in;
  fewer.codes = {without.data(), {batch.rows, 2}};
  Sums all(batch.rows), some(batch.rows);
  REQUIRE(summed(batch.book, batch.in, all.out(), 3));
  REQUIRE(summed(batch.book, fewer, some.out(), 3));
  int64_t voters = 0;
  for (int64_t b = 0; b < kUsers; ++b) {
    std::vector<std::byte> others;
    std::vector<int64_t> leaves;
    for (int64_t i = all.starts.data()[b]; i < all.starts.data()[b + 1]; ++i) {
      const bool present = std::isfinite(all.bias.data()[i]);
      CHECK((present || all.codes.data()[2 * i] == 1));
      if (present) leaves.push_back(i);
      voters += !present;
    }
    const auto add = [&](auto& memory, int64_t n) {
      for (int64_t i : leaves) {
        const std::byte* const at = reinterpret_cast<const std::byte*>(memory.data() + i * n);
        others.insert(others.end(), at, at + test::size(n) * sizeof *memory.data());
      }
    };
    add(all.x, kWidth);
    add(all.v, kValues);
    add(all.bias, 1);
    add(all.spread, 1);
    add(all.codes, 2);
    add(all.votes, 1);
    CHECK((others == some.of(b)));
  }
  CHECK(voters == kUsers);
  const Back of_all(batch.book, batch.in, all, "x v bias spread"), of_some(batch.book, fewer, some, "x v bias spread");
  CHECK((of_all.v == of_some.v && of_all.bias == of_some.bias));
}

TEST_CASE("leaf_sums: route over them, wherever they lie; and where a leaf's rows are one x, as over the behaviours") {
  constexpr int64_t kAgents = 4;
  Random random(52);
  Batch batch(random, {0, 900, 900, 2100});
  std::vector<float> p = uniform(random, kUsers * kAgents * kWidth);
  const float tau = 2;
  RouteParams params;
  params.temperature = {&tau, {1}};
  const RouteAgents agents{{p.data(), {kUsers, kAgents, kWidth}}};
  const auto routed = [&](const Codebook* book, const Histories& in) {
    std::vector<float> out(test::size(kUsers * kAgents * (kValues + 1 + kWidth)));
    float *const lse = out.data() + kUsers * kAgents * kValues, *const mean_x = lse + kUsers * kAgents;
    const Tokens to{{out.data(), DType::float32, kUsers * kAgents, kValues},
                    {lse, {kUsers, kAgents}},
                    {mean_x, {kUsers, kAgents, kWidth}}};
    REQUIRE(test::exactly(route_workspace(test::sizing(1), book, params, in, agents, to), nullptr,
                          [&](const Context& c) { return route(c, book, params, in, agents, to); }));
    return out;
  };
  for (Normalize normalize : {Normalize::history, Normalize::agents})
    for (bool one_x : {false, true}) {
      CAPTURE(one_x);
      params.normalize = normalize;
      Histories in = batch.in;
      if (one_x) in.x = {};  // the prototypes of codes
      if (one_x) in.spread = {};
      Sums sums(batch.rows), apart(batch.rows, false);
      REQUIRE(summed(batch.book, in, sums.out()));
      REQUIRE(summed(batch.book, in, apart.out()));
      const std::vector<float> over_sums = routed(nullptr, sums.out().histories());
      CHECK(over_sums == routed(nullptr, apart.out().histories()));
      CHECK(over_sums == routed(&batch.book, sums.out().histories()));  // the codes of sums are valid
      CHECK(std::count_if(over_sums.begin(), over_sums.end(), [](float y) { return y != 0 && std::isfinite(y); }) >
            100);
      const std::vector<float> over_rows = routed(&batch.book, in);
      double most = 0;
      for (size_t i = 0; i < over_rows.size(); ++i)
        if (over_rows[i] != over_sums[i]) most = std::max(most, std::fabs(double(over_rows[i]) - double(over_sums[i])));
      CAPTURE(most);
      CHECK((one_x ? most < 2e-5 : most > 1e-3));
    }
}

TEST_CASE("leaf_sums_backward: the same bits for any workers, wherever the sums lie, whatever is wanted") {
  Random random(55);
  Batch batch(random, {0, 30000, 30050, 52000});
  Sums together(batch.rows), apart(batch.rows, false);
  REQUIRE(summed(batch.book, batch.in, together.out()));
  REQUIRE(summed(batch.book, batch.in, apart.out()));
  const Back serial(batch.book, batch.in, together, "x v bias spread");
  CHECK(std::count(serial.bias.begin(), serial.bias.end(), 0.f) < batch.rows / 5);
  CHECK(std::count(serial.v.begin(), serial.v.end(), 0.f) < batch.rows);
  for (int workers : {1, 2, 7})
    for (Sums* sums : {&together, &apart}) {
      const Back again(batch.book, batch.in, *sums, "x v bias spread", {workers});
      CHECK((again.v == serial.v && again.bias == serial.bias));
      const Back v(batch.book, batch.in, *sums, "x v bias spread", {workers, 0, false, true, false});
      const Back bias(batch.book, batch.in, *sums, "x v bias spread", {workers, 0, false, false, true});
      CHECK((v.v == serial.v && v.bias.empty() && bias.v.empty() && bias.bias == serial.bias));
    }
}

TEST_CASE("leaf_sums_backward: a leaf's shares sum to 1, and of its means a bias gets nothing in all") {
  Random random(56);
  Batch batch(random, {0, 5000, 5050, 7000});
  Sums sums(batch.rows);
  REQUIRE(summed(batch.book, batch.in, sums.out()));
  for (const char* of : {"bias", "v", "x"}) {
    CAPTURE(of);
    const Back ones(batch.book, batch.in, sums, of, {1, 0, true});
    for (int64_t i = 0; i < batch.rows; i += 31) CHECK(ones.bias[test::size(i)] == 0.f);  // a NaN in x
    for (int64_t b = 0; b < kUsers; ++b) {
      double bias = 0, moduli = 0, v = 0;
      for (int64_t i = batch.offsets[test::size(b)]; i < batch.offsets[test::size(b) + 1]; ++i) {
        bias += double(ones.bias[test::size(i)]);
        moduli += std::fabs(double(ones.bias[test::size(i)]));
        v += double(ones.v[test::size(i * kValues)]);
      }
      const auto leaves = static_cast<double>(sums.starts.data()[b + 1] - sums.starts.data()[b]);
      CHECK(moduli > 0);
      CHECK(std::fabs(bias - (std::string(of) == "bias" ? leaves : 0)) < 1e-5 * moduli);
      CHECK(std::fabs(v - (std::string(of) == "v" ? leaves : 0)) < 1e-5 * leaves);
    }
  }
}

TEST_CASE("leaf_sums_backward: a row of several histories gets what each gives it") {
  Random random(57);
  Batch batch(random, {0, 52000});
  const std::vector<int64_t> starts{0, 100, 20000}, ends{30000, 52000, 21000};
  Histories in = batch.in;
  in.offsets = {starts.data(), ends.data(), DType::int64, kUsers};
  Sums sums(90000);
  REQUIRE(summed(batch.book, in, sums.out()));
  const Back all(batch.book, in, sums, "x v bias spread");
  std::vector<double> v(all.v.size()), bias(all.bias.size());
  for (int64_t b = 0; b < kUsers; ++b) {
    in.offsets = {starts.data() + b, ends.data() + b, DType::int64, 1};
    Sums own(52000);
    REQUIRE(summed(batch.book, in, own.out(1)));
    CHECK((own.of(0) == sums.of(b)));
    const Back one(batch.book, in, own, "x v bias spread", {1, b});
    test::add(v, one.v);
    test::add(bias, one.bias);
  }
  CHECK(test::nearly(all.v, v));
  CHECK(test::nearly(all.bias, bias));
  in.offsets = {starts.data(), ends.data(), DType::int64, kUsers};
  for (int workers : {2, 7}) {
    const Back again(batch.book, in, sums, "x v bias spread", {workers});
    CHECK((again.v == all.v && again.bias == all.bias));
  }
}
