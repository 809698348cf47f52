// SPDX-License-Identifier: Apache-2.0
// The inner loops of every instruction set that this processor has, on the same bytes and in exact-size memory: copies,
// conversions equal to the bit what plain scalar code makes of them; sums, screens and exponentials within a bound that
// is derived, or carried along with their values in double.
#include "cpu/kernels.h"

#include <algorithm>

#include "amx_table.h"
#include "cpu/pack.h"
#include "fuzz.h"
#include "near.h"

using namespace hisac;
using cpu::Kernels;
using cpu::pad;
using fuzz::Bytes;
using fuzz::decode;
using near::kUlp;
using near::Near;
using test::Guarded;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<const Kernels*> all() {
  const Kernels* have[cpu::kMostTables];
  std::vector<const Kernels*> out(have, have + cpu::supported(have));
  out.push_back(&test::amx_twin());
  return out;
}

int64_t padded_rows(int64_t n) { return (n + cpu::kRowStep - 1) / cpu::kRowStep * cpu::kRowStep; }

/// The same bits, but any NaN for a NaN.
bool same(float a, float b) { return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, 4) == 0; }

void close(double a, double b, double bound) {
  if (a == b) return;
  if (!(std::fabs(a - b) <= bound)) std::fprintf(stderr, "%.9g, %.9g: apart by more than %.3g\n", a, b, bound);
  CHECK(std::fabs(a - b) <= bound);
}

void close(float got, const Near& expected) { close(double(got), expected.value, expected.wrong); }

/// values [rows, width] as [rows, stride], the rest `fill`.
std::vector<float> strided(const std::vector<float>& values, int64_t rows, int64_t width, int64_t stride,
                           float fill = 0) {
  std::vector<float> out(test::size(rows * stride), fill);
  for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i)
    out[test::size(i / width * stride + i % width)] = values[test::size(i)];
  return out;
}

void products(Bytes& in) {
  const int64_t n = in.between(1, 64), k = in.between(1, 40), m = in.between(1, 200), ldz = pad(m);
  const auto a = in.values(n * k, false), b = in.values(m * k, false);
  std::vector<float> transposed(b.size());
  for (int64_t j = 0; j < m; ++j)
    for (int64_t d = 0; d < k; ++d) transposed[test::size(d * m + j)] = b[test::size(j * k + d)];
  Guarded<float> left(strided(a, padded_rows(n), k, k)), columns(b), rows(transposed);
  std::vector<float> first;
  for (const Kernels* kernels : all()) {
    Guarded<float> packed(cpu::packed_size(k, m)), again(cpu::packed_size(k, m));
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

/// x to nearest even in bfloat16, a denormal as zero.
float rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits & 0x7f800000u) == 0 ? bits & 0x80000000u : (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

void pair_products(Bytes& in) {
  const int64_t n = in.between(1, 64), k = in.between(1, 70), k2 = (k + 1) / 2, m = in.between(1, 200), ldz = pad(m);
  const auto a = in.values(n * k, false), b = in.values(m * k, false);
  const auto shifts = in.values(k, false);
  Guarded<float> rows(a), columns(b), shift(shifts);
  for (const Kernels* kernels : all()) {
    if (!kernels->matmul_pairs) continue;
    Guarded<uint32_t> left(padded_rows(n) * k2), packed(cpu::packed_size(k2, m));
    for (int64_t i = 0; i < n; ++i) {
      const cpu::Rounded sums = kernels->round_pairs(k, rows.data() + i * k, shift.data(), left.data() + i * k2);
      double squares = 0, errors = 0;
      for (int64_t d = 0; d < k; ++d) {
        const float x = a[test::size(i * k + d)] - shifts[test::size(d)], y = rounded(x);
        CHECK(std::memcmp(reinterpret_cast<const std::byte*>(&y) + 2,
                          reinterpret_cast<const std::byte*>(left.data() + i * k2) + 2 * d, 2) == 0);
        squares += double(x) * double(x);
        errors += (double(x) - double(y)) * (double(x) - double(y));
      }
      CHECK((k % 2 == 0 || left.data()[(i + 1) * k2 - 1] >> 16 == 0));
      close(double(sums.squares), squares, static_cast<double>(k + 2) * kUlp * squares);
      close(double(sums.errors), errors, static_cast<double>(k + 2) * kUlp * errors);
    }
    kernels->pack_pairs(k, m, columns.data(), k, packed.data());
    Guarded<float> z(padded_rows(n) * ldz);
    kernels->matmul_pairs(static_cast<int>(n), k2, m, left.data(), k2, packed.data(), z.data(), ldz, nullptr);
    CHECK(left.intact() && packed.intact() && z.intact());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < ldz; ++j) {
        double exact = 0, size = 0;
        for (int64_t d = 0; d < k && j < m; ++d) {
          const double term = double(rounded(a[test::size(i * k + d)] - shifts[test::size(d)])) *
                              double(rounded(b[test::size(j * k + d)]));
          exact += term;
          size += std::fabs(term);
        }
        close(double(z.data()[i * ldz + j]), exact,
              static_cast<double>(k + 2) * kUlp * size + 0x1p-126 * double(2 * k));
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

/// A float as the nearest of the type, ties to even.
float nearest(float x, DType type) {
  if (type == DType::float32 || !std::isfinite(x) || x == 0) return x;
  const int digits = type == DType::float16 ? 11 : 8, lowest = type == DType::float16 ? -14 : -126;
  const int unit = std::max(std::ilogb(x), lowest) - digits + 1;
  const double out = std::ldexp(std::nearbyint(std::ldexp(double(x), -unit)), unit);
  const double most = type == DType::float16 ? 65504 : 0x1.fep127;
  return std::copysign(std::fabs(out) > most ? kInf : static_cast<float>(std::fabs(out)), x);
}

void rows_in_and_out(Bytes& in) {
  const int64_t width = in.between(1, 70);
  const DType types[] = {DType::float32, DType::bfloat16, DType::float16};
  const DType type = types[in.byte() % 3];
  const int64_t bytes = type == DType::float32 ? 4 : 2;
  std::vector<std::byte> raw(test::size(width * bytes));
  for (std::byte& b : raw) b = static_cast<std::byte>(in.byte());
  Guarded<std::byte> source(raw);
  Guarded<std::byte> bytes_of_row(std::vector<std::byte>(raw.begin(), raw.begin() + width));
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
    const int8_t* const int8 = reinterpret_cast<const int8_t*>(bytes_of_row.data());
    const double byte_squares = double(kernels->load_int8(int8, scale, width, row.data()));
    CHECK(row.intact());
    double exact_squares = 0;
    for (int64_t d = 0; d < width; ++d) {
      CHECK(row.data()[d] == static_cast<float>(int8[d]) * scale);
      exact_squares += double(row.data()[d]) * double(row.data()[d]);
    }
    close(byte_squares, exact_squares, static_cast<double>(width + 2) * kUlp * exact_squares);
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
    for (int64_t d = 0; d < width; ++d) {
      const float x = truth[test::size(d)], start = added[test::size(d)];
      CHECK(same(row.data()[d], x));
      CHECK(same(decode(stored.data() + d * bytes, type), nearest(x * scale, type)));
      if (!std::isnan(x))  // what was read is written back
        CHECK(std::memcmp(back.data() + d * bytes, source.data() + d * bytes, test::size(bytes)) == 0);
      if (std::fabs(x) < 0x1p120f) close(sums.data()[d], Near(start) + Near(scale) * Near(x));
    }
  }
}

/// Every column whose least possible score is below the threshold survives, none that is above does.
void screens(Bytes& in) {
  const int64_t m = in.between(1, 100), ldz = pad(m);
  const auto z = in.values(m, false);
  auto halves = in.values(m, false), norms = in.values(m, false);
  for (float& x : halves) x = in.byte() % 32 ? std::fabs(x) : kInf;
  for (float& x : norms) x = std::fabs(x);
  const float error = std::fabs(in.value(false)) / 8, slack = std::fabs(in.value(false)) / 64;
  const float before = in.flag() ? kInf : in.value(false);
  Guarded<float> products(strided(z, 1, m, ldz)), half(strided(halves, 1, m, ldz, kInf)),
      norm(strided(norms, 1, m, ldz));
  double least = double(kInf), threshold = double(before), size = 0;
  for (int64_t j = 0; j < m; ++j) {
    const double score = double(halves[test::size(j)]) - double(z[test::size(j)]),
                 e = double(error) * double(norms[test::size(j)]);
    least = std::fmin(least, score - e);
    threshold = std::fmin(threshold, score + e + double(slack));
    if (std::isfinite(score))
      size = std::fmax(size, std::fabs(score) + std::fabs(double(z[test::size(j)])) + e + double(slack));
  }
  const double apart = 4 * kUlp * size;
  for (const Kernels* kernels : all()) {
    Guarded<int32_t> out(m);
    cpu::Screen row{half.data(), norm.data(), error, slack, before, 0};
    const int64_t count = kernels->screen(m, products.data(), row, out.data());
    CHECK(out.intact() && count <= m);
    close(double(row.low), least, apart);
    close(double(row.threshold), threshold, apart);
    const std::vector<int32_t> found(out.data(), out.data() + count);
    for (int64_t j = 0; j < m; ++j) {
      const double low =
          double(halves[test::size(j)]) - double(z[test::size(j)]) - double(error) * double(norms[test::size(j)]);
      const auto times = std::count(found.begin(), found.end(), j);
      CHECK(times <= 1);
      if (low < threshold - 2 * apart) CHECK(times == 1);
      if (low > threshold + 2 * apart) CHECK(times == 0);
    }
    if (std::isinf(before) && std::isfinite(least)) CHECK(count > 0);
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

/// Route's weights against exact ones: e = 2^(logit + shift - top') within the logit's own rounding.
void route_weights(Bytes& in) {
  const int64_t n = in.between(1, 64), m = in.between(1, 70), ldz = pad(m);
  const bool products = in.byte() % 2;
  const float steep = static_cast<float>(in.between(1, 60));
  auto z = in.values(n * m, false), row_norms = in.values(n, false), norms = in.values(m, false);
  auto rates = in.values(m, false), old = in.values(m, false);
  for (auto* a : {&row_norms, &norms, &rates})
    for (float& x : *a) x = std::fabs(x);
  for (float& x : rates) x *= steep / 16;
  for (float& x : old) x = in.byte() % 4 ? x * steep : -kInf;
  if (!products)
    for (float& x : z) x = in.byte() % 16 ? x * steep : -kInf;
  const auto shifts = in.values(n, false);
  Guarded<float> row_norm(row_norms), shift(shifts), norm(strided(norms, 1, m, ldz, kInf)),
      rate(strided(rates, 1, m, ldz, 1.f));
  const auto padded = strided(z, n, m, ldz, products ? 0 : -kInf);
  for (const Kernels* kernels : all()) {
    std::vector<float> masses(test::size(m));
    for (size_t j = 0; j < masses.size(); ++j) masses[j] = old[j] > -kInf;
    Guarded<float> top(strided(old, 1, m, ldz, -kInf)), mass(strided(masses, 1, m, ldz)), factor(ldz), values(padded),
        e(n * ldz);
    const bool changed = kernels->route_weights(static_cast<int>(n), m, values.data(), ldz,
                                                {products ? row_norm.data() : nullptr, shift.data(), norm.data(),
                                                 rate.data(), top.data(), mass.data(), factor.data()},
                                                e.data(), ldz);
    CHECK(top.intact() && mass.intact() && factor.intact() && e.intact() && values.values() == padded);
    for (int64_t j = 0; j < m; ++j) {
      const double before = double(old[test::size(j)]), now = double(top.data()[j]);
      CHECK(now >= before);
      CHECK((changed || now == before));
      const double move = before == -HUGE_VAL ? 0 : std::fabs(before - now);
      double total = before == -HUGE_VAL ? 0 : std::exp2(before - now), largest = 0;
      if (changed && before > -HUGE_VAL) close(double(factor.data()[j]), total, 1e-6 + 4 * kUlp * move * total);
      for (int64_t i = 0; i < n; ++i) {
        double logit = double(z[test::size(i * m + j)]), size = std::fabs(logit);
        if (products) {
          const double a = double(row_norms[test::size(i)]), b = double(norms[test::size(j)]),
                       r = double(rates[test::size(j)]);
          size = r * (a + b + 2 * std::fabs(logit));
          logit = -r * std::max(0.0, a + b - 2 * logit);
        }
        logit += double(shifts[test::size(i)]);
        if (logit == -HUGE_VAL) {
          CHECK(e.data()[i * ldz + j] == 0);
          continue;
        }
        CHECK(logit <= now + 12 + 8 * kUlp * (size + std::fabs(now) + 32));
        const double exact = std::exp2(logit - now);
        const double relative = 8 * kUlp * (size + std::fabs(double(shifts[test::size(i)])) + std::fabs(now) + 2);
        close(double(e.data()[i * ldz + j]), exact, 1.2e-38 + exact * relative);
        total += double(e.data()[i * ldz + j]);
        largest = std::max(largest, relative);
      }
      close(double(mass.data()[j]), total, 1e-38 + (largest + (static_cast<double>(n) + 4 + move) * 4 * kUlp) * total);
    }
  }
}

/// Logits [n, m] within [-2040, 2040], -inf where `absent` and an entry is; a row or a column may be all absent.
std::vector<float> logits(Bytes& in, int64_t n, int64_t m, bool absent) {
  const float steep = static_cast<float>(in.between(1, 255));
  auto z = in.values(n * m, false);
  for (float& x : z) x = absent && in.byte() % 16 == 0 ? -kInf : x * steep;
  return z;
}

/// One value in eight, and sometimes all, is -inf.
std::vector<float> with_absent(Bytes& in, int64_t n) {
  auto out = in.values(n, false);
  const bool none = in.byte() % 16 == 0;
  for (float& x : out)
    if (none || in.byte() % 8 == 0) x = -kInf;
  return out;
}

/// top + log2 of a sum of 2^(x - top).
Near log_sum(const Near& sum, double top) {
  const double value = std::log2(sum.value), most = sum.wrong / (sum.value - sum.wrong) / std::log(2.);
  return Near(value, most + 4 * kUlp * std::fabs(value)) + Near(top, 0);
}

/// The softmax over agents' log-sum-exp, and attend's softmax.
void softmaxes(Bytes& in) {
  const int64_t n = in.between(1, 64), m = in.between(1, 70), ldz = pad(m);
  const auto z = logits(in, n, m, false), biases = with_absent(in, m);  // products are finite: absence is the bias's
  const auto raw = logits(in, n, m, true);
  const float scale = in.value(false) / 8;
  Guarded<float> bias(strided(biases, 1, m, ldz, -kInf));
  for (const Kernels* kernels : all()) {
    Guarded<float> values(strided(raw, n, m, ldz, -kInf)), log_sums(n);
    kernels->row_lse(static_cast<int>(n), m, values.data(), ldz, log_sums.data());
    CHECK(values.intact() && log_sums.intact());
    for (int64_t i = 0; i < n; ++i) {
      const float peak = *std::max_element(raw.begin() + i * m, raw.begin() + (i + 1) * m);
      std::vector<Near> terms;
      for (int64_t j = 0; j < m; ++j)
        if (raw[test::size(i * m + j)] > -kInf)
          terms.push_back(near::exp2(Near(raw[test::size(i * m + j)]) - Near(peak)));
      if (terms.empty())
        CHECK(log_sums.data()[i] == -kInf);
      else
        close(log_sums.data()[i], log_sum(near::sum(terms), double(peak)));
    }
    Guarded<float> soft(strided(z, n, m, ldz)), weights(strided(z, n, m, ldz)), lse(n);
    kernels->row_softmax(static_cast<int>(n), m, soft.data(), ldz, scale, bias.data(), lse.data());
    kernels->row_weights(static_cast<int>(n), m, weights.data(), ldz, scale, bias.data(), lse.data());
    CHECK(soft.intact() && lse.intact() && weights.intact());
    for (int64_t i = 0; i < n; ++i) {
      const float* const row = soft.data() + i * ldz;
      double top = -double(kInf), total = 0;
      std::vector<Near> x, terms;
      for (int64_t j = 0; j < m; ++j) {
        x.push_back(Near(scale) * Near(z[test::size(i * m + j)]) + Near(biases[test::size(j)]));
        top = std::fmax(top, x.back().value);
        total += double(row[j]);
      }
      if (std::isinf(top)) {
        CHECK(lse.data()[i] == -kInf);
        for (int64_t j = 0; j < m; ++j) CHECK(row[j] == 0 && weights.data()[i * ldz + j] == 0);
        continue;
      }
      close(total, 1, static_cast<double>(m + 4) * kUlp);
      for (const Near& t : x) terms.push_back(near::exp2(t - Near(top, 0)));  // an error of top would cancel
      const Near sum = near::sum(terms);
      close(lse.data()[i], log_sum(sum, top));
      for (int64_t j = 0; j < m; ++j) {
        close(row[j], terms[test::size(j)] / sum);
        close(weights.data()[i * ldz + j], near::exp2(x[test::size(j)] - Near(lse.data()[i])));
      }
    }
  }
}

void gradients(Bytes& in) {
  const int64_t n = in.between(1, 64), m = in.between(1, 70), ldz = pad(m);
  auto raw = in.values(n * m, false);
  for (float& x : raw) x = -std::fabs(x);
  const auto g = in.values(n * m, false), shifts = in.values(n, false), offsets = in.values(m, false);
  auto row_lses = in.values(n, false), lses = in.values(m, false), rates = in.values(m, false);
  for (float& r : rates) r = std::fabs(r);
  for (float& l : row_lses) l = std::fabs(l);  // weights of at most 1
  Guarded<float> shift(shifts), row_lse(row_lses), lse(strided(lses, 1, m, ldz, kInf)),
      offset(strided(offsets, 1, m, ldz)), rate(strided(rates, 1, m, ldz));
  const bool shares = in.flag();
  for (const Kernels* kernels : all()) {
    Guarded<float> weights(strided(raw, n, m, ldz, -kInf)), slopes(strided(g, n, m, ldz)), d_bias(n), row_sum(n),
        d_raw(std::vector<float>(test::size(ldz))), column_sum(std::vector<float>(test::size(ldz)));
    kernels->route_gradient(static_cast<int>(n), m, weights.data(), slopes.data(), ldz,
                            {shift.data(), shares ? row_lse.data() : nullptr, lse.data(), offset.data(), rate.data(),
                             d_bias.data(), row_sum.data(), d_raw.data(), column_sum.data()});
    Guarded<float> products(strided(g, n, m, ldz)), sums(std::vector<float>(test::size(ldz)));
    kernels->attend_gradient(static_cast<int>(n), m, weights.data(), products.data(), ldz, shift.data(), sums.data());
    for (Guarded<float>* a : {&weights, &slopes, &d_bias, &row_sum, &d_raw, &column_sum, &products, &sums})
      CHECK(a->intact());
    std::vector<std::vector<Near>> by_logit(test::size(m)), by_distance(by_logit), by_weight(by_logit);
    for (int64_t i = 0; i < n; ++i) {
      const Near s(shifts[test::size(i)]);
      std::vector<Near> dz, distances;
      for (int64_t j = 0; j < m; ++j) {
        const size_t a = test::size(j), at = test::size(i * m + j);
        const Near w = near::exp2(Near(raw[at]) + s - Near(lses[a]));
        close(weights.data()[i * ldz + j], w);
        dz.push_back(w * (Near(g[at]) + Near(offsets[a])));
        by_weight[a].push_back(Near(weights.data()[i * ldz + j]) * (Near(g[at]) + s));
        close(products.data()[i * ldz + j], by_weight[a].back());
      }
      const Near bias = near::sum(dz);
      close(d_bias.data()[i], bias);
      for (int64_t j = 0; j < m; ++j) {
        const size_t a = test::size(j), at = test::size(i * m + j);
        if (shares) dz[a] = dz[a] - near::exp2(Near(raw[at]) - Near(row_lses[test::size(i)])) * bias;
        by_logit[a].push_back(dz[a] * Near(raw[at]));
        distances.push_back(dz[a] * Near(rates[a]));
        by_distance[a].push_back(distances.back());
        close(slopes.data()[i * ldz + j], distances.back());
      }
      close(row_sum.data()[i], near::sum(distances));
    }
    for (int64_t j = 0; j < m; ++j) {
      close(d_raw.data()[j], near::sum(by_logit[test::size(j)]));
      close(column_sum.data()[j], near::sum(by_distance[test::size(j)]));
      close(sums.data()[j], near::sum(by_weight[test::size(j)]));
    }
  }
}

void distances(Bytes& in) {
  const int64_t n = in.between(1, 64), m = in.between(1, 70), ldz = pad(m);
  const auto z = in.values(n * m, false);
  auto row_norms = in.values(n, false), norms = in.values(m, false), rates = in.values(m, false);
  for (auto* a : {&row_norms, &norms, &rates})
    for (float& x : *a) x = std::fabs(x);
  Guarded<float> row_norm(row_norms), norm(strided(norms, 1, m, ldz, kInf)), rate(strided(rates, 1, m, ldz, 1.f));
  for (const Kernels* kernels : all()) {
    Guarded<float> logits(strided(z, n, m, ldz));
    kernels->distance_logits(static_cast<int>(n), m, logits.data(), ldz, row_norm.data(), norm.data(), rate.data());
    CHECK(logits.intact());
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < m; ++j) {
        Near d =
            Near(row_norms[test::size(i)]) + Near(norms[test::size(j)]) - Near(2.f) * Near(z[test::size(i * m + j)]);
        d.value = std::max(0.0, d.value);
        close(logits.data()[i * ldz + j], Near(-rates[test::size(j)]) * d);
      }
      for (int64_t j = m; j < (m + 3) / 4 * 4; ++j) CHECK(logits.data()[i * ldz + j] == -kInf);  // padding: no part
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  constexpr void (*kParts[])(Bytes&) = {products,      accumulations, rows_in_and_out, screens,       softmaxes,
                                        route_weights, gradients,     distances,       pair_products, square_distances};
  kParts[in.byte() % 10](in);
  return 0;
}
