// SPDX-License-Identifier: Apache-2.0
// The inner loops of every instruction set that this processor has, and of the AMX emulation, on the same bytes and
// in exact-size memory: copies and conversions equal to the bit what plain scalar code makes of them; sums, screens and
// exponentials within a bound that is carried along with their values in double.
#include "fuzz_kernels.h"

using namespace kernel_fuzz;

namespace {

void products(Bytes& in) {
  const int64_t n = in.between(1, 64), k = in.between(1, 40), m = in.between(1, 200), ldz = pad(m);
  const auto a = in.values(n * k, false), b = in.values(m * k, false);
  std::vector<float> transposed(b.size());
  for (int64_t j = 0; j < m; ++j)
    for (int64_t d = 0; d < k; ++d) transposed[test::size(d * m + j)] = b[test::size(j * k + d)];
  Guarded<float> left(strided(a, padded_rows(n), k, k)), columns(b), rows(transposed);
  std::vector<float> first;
  for (const Kernels* kernels : all()) {
    Guarded<float> packed(simd::packed_size(k, m)), again(simd::packed_size(k, m));
    kernels->pack_columns(k, m, columns.data(), k, packed.data());
    kernels->pack_rows(k, m, rows.data(), m, again.data());
    CHECK(packed.intact() && again.intact());
    if (first.empty()) first = packed.values();
    CHECK(packed.values() == first && again.values() == first);
    Guarded<float> z(padded_rows(n) * ldz);
    kernels->matmul(static_cast<int>(n), k, m, left.data(), k, packed.data(), z.data(), ldz, nullptr);
    CHECK(z.intact());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        double exact = 0, size = 0;
        for (int64_t d = 0; d < k; ++d) {
          const double term = double(a[test::size(i * k + d)]) * double(b[test::size(j * k + d)]);
          exact += term;
          size += std::fabs(term);
        }
        close(double(z.data()[i * ldz + j]), exact, static_cast<double>(k + 1) * kUlp * size);
      }
  }
}

/// A float as the nearest of the type, ties to even.
float nearest(float x, DType type) {
  if (type == DType::float32 || !std::isfinite(x) || x == 0) return x;
  const int digits = type == DType::float16 ? 11 : 8, lowest = type == DType::float16 ? -14 : -126;
  const int unit = std::max(std::ilogb(x), lowest) - digits + 1;
  const double out = std::ldexp(std::nearbyint(std::ldexp(double(x), -unit)), unit);
  const double most = type == DType::float16 ? 65504 : 0x1.fep127;
  return std::copysign(std::fabs(out) > most ? kInf : static_cast<float>(std::fabs(out)), x);
}

/// The pairs' rounding: to nearest even in bfloat16, a denormal as zero.
float rounded(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : nearest(x, DType::bfloat16); }

void pair_products(Bytes& in) {
  const int64_t n = in.between(1, 64), k = in.between(1, 70), k2 = (k + 1) / 2, m = in.between(1, 200), ldz = pad(m);
  const auto a = in.values(n * k, false), shifts = in.values(k, false);
  auto b = in.values(m * k, false);
  for (float& x : b) x *= 1.01f;  // needs rounding
  Guarded<float> rows(a), columns(b), shift(shifts);
  for (const Kernels* kernels : all()) {
    if (!kernels->matmul_bf16) continue;
    Guarded<uint32_t> left(padded_rows(n) * k2), packed(simd::packed_size(k2, m));
    for (int64_t i = 0; i < n; ++i) {
      const simd::Rounded sums = kernels->round_bf16(k, rows.data() + i * k, shift.data(), left.data() + i * k2);
      std::vector<Near> squares, errors;
      for (int64_t d = 0; d < k; ++d) {
        const float x = a[test::size(i * k + d)] - shifts[test::size(d)], y = rounded(x);
        CHECK(same(half_of(left.data() + i * k2, d), y));
        squares.push_back(Near(x) * Near(x));
        errors.push_back(Near(x - y) * Near(x - y));
      }
      CHECK((k % 2 == 0 || left.data()[(i + 1) * k2 - 1] >> 16 == 0));
      close(sums.squares, near::sum(squares));
      close(sums.errors, near::sum(errors));
    }
    for (int64_t j = 0; j < m; ++j) {
      const float* const column = columns.data() + j * k;
      Guarded<float> rest(k);
      kernels->bf16_remainder(k, column, rest.data());
      CHECK(rest.intact());
      for (int64_t d = 0; d < k; ++d) CHECK(rest.data()[d] == column[d] - rounded(column[d]));
    }
    kernels->pack_bf16(k, m, columns.data(), k, packed.data());
    Guarded<float> z(padded_rows(n) * ldz);
    kernels->matmul_bf16(static_cast<int>(n), k2, m, left.data(), k2, packed.data(), z.data(), ldz, nullptr);
    CHECK(left.intact() && packed.intact() && z.intact());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < ldz; ++j) {
        double exact = 0, size = 0;
        for (int64_t d = 0; d < k && j < m; ++d) {
          const double term = double(half_of(left.data() + i * k2, d)) * double(rounded(b[test::size(j * k + d)]));
          exact += term;
          size += std::fabs(term);
        }
        close(double(z.data()[i * ldz + j]), exact,
              static_cast<double>(k + 2) * kUlp * size + 0x1p-126 * static_cast<double>(2 * k));
      }
  }
}

/// Sums over pairs of rows, an odd last one with zeros.
void pair_accumulations(Bytes& in) {
  const int64_t n = in.between(1, 64), n2 = (n + 1) / 2, w = in.between(1, 70), m = in.between(1, 100);
  const int64_t lda = pad(w), lde = pad(m), rows = padded_rows(w);
  auto a = in.values(n * w, false), e = in.values(n * m, false);
  for (auto* values : {&a, &e})
    for (float& x : *values) x *= 1.01f;  // needs rounding
  const auto c = in.values(w * m, false);
  Guarded<float> left(strided(a, n, w, lda)), right(strided(e, n, m, lde));
  for (const Kernels* kernels : all()) {
    if (!kernels->accumulate_bf16) continue;
    Guarded<uint32_t> v(n2 * lda), u(n2 * lde);
    const auto pairs = [&](Guarded<float>& from, int64_t width, int64_t ld, Guarded<uint32_t>& to) {
      for (int64_t i = 0; i < n; i += 2)
        kernels->pair_rows_bf16(width, from.data() + i * ld, i + 1 < n ? from.data() + (i + 1) * ld : nullptr,
                                to.data() + i / 2 * ld);
      for (int64_t i = 0; i < 2 * n2; ++i)
        for (int64_t d = 0; d < width; ++d) {
          const float x = i < n ? from.data()[i * ld + d] : 0.f;
          CHECK(std::fabs(half_of(to.data() + i / 2 * ld + d, i % 2) - x) <= 0x1p-8f * std::fabs(x));
        }
    };
    pairs(left, w, lda, v);
    pairs(right, m, lde, u);
    Guarded<float> sums(strided(c, rows, m, lde));
    kernels->accumulate_bf16(static_cast<int>(n2), w, m, v.data(), lda, u.data(), lde, sums.data(), lde);
    CHECK(v.intact() && u.intact() && sums.intact());
    for (int64_t j = 0; j < w; ++j)
      for (int64_t d = 0; d < m; ++d) {
        double exact = double(c[test::size(j * m + d)]), size = std::fabs(exact);
        for (int64_t i = 0; i < n; ++i) {
          const double term =
              double(half_of(v.data() + i / 2 * lda + j, i % 2)) * double(half_of(u.data() + i / 2 * lde + d, i % 2));
          exact += term;
          size += std::fabs(term);
        }
        close(double(sums.data()[j * lde + d]), exact, static_cast<double>(n + 4) * kUlp * size);
      }
  }
}

void accumulations(Bytes& in) {
  const int64_t n = in.between(0, 64), m = in.between(1, 70), w = in.between(1, 100), lda = pad(m), ldb = pad(w);
  const auto a = in.values(n * m, false), b = in.values(n * w, false), c = in.values(m * w, false);
  Guarded<float> left(strided(a, n, m, lda)), right(strided(b, n, w, ldb));
  const int64_t rows = padded_rows(m);
  for (const Kernels* kernels : all()) {
    Guarded<float> sums(strided(c, rows, w, ldb));
    kernels->accumulate(static_cast<int>(n), m, w, left.data(), lda, right.data(), ldb, sums.data(), ldb);
    CHECK(sums.intact());
    for (int64_t j = 0; j < m; ++j)
      for (int64_t d = 0; d < w; ++d) {
        double exact = double(c[test::size(j * w + d)]), size = std::fabs(exact);
        for (int64_t i = 0; i < n; ++i) {
          const double term = double(a[test::size(i * m + j)]) * double(b[test::size(i * w + d)]);
          exact += term;
          size += std::fabs(term);
        }
        close(double(sums.data()[j * ldb + d]), exact, static_cast<double>(n + 2) * kUlp * size);
      }
  }
}

void rows_in_and_out(Bytes& in) {
  const int64_t width = in.between(1, 70);
  const DType types[] = {DType::float32, DType::bfloat16, DType::float16};
  const DType type = types[in.byte() % 3];
  const int64_t bytes = type == DType::float32 ? 4 : 2;
  std::vector<std::byte> raw(test::size(width * bytes));
  for (std::byte& b : raw) b = static_cast<std::byte>(in.byte());
  Guarded<std::byte> source(raw), narrow(std::vector<std::byte>(raw.begin(), raw.begin() + width));
  const float scale = in.value(false);
  const auto added = in.values(width, false);
  std::vector<float> truth(test::size(width));
  double squares = 0;
  for (int64_t d = 0; d < width; ++d) {
    truth[test::size(d)] = decode(raw.data() + d * bytes, type);
    squares += double(truth[test::size(d)]) * double(truth[test::size(d)]);
  }
  for (const Kernels* kernels : all()) {
    Guarded<float> row(width);
    std::vector<Near> terms;
    const int8_t* const int8 = reinterpret_cast<const int8_t*>(narrow.data());
    const float int8_sum = kernels->load_int8(int8, scale, width, row.data());
    CHECK(row.intact());
    for (int64_t d = 0; d < width; ++d) {
      const float x = static_cast<float>(int8[d]) * scale;
      CHECK(row.data()[d] == x);
      terms.push_back(Near(x) * Near(x));
    }
    close(int8_sum, near::sum(terms));
    const float sum = kernels->load_row(source.data(), type, width, row.data());
    CHECK(row.intact());
    if (std::isnan(squares)) CHECK(std::isnan(sum));
    if (squares > 0x1p129) CHECK(sum == kInf);
    if (squares < 0x1p127) close(double(sum), squares, static_cast<double>(width + 1) * (kUlp * squares + 0x1p-149));
    Guarded<std::byte> stored(width * bytes), back(width * bytes);
    kernels->store_row(stored.data(), type, width, row.data(), scale);
    kernels->store_row(back.data(), type, width, row.data(), 1.f);
    CHECK(stored.intact() && back.intact());
    Guarded<float> sums(added);
    kernels->add_row(width, row.data(), scale, sums.data());
    CHECK(sums.intact());
    Guarded<float> blended(added);
    kernels->blend_row(width, 0.5f, row.data(), scale, blended.data());
    CHECK(blended.intact());
    for (int64_t d = 0; d < width; ++d) {
      const float x = truth[test::size(d)], start = added[test::size(d)];
      CHECK(same(row.data()[d], x));
      CHECK(same(decode(stored.data() + d * bytes, type), nearest(x * scale, type)));
      if (!std::isnan(x))  // what was read is written back
        CHECK(std::memcmp(back.data() + d * bytes, source.data() + d * bytes, test::size(bytes)) == 0);
      if (std::fabs(x) < 0x1p120f) close(sums.data()[d], Near(start) + Near(scale) * Near(x));
      if (std::fabs(x) < 0x1p120f) close(blended.data()[d], Near(0.5f) * Near(start) + Near(scale) * Near(x));
    }
  }
}

void transposes(Bytes& in) {
  const int64_t w = pad(in.between(1, 70)), ld = simd::kLanes + in.between(0, 20), ldd = w + in.between(0, 20);
  const auto x = in.values((w - 1) * ld + simd::kLanes, true);
  Guarded<float> source(x);
  for (const Kernels* kernels : all()) {
    Guarded<float> out((simd::kLanes - 1) * ldd + w);
    kernels->transpose(w, source.data(), ld, out.data(), ldd);
    CHECK(out.intact());
    for (int64_t r = 0; r < w; ++r)
      for (int64_t c = 0; c < simd::kLanes; ++c)
        CHECK(std::memcmp(out.data() + c * ldd + r, source.data() + r * ld + c, 4) == 0);
  }
}

/// Every column whose least possible score is below the threshold survives, none that is above does.
void screens(Bytes& in) {
  const int64_t m = in.between(1, 100), ldz = pad(m);
  const bool hostile = in.byte() % 4 == 0;  // then only memory and what is in the list are looked at
  const auto z = in.values(m, hostile);
  auto halves = in.values(m, hostile), norms = in.values(m, hostile);
  for (float& x : halves) x = in.byte() % 32 ? std::fabs(x) : kInf;
  for (float& x : norms) x = std::fabs(x);
  const float error = std::fabs(in.value(hostile)) / 8, slack = std::fabs(in.value(hostile)) / 64;
  const float before = in.flag() ? kInf : in.value(hostile);
  Guarded<float> products(strided(z, 1, m, ldz)), half(strided(halves, 1, m, ldz, kInf)),
      norm(strided(norms, 1, m, ldz));
  std::vector<Near> low, high{Near(before)};
  for (int64_t j = 0; j < m; ++j) {
    const size_t at = test::size(j);
    const Near score = Near(halves[at]) - Near(z[at]), wrong = Near(error) * Near(norms[at]);
    low.push_back(score - wrong);
    high.push_back(score + wrong + Near(slack));
  }
  const Near least = near::least(low), threshold = near::least(high);
  for (const Kernels* kernels : all()) {
    Guarded<int32_t> out(m);
    simd::Screen row{half.data(), norm.data(), error, slack, before, 0};
    const int64_t count = kernels->screen(m, products.data(), row, out.data());
    CHECK(out.intact() && count >= 0 && count <= m);
    std::vector<int> times(test::size(m));
    for (int64_t i = 0; i < count; ++i) {
      CHECK(out.data()[i] >= 0 && out.data()[i] < m);
      CHECK(++times[test::size(out.data()[i])] == 1);
    }
    if (hostile) continue;
    close(row.low, least);
    close(row.threshold, threshold);
    for (size_t j = 0; j < low.size(); ++j) {
      if (low[j].value + low[j].wrong < double(row.threshold)) CHECK(times[j] == 1);
      if (low[j].value - low[j].wrong > double(row.threshold)) CHECK(times[j] == 0);
    }
    if (std::isinf(before) && std::isfinite(least.value)) CHECK(count > 0);
  }
}

/// The k-th smallest, and the columns below a limit, whatever is in the padding.
void selections(Bytes& in) {
  const int64_t m = in.between(1, 100);
  auto values = in.values(m, in.flag());
  for (float& x : values) x = in.byte() % 8 == 0 ? values[0] : in.byte() % 16 && !std::isnan(x) ? std::fabs(x) : kInf;
  if (std::isnan(values[0])) values[0] = 0;
  for (float& x : values) x = std::isnan(x) ? 1 : std::fabs(x);
  std::vector<float> sorted(values);
  std::sort(sorted.begin(), sorted.end());
  const auto finite = static_cast<int64_t>(std::lower_bound(sorted.begin(), sorted.end(), kInf) - sorted.begin());
  const float most = in.flag() ? sorted[test::size(in.between(0, m - 1))] : in.value(true);
  std::vector<int32_t> below;
  for (int64_t j = 0; j < m; ++j)
    if (values[test::size(j)] <= most) below.push_back(static_cast<int32_t>(j));
  Guarded<float> d(strided(values, 1, m, pad(m), kInf));
  const int64_t k = in.between(1, std::max<int64_t>(finite, 1));
  for (const Kernels* kernels : all()) {
    if (finite) CHECK(kernels->kth_smallest(m, d.data(), k) == sorted[test::size(k - 1)]);
    Guarded<int32_t> out(static_cast<int64_t>(below.size()));
    CHECK(kernels->columns_below(m, d.data(), most, out.data()) == out.count());
    CHECK(out.intact() && out.values() == below);
  }
}

void square_distances(Bytes& in) {
  const int64_t width = in.between(1, 70);
  const auto a = in.values(width, false), b = in.values(width, false);
  Guarded<float> left(a), right(b);
  double exact = 0;
  for (int64_t d = 0; d < width; ++d) {
    const double step = double(a[test::size(d)]) - double(b[test::size(d)]);
    exact += step * step;
  }
  for (const Kernels* kernels : all())
    close(kernels->square_distance(width, left.data(), right.data()), exact,
          static_cast<double>(2 * width + 4) * 0x1p-53 * exact);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  constexpr void (*kParts[])(Bytes&) = {products,        accumulations, pair_products, pair_accumulations,
                                        rows_in_and_out, transposes,    screens,       square_distances,
                                        row_sums,        route_weights, rows,          gradients,
                                        distances,       selections,    weighed};
  kParts[in.byte() % (sizeof kParts / sizeof kParts[0])](in);
  return 0;
}
