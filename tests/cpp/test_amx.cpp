// SPDX-License-Identifier: Apache-2.0
// Products on the scalar emulation of the AMX unit. They are within the bounds of amx.h for any shape and exact where
// sums are exact. They read and write no memory out of bounds, break no rule of the architecture, and take the tile
// steps that the limit model counts. Where the processor has AMX, the instructions give the bits of the emulation.
#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <thread>
#include <type_traits>

#include "amx_emulation.h"
#include "support.h"

using namespace hisac::simd;
using test::Guarded;
using test::Random;
using test::size;

namespace {

constexpr double kU = 0x1p-24, kSecondOrder = 1 + 0x1p-14, kNormal = 0x1p-126;
constexpr Kernels kEmulated = Products<EmulatedTiles>::replaced_in({});

uint32_t bf16(float x) {
  const uint32_t bits = bits_of(x);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

float wide(uint32_t half) { return float_of(half << 16); }

/// Values [rows, 2 k] in pairs along the contraction, as the hi and lo of bf16x3.
struct Bf16x3 {
  std::vector<uint32_t> hi, lo;
};

/// pair(i) gives the two values of element i.
template <class Pair>
Bf16x3 to_bf16x3(int64_t n, Pair pair) {
  Bf16x3 out{std::vector<uint32_t>(size(n)), std::vector<uint32_t>(size(n))};
  for (int64_t i = 0; i < n; ++i) {
    const std::pair<float, float> x = pair(i);
    const uint32_t a = bf16(x.first), b = bf16(x.second);
    out.hi[size(i)] = b << 16 | a;
    out.lo[size(i)] = bf16(x.second - wide(b)) << 16 | bf16(x.first - wide(a));
  }
  return out;
}

/// A matrix of `rows` rows with the given stride, NaN in the padding; of the last row only `width` elements exist.
Guarded<uint32_t> strided(const std::vector<uint32_t>& values, int64_t rows, int64_t width, int64_t stride,
                          int64_t padded = 0) {
  std::vector<uint32_t> out(size(padded > 0 ? padded * stride : (rows - 1) * stride + width), 0x7fc07fc0u);
  for (int64_t i = 0; i < rows; ++i) std::copy_n(values.begin() + i * width, width, out.begin() + i * stride);
  return Guarded<uint32_t>(out);
}

/// B [k, m] from its rows, with the kernels' own packing.
Guarded<uint32_t> packed(const std::vector<uint32_t>& rows, int64_t k, int64_t m) {
  std::vector<uint32_t> out(size(packed_size(k, m)));
  kernels().pack_rows(k, m, reinterpret_cast<const float*>(rows.data()), m, reinterpret_cast<float*>(out.data()));
  return Guarded<uint32_t>(out);
}

int64_t rows8(int64_t n) { return (n + kRowStep - 1) / kRowStep * kRowStep; }

enum class Kind { integers, any, tiny };

float value(Random& random, Kind kind, bool bf16x3) {
  if (kind == Kind::integers) return static_cast<float>(random.below(bf16x3 ? 2001 : 17) - (bf16x3 ? 1000 : 8));
  const float x = std::ldexp(random.uniform(), static_cast<int>(random.below(kind == Kind::tiny ? 12 : 20)) - 10);
  return (bf16x3 ? x : wide(bf16(x))) * (kind == Kind::tiny ? 0x1p-65f : 1.f);
}

/// One entry's exact sum over the contraction of what was given (bf16x3: of hi + lo), its size and flush.
struct Exact {
  double sum = 0, products = 0, operands = 0, three = 0;
  void add(float a, float b, bool bf16x3) {
    sum += double(a) * double(b);
    products += std::fabs(double(a) * double(b));
    operands += std::fabs(double(a)) + std::fabs(double(b));
    const float ah = wide(bf16(a)), bh = wide(bf16(b)), al = wide(bf16(a - ah)), bl = wide(bf16(b - bh));
    three +=
        bf16x3 ? double(ah) * double(bh) + double(ah) * double(bl) + double(al) * double(bh) : double(a) * double(b);
  }
};

/// The bounds of amx.h; `added`: |c| where the product is added to it.
double bound(const Exact& x, int64_t k2, bool bf16x3, double added, bool adds) {
  const double s = static_cast<double>((k2 + 15) / 16), d = static_cast<double>(std::min<int64_t>(k2, 16));
  const double flush = kNormal * (x.operands + (2 * d + 3) * s);
  const double roundings = bf16x3 ? 1.016 * (d + 3 * s - 1 + adds) : d + s - 1 + adds;
  return kSecondOrder * ((bf16x3 ? 0x1p-15 : 0) + roundings * kU) * x.products + (bf16x3 ? 2 : s) * kU * added +
         (bf16x3 ? 3 : 1) * flush;
}

struct Largest {
  double error = 0;
  void entry(double got, double exact, double most, double equal, bool exactly) {
    CHECK(std::fabs(got - exact) <= most);
    if (exactly) CHECK(got == equal);
    if (most > 0) error = std::max(error, std::fabs(got - exact) / most);
  }
};

/// z = a B on `table`; returns z's bits.
std::vector<float> matmul(const Kernels& table, Random random, int64_t n, int64_t k2, int64_t m, bool bf16x3, Kind kind,
                          Largest* largest = nullptr) {
  std::vector<std::pair<float, float>> av(size(n * k2)), bv(size(k2 * m));
  for (auto* side : {&av, &bv})
    for (auto& x : *side) x = {value(random, kind, bf16x3), value(random, kind, bf16x3)};
  const Bf16x3 a = to_bf16x3(n * k2, [&](int64_t i) { return av[size(i)]; });
  const Bf16x3 b = to_bf16x3(k2 * m, [&](int64_t i) { return bv[size(i)]; });
  const int64_t lda = k2 + random.below(20), ldz = pad(m) + 16 * random.below(2);
  Guarded<uint32_t> a_hi = strided(a.hi, n, k2, lda, rows8(n)), a_lo = strided(a.lo, n, k2, lda, rows8(n));
  Guarded<uint32_t> b_hi = packed(b.hi, k2, m), b_lo = packed(b.lo, k2, m);
  Guarded<float> z(rows8(n) * ldz);
  if (bf16x3)
    table.matmul_bf16x3(static_cast<int>(n), k2, m, a_hi.data(), a_lo.data(), lda, b_hi.data(), b_lo.data(), z.data(),
                        ldz, nullptr);
  else
    table.matmul_bf16(static_cast<int>(n), k2, m, a_hi.data(), lda, b_hi.data(), z.data(), ldz, nullptr);
  CHECK((z.intact() && a_hi.intact() && b_hi.intact()));
  std::vector<float> out;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      out.push_back(z.data()[i * ldz + j]);
      if (!largest) continue;
      Exact x;
      for (int64_t k = 0; k < k2; ++k) {
        x.add(av[size(i * k2 + k)].first, bv[size(k * m + j)].first, bf16x3);
        x.add(av[size(i * k2 + k)].second, bv[size(k * m + j)].second, bf16x3);
      }
      largest->entry(double(out.back()), x.sum, bound(x, k2, bf16x3, 0, false), x.three, kind == Kind::integers);
    }
  return out;
}

/// c += v^T e on `table`; returns c's bits.
std::vector<float> accumulate(const Kernels& table, Random random, int64_t n2, int64_t w, int64_t m, bool bf16x3,
                              Kind kind, Largest* largest = nullptr) {
  std::vector<std::pair<float, float>> vv(size(n2 * w)), ev(size(n2 * m));
  for (auto* side : {&vv, &ev})
    for (auto& x : *side) x = {value(random, kind, bf16x3), value(random, kind, bf16x3)};
  const Bf16x3 v = to_bf16x3(n2 * w, [&](int64_t i) { return vv[size(i)]; });
  const Bf16x3 e = to_bf16x3(n2 * m, [&](int64_t i) { return ev[size(i)]; });
  const int64_t ldv = w + random.below(20), lde = pad(m) + 16 * random.below(2), ldc = pad(m);
  Guarded<uint32_t> v_hi = strided(v.hi, n2, w, ldv), v_lo = strided(v.lo, n2, w, ldv);
  Guarded<uint32_t> e_hi = strided(e.hi, n2, m, lde, n2), e_lo = strided(e.lo, n2, m, lde, n2);
  std::vector<float> before(size(rows8(w) * ldc));
  for (float& x : before) x = value(random, kind, true);
  Guarded<float> c(before);
  if (bf16x3)
    table.accumulate_bf16x3(static_cast<int>(n2), w, m, v_hi.data(), v_lo.data(), ldv, e_hi.data(), e_lo.data(), lde,
                            c.data(), ldc);
  else
    table.accumulate_bf16(static_cast<int>(n2), w, m, v_hi.data(), ldv, e_hi.data(), lde, c.data(), ldc);
  CHECK((c.intact() && v_hi.intact() && e_hi.intact()));
  std::vector<float> out;
  for (int64_t i = 0; i < w; ++i)
    for (int64_t j = 0; j < m; ++j) {
      out.push_back(c.data()[i * ldc + j]);
      if (!largest) continue;
      Exact x;
      for (int64_t k = 0; k < n2; ++k) {
        x.add(vv[size(k * w + i)].first, ev[size(k * m + j)].first, bf16x3);
        x.add(vv[size(k * w + i)].second, ev[size(k * m + j)].second, bf16x3);
      }
      const double start = double(before[size(i * ldc + j)]);
      largest->entry(double(out.back()), start + x.sum, bound(x, n2, bf16x3, std::fabs(start), true), start + x.three,
                     kind == Kind::integers);
    }
  return out;
}

constexpr Kind kKinds[] = {Kind::integers, Kind::any, Kind::tiny};

// One template makes both tables: what the emulation is tested for is what the instructions run.
template <class>
struct Made;
template <template <class> class Template, class Tiles>
struct Made<Template<Tiles>> {
  template <class Other>
  using by = Template<Other>;
};
#if defined(__x86_64__)
static_assert(std::is_same_v<Made<Products<Hardware>>::by<EmulatedTiles>, Products<EmulatedTiles>>);
[[maybe_unused]] constexpr Kernels kInstructions = Products<Hardware>::replaced_in({});  // compiles for both
#endif

TEST_CASE("products of any shape: within the bounds, exact where sums are exact") {
  Random random(1);
  Largest one_pass, three_passes;
  for (int round = 0; round < 60; ++round) {
    const int64_t n = 1 + random.below(round % 10 ? 66 : 140), k2 = 1 + random.below(70), m = 1 + random.below(90);
    const bool bf16x3 = round % 2;
    const Kind kind = kKinds[round % 3];
    CAPTURE(n);
    CAPTURE(k2);
    CAPTURE(m);
    CAPTURE(bf16x3);
    matmul(kEmulated, random, n, k2, m, bf16x3, kind, bf16x3 ? &three_passes : &one_pass);
    CHECK(!EmulatedTiles::state().configured);
    accumulate(kEmulated, random, 1 + k2 % 32, 1 + random.below(round % 10 ? 66 : 140), m, bf16x3, kind,
               bf16x3 ? &three_passes : &one_pass);
    CHECK(!EmulatedTiles::state().configured);
  }
  MESSAGE("largest share of the bound: one pass ", one_pass.error, ", three passes ", three_passes.error);
}

TEST_CASE("products at the edges of tiles") {
  Largest largest;
  for (int64_t n : {1, 8, 9, 16, 17, 24, 25, 40, 48, 56, 64, 65})
    for (int64_t k2 : {1, 15, 16, 17, 18, 33, 50})
      for (bool bf16x3 : {false, true}) {
        CAPTURE(n);
        CAPTURE(k2);
        matmul(kEmulated, Random(static_cast<uint64_t>(n)), n, k2, n % 3 * 16 + 33, bf16x3, Kind::integers, &largest);
        accumulate(kEmulated, Random(static_cast<uint64_t>(k2)), k2, n, k2 + 1, bf16x3, Kind::integers, &largest);
      }
}

TEST_CASE("bf16x3: what it leaves out is at most 2^-15 of a product, and can be nearly that") {
  double rest = 0, left_out = 0;
  for (uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += 61) {
    const float x = float_of(0x3f800000u | mantissa), hi = wide(bf16(x)), lo = wide(bf16(x - hi));
    rest = std::max(rest, std::fabs(double(x) - double(hi) - double(lo)) / double(x));
    const double exact = double(x) * double(x), three = double(hi) * double(hi) + 2 * double(hi) * double(lo);
    left_out = std::max(left_out, std::fabs(exact - three) / exact);
  }
  CHECK(rest <= 0x1p-17);
  CHECK(left_out <= 0x1p-15);
  CHECK(left_out > 0.95 * 0x1p-15);
}

TEST_CASE("the emulation's arithmetic: bf16x3 chains a dot, rounded to nearest even, without denormals") {
  TileConfig c{};
  c.palette = 1;
  for (int t : {0, 1, 2}) c.rows[t] = t == 2 ? 2 : 1, c.row_bytes[t] = t == 1 ? 8 : 4;
  uint32_t a[2] = {}, b[2] = {};
  float sum = 0;
  const auto dot = [&](float a0, float a1, float a2, float a3, float start) {
    a[0] = bf16(a1) << 16 | bf16(a0);
    a[1] = bf16(a3) << 16 | bf16(a2);
    EmulatedTiles::configure(c);
    EmulatedTiles::load<0>(&start, 4);
    EmulatedTiles::load<1>(a, 8);
    EmulatedTiles::load<2>(b, 4);
    EmulatedTiles::dot<0, 1, 2>();
    EmulatedTiles::store<0>(&sum, 4);
    EmulatedTiles::release();
    return sum;
  };
  b[0] = b[1] = bf16(1) << 16 | bf16(1);
  CHECK(dot(1, 2, 3, 4, 5) == 15);
  // even halves 2^24 + 1 round to 2^24, odd ones to 1 + 2: one chain would give 2^24 + 4, from the start 2^24 + 2
  CHECK(dot(0x1p24f, 1, 1, 2, 0) == 0x1p24f + 4);  // 2^24 + 3 is a tie, to even
  CHECK(dot(0x1p24f, 0, -0x1p24f, 1, 1) == 2);     // cancels within its chain
  CHECK(dot(0x1p24f, -0x1p24f, 1, 1, 0) == 1);     // 2^24 + (-2^24 + 1): the ones were rounded in each chain apart
  CHECK(dot(0x1p-127f, 0, 0, 0, 0) == 0);          // a denormal operand
  CHECK(dot(0, 0, 0, 0, 0x1p-127f) == 0);          // a denormal sum
  CHECK(dot(0x1p-126f, 0, 0, 0, 0) == 0x1p-126f);
  CHECK(dot(-0x1.8p-126f, 0, 0x1p-126f, 0, 0) == 0);  // a denormal result
  b[0] = b[1] = bf16(0x1p-70f) << 16 | bf16(0x1p-70f);
  CHECK(dot(0x1p-70f, 0, 0, 0, 0) == 0);
  CHECK(std::isnan(dot(std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(), 0, 0, 0)));
}

TEST_CASE("the emulation finds misuse") {
  const auto good = [] {
    TileConfig c{};
    c.palette = 1;
    for (int t = 0; t < 3; ++t) c.rows[t] = 16, c.row_bytes[t] = 64;
    return c;
  };
  static float data[256] = {};
  const auto refused = [&](TileConfig c) { CHECK_THROWS_AS(EmulatedTiles::configure(c), EmulatedTiles::Fault); };
  EmulatedTiles::release();
  CHECK_THROWS_AS(EmulatedTiles::zero<0>(), EmulatedTiles::Fault);
  TileConfig c = good();
  c.palette = 2;
  refused(c);
  c = good();
  c.start_row = 1;
  refused(c);
  c = good();
  c.rows[7] = 17, c.row_bytes[7] = 64;
  refused(c);
  c = good();
  c.row_bytes[0] = 68;
  refused(c);
  c = good();
  c.rows[3] = 1;
  refused(c);
  c = good();
  c.reserved1[0] = 64;  // a ninth tile
  refused(c);
  c = good();
  c.reserved0[13] = c.reserved2[7] = 1;
  refused(c);
  EmulatedTiles::configure(good());
  CHECK_NOTHROW(EmulatedTiles::load<0>(data, 64));
  CHECK_NOTHROW((EmulatedTiles::dot<0, 1, 2>()));
  CHECK_THROWS_AS(EmulatedTiles::load<3>(data, 64), EmulatedTiles::Fault);
  struct Shape {
    int tile, rows, bytes;
  };
  for (const auto& [tile, rows, bytes] :
       {Shape{0, 15, 64}, Shape{1, 15, 64}, Shape{1, 16, 60}, Shape{2, 15, 64}, Shape{2, 16, 62}}) {
    c = good();
    c.rows[tile] = static_cast<uint8_t>(rows);
    c.row_bytes[tile] = static_cast<uint16_t>(bytes);
    EmulatedTiles::configure(c);
    CHECK_THROWS_AS((EmulatedTiles::dot<0, 1, 2>()), EmulatedTiles::Fault);
  }
  EmulatedTiles::release();
  CHECK_THROWS_AS(EmulatedTiles::store<0>(data, 64), EmulatedTiles::Fault);
}

TEST_CASE("tile steps are those of the limit model") {
  struct Steps {
    int64_t configures, dots, loads, stores;
  };
  const auto count = [](auto run) {
    EmulatedTiles::state() = {};
    run();
    const EmulatedTiles::State& s = EmulatedTiles::state();
    CHECK(s.releases == 1);
    return Steps{s.configures, s.dots, s.loads, s.stores};
  };
  const auto check = [](Steps got, Steps expected) {
    CHECK(got.configures == expected.configures);
    CHECK(got.dots == expected.dots);
    CHECK(got.loads == expected.loads);
    CHECK(got.stores == expected.stores);
  };
  const Random random(3);  // k2 = 64: four steps
  check(count([&] { matmul(kEmulated, random, 64, 64, 48, false, Kind::any); }), {1, 4 * 12, 4 * 13, 12});
  check(count([&] { matmul(kEmulated, random, 64, 64, 48, true, Kind::any); }), {1, 4 * 36, 4 * 30, 12});
  check(count([&] { matmul(kEmulated, random, 64, 64, 200, false, Kind::any); }), {1, 4 * 52, 4 * 55, 52});
  check(count([&] { matmul(kEmulated, random, 20, 10, 32, false, Kind::any); }), {1, 4, 4, 4});
  check(count([&] { matmul(kEmulated, random, 64, 50, 32, false, Kind::any); }), {2, 4 * 8, 4 * 8 + 8, 16});
  check(count([&] { accumulate(kEmulated, random, 32, 64, 64, false, Kind::any); }), {1, 2 * 16, 2 * 16 + 16, 16});
  check(count([&] { accumulate(kEmulated, random, 32, 64, 64, true, Kind::any); }), {1, 2 * 48, 2 * 32, 16});
  check(count([&] { accumulate(kEmulated, random, 22, 64, 64, true, Kind::any); }), {1, 2 * 48, 2 * 32, 16});
}

/// A processor and system of which this and that is missing.
template <uint32_t leaf7, bool osxsave, uint64_t states, bool grants>
struct Fake {
  static inline int asked = 0, read = 0;
  static uint32_t leaf7_edx() { return leaf7; }
  static uint32_t leaf1_ecx() { return osxsave ? 1u << 27 : ~(1u << 27); }
  static uint64_t xcr0() {
    ++read;
    return states;
  }
  static bool request() {
    ++asked;
    return grants;
  }
};

TEST_CASE("AMX is used where processor, system and permission agree; permission is asked for last") {
  constexpr uint32_t kBoth = 1u << 22 | 1u << 24;
  constexpr uint64_t kStates = 0x602e7;
  using Good = Fake<kBoth, true, kStates, true>;
  using Refused = Fake<kBoth, true, kStates, false>;
  using Stateless = Fake<kBoth, true, 0x202e7, true>;
  using Old = Fake<kBoth, false, kStates, true>;
  using Int8 = Fake<1u << 24 | 1u << 25, true, kStates, true>;
  CHECK((amx_permitted<Good>() && Good::asked == 1));
  CHECK((!amx_permitted<Refused>() && Refused::asked == 1));
  CHECK((!amx_permitted<Stateless>() && Stateless::asked == 0));
  CHECK((!amx_permitted<Old>() && Old::asked == 0 && Old::read == 0));  // xgetbv would fault
  CHECK((!amx_permitted<Int8>() && Int8::asked == 0));
  bool first = false, second = false;
  std::thread one([&] { first = amx_available(); }), bf16x3([&] { second = amx_available(); });
  one.join();
  bf16x3.join();
  CHECK((first == second && first == amx_available()));
}

TEST_CASE("the instructions give the emulation's bits, where the processor has them") {
#if defined(__x86_64__)
  if (!amx_available()) {
    MESSAGE("no AMX here, or no permission: the instructions did not run");
    return;
  }
  Random random(4);
  for (int round = 0; round < 40; ++round) {
    const int64_t n = 1 + random.below(140), k2 = 1 + random.below(70), m = 1 + random.below(90);
    const Kind kind = kKinds[round % 3];
    for (bool bf16x3 : {false, true}) {
      CHECK(matmul(amx_kernels(), random, n, k2, m, bf16x3, kind) == matmul(kEmulated, random, n, k2, m, bf16x3, kind));
      CHECK(accumulate(amx_kernels(), random, k2, n, m, bf16x3, kind) ==
            accumulate(kEmulated, random, k2, n, m, bf16x3, kind));
    }
  }
#else
  MESSAGE("AMX: a matter of x86-64");
#endif
}

}  // namespace
