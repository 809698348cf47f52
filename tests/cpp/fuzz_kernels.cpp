// SPDX-License-Identifier: Apache-2.0
// The inner loops of every instruction set that this processor has, on the same bytes and in exact-size memory: copies,
// conversions equal to the bit; sums, screens and exponentials within a bound of the baseline's or of float64.
#include "cpu/kernels.h"

#include <algorithm>

#include "amx_table.h"
#include "cpu/pack.h"
#include "fuzz.h"

using namespace hisac;
using cpu::Kernels;
using cpu::pad;
using fuzz::Bytes;
using test::Guarded;

namespace {

constexpr double kUlp = 0x1p-24;

std::vector<const Kernels*> all() {
  std::vector<const Kernels*> out{&cpu::kBaseline};
#if defined(__x86_64__)
  if (std::strstr(available_isas(), "avx2")) out.push_back(&cpu::kAvx2);
  if (std::strstr(available_isas(), "avx512")) out.push_back(&cpu::kAvx512);
  if (std::strstr(available_isas(), "avx512bf16")) out.push_back(&cpu::kAvx512Bf16);
  if (std::strstr(available_isas(), "amx")) out.push_back(&cpu::amx_kernels());
#endif
  out.push_back(&test::amx_twin());
  return out;
}

int64_t padded_rows(int64_t n) { return (n + cpu::kRowStep - 1) / cpu::kRowStep * cpu::kRowStep; }

/// b for another set's a: the same bits, but any NaN for a NaN.
void same(const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) CHECK((std::isnan(a[i]) && std::isnan(b[i])) || std::memcmp(a + i, b + i, 4) == 0);
}

void close(double a, double b, double bound) {
  if (a == b) return;
  if (!(std::fabs(a - b) <= bound)) std::fprintf(stderr, "%.9g, %.9g: apart by more than %.3g\n", a, b, bound);
  CHECK(std::fabs(a - b) <= bound);
}

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
  std::vector<float> first;
  std::vector<std::byte> first_stored;
  float first_squares = 0;
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
    const float squares = kernels->load_row(source.data(), type, width, row.data());
    CHECK(row.intact());
    for (int64_t d = 0; d < width && type == DType::bfloat16; ++d)
      CHECK(std::memcmp(reinterpret_cast<const std::byte*>(row.data() + d) + 2, source.data() + d * 2, 2) == 0);
    Guarded<std::byte> stored(width * bytes), back(width * bytes);
    kernels->store_row(stored.data(), type, width, row.data(), scale);
    kernels->store_row(back.data(), type, width, row.data(), 1.f);
    CHECK(stored.intact() && back.intact());
    for (int64_t d = 0; d < width; ++d)  // what was read is written back
      if (!std::isnan(row.data()[d]))
        CHECK(std::memcmp(back.data() + d * bytes, source.data() + d * bytes, test::size(bytes)) == 0);
    Guarded<float> sum(added);
    kernels->add_row(width, row.data(), scale, sum.data());
    CHECK(sum.intact());
    for (int64_t d = 0; d < width; ++d) {
      const double term = double(scale) * double(row.data()[d]), start = double(added[test::size(d)]);
      if (std::fabs(term) < 1e30)
        close(double(sum.data()[d]), start + term, 2 * kUlp * (std::fabs(term) + std::fabs(start)) + 1e-44);
    }
    if (first.empty()) {
      first = row.values();
      first_stored = stored.values();
      first_squares = squares;
      continue;
    }
    same(first.data(), row.data(), width);
    bool nan = false;
    for (float f : first) nan = nan || std::isnan(f);
    if (!nan) CHECK(first_stored == stored.values());
    if (nan || std::isinf(first_squares))
      CHECK(std::isnan(squares) || std::isinf(squares));
    else
      close(double(squares), double(first_squares),
            static_cast<double>(width + 1) * kUlp * double(first_squares) + 1e-37);
  }
}

/// Every column whose least possible score is below the threshold survives, none that is above does.
void screens(Bytes& in) {
  const int64_t m = in.between(1, 100), ldz = pad(m);
  constexpr float kInf = std::numeric_limits<float>::infinity();
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

/// Softmaxes on logits within [-2000, 2000], with -inf where an entry is absent; a row or column may be all absent.
/// Route's weights against exact ones: e = 2^(logit + shift - top') within the logit's own rounding.
void route_weights(Bytes& in) {
  const int64_t n = in.between(1, 64), m = in.between(1, 70), ldz = pad(m);
  constexpr float kInf = std::numeric_limits<float>::infinity();
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

/// The softmax over agents: its log-sum-exp, and attend's, whose weights add up to 1 and come again from it.
void softmaxes(Bytes& in) {
  const int64_t n = in.between(1, 64), m = in.between(1, 70), ldz = pad(m);
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const float steep = static_cast<float>(in.between(1, 255));
  auto z = in.values(n * m, false);
  for (float& x : z) x = in.byte() % 16 ? x * steep : -kInf;
  const auto biases = in.values(m, false);
  Guarded<float> bias(strided(biases, 1, m, ldz, -kInf));
  std::vector<float> first_lse, first_soft, first_soft_lse;
  for (const Kernels* kernels : all()) {
    Guarded<float> values(strided(z, n, m, ldz, -kInf)), lse(n);
    kernels->row_lse(static_cast<int>(n), m, values.data(), ldz, lse.data());
    Guarded<float> soft(strided(z, n, m, ldz)), soft_lse(n);
    double steepest = 0;
    for (int64_t i = 0; i < n * ldz; ++i) {
      if (std::isinf(soft.data()[i])) soft.data()[i] = -1e4f;  // products are finite: absence comes with the bias
      steepest = std::fmax(steepest, std::fabs(double(soft.data()[i])));
    }
    // a logit in base 2, its bias and its row's lse: each rounds as its size, and an exponential multiplies by ln 2
    const double apart = 1e-5 + 4 * kUlp * (2 * steepest + 16);
    Guarded<float> weights(soft.values());
    kernels->row_softmax(static_cast<int>(n), m, soft.data(), ldz, .5f, bias.data(), soft_lse.data());
    kernels->row_weights(static_cast<int>(n), m, weights.data(), ldz, .5f, bias.data(), soft_lse.data());
    CHECK(values.intact() && lse.intact() && soft.intact() && soft_lse.intact() && weights.intact());
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < m; ++j) {
        sum += double(soft.data()[i * ldz + j]);
        close(double(weights.data()[i * ldz + j]), double(soft.data()[i * ldz + j]), 4 * apart);
      }
      close(sum, 1, 1e-5);
    }
    if (first_lse.empty()) {
      first_lse = lse.values();
      first_soft = soft.values();
      first_soft_lse = soft_lse.values();
      continue;
    }
    for (int64_t i = 0; i < n; ++i) {
      close(double(lse.data()[i]), double(first_lse[test::size(i)]),
            1e-5 * (1 + std::fabs(double(first_lse[test::size(i)]))));
      close(double(soft_lse.data()[i]), double(first_soft_lse[test::size(i)]),
            1e-5 * (1 + std::fabs(double(soft_lse.data()[i]))));
      for (int64_t j = 0; j < m; ++j)
        close(double(soft.data()[i * ldz + j]), double(first_soft[test::size(i * ldz + j)]), apart);
    }
  }
}

void gradients(Bytes& in) {
  const int64_t n = in.between(1, 64), m = in.between(1, 70), ldz = pad(m);
  constexpr float kInf = std::numeric_limits<float>::infinity();
  auto raw = in.values(n * m, false);
  for (float& x : raw) x = -std::fabs(x);
  const auto g = in.values(n * m, false), shifts = in.values(n, false), offsets = in.values(m, false);
  auto row_lses = in.values(n, false), lses = in.values(m, false), rates = in.values(m, false);
  for (float& r : rates) r = std::fabs(r);
  for (float& l : row_lses) l = std::fabs(l);  // weights of at most 1
  Guarded<float> shift(shifts), row_lse(row_lses), lse(strided(lses, 1, m, ldz, kInf)),
      offset(strided(offsets, 1, m, ldz)), rate(strided(rates, 1, m, ldz));
  const bool shares = in.flag();
  std::vector<std::vector<float>> first;
  for (const Kernels* kernels : all()) {
    Guarded<float> weights(strided(raw, n, m, ldz, -kInf)), slopes(strided(g, n, m, ldz)), d_bias(n), row_sum(n),
        d_raw(std::vector<float>(test::size(ldz))), column_sum(std::vector<float>(test::size(ldz)));
    kernels->route_gradient(static_cast<int>(n), m, weights.data(), slopes.data(), ldz,
                            {shift.data(), shares ? row_lse.data() : nullptr, lse.data(), offset.data(), rate.data(),
                             d_bias.data(), row_sum.data(), d_raw.data(), column_sum.data()});
    Guarded<float> products(strided(g, n, m, ldz)), sums(std::vector<float>(test::size(ldz)));
    kernels->attend_gradient(static_cast<int>(n), m, weights.data(), products.data(), ldz, shift.data(), sums.data());
    std::vector<std::vector<float>> got;
    for (Guarded<float>* a : {&weights, &slopes, &d_bias, &row_sum, &d_raw, &column_sum, &products, &sums}) {
      CHECK(a->intact());
      got.push_back(a->values());
    }
    if (first.empty()) {
      first = got;
      continue;
    }
    for (size_t a = 0; a < got.size(); ++a) {
      const bool columns = a == 4 || a == 5 || a == 7, matrix = a < 2 || a == 6;
      double size = 0;
      for (size_t i = 0; i < got[a].size(); ++i)
        if (std::isfinite(first[a][i])) size = std::max(size, std::fabs(double(first[a][i])));
      double terms = 0;  // what cancels: the largest weight and its factors, once for each row and column
      for (float w : first[0])
        if (std::isfinite(w)) terms = std::max(terms, double(w));
      for (size_t i = 0; i < got[a].size(); ++i) {
        if ((columns && static_cast<int64_t>(i) >= m) || (matrix && static_cast<int64_t>(i) % ldz >= m)) continue;
        close(double(got[a][i]), double(first[a][i]),
              1e-5 * size + 1e-5 * terms * 8 * 16 * 8 * static_cast<double>(n + m));
      }
    }
  }
}

void distances(Bytes& in) {
  const int64_t n = in.between(1, 64), m = in.between(1, 70), ldz = pad(m);
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const auto z = in.values(n * m, false);
  auto row_norms = in.values(n, false), norms = in.values(m, false), rates = in.values(m, false);
  for (auto* a : {&row_norms, &norms, &rates})
    for (float& x : *a) x = std::fabs(x);
  Guarded<float> row_norm(row_norms), norm(strided(norms, 1, m, ldz, kInf)), rate(strided(rates, 1, m, ldz, 1.f));
  for (const Kernels* kernels : all()) {
    Guarded<float> logits(strided(z, n, m, ldz));
    kernels->distance_logits(static_cast<int>(n), m, logits.data(), ldz, row_norm.data(), norm.data(), rate.data());
    CHECK(logits.intact());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        const double a = double(row_norms[test::size(i)]), b = double(norms[test::size(j)]),
                     product = double(z[test::size(i * m + j)]), r = double(rates[test::size(j)]);
        close(double(logits.data()[i * ldz + j]), -r * std::max(0.0, a + b - 2 * product),
              6 * kUlp * r * (a + b + 2 * std::fabs(product)));
      }
    const int64_t reach = (m + 3) / 4 * 4;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = m; j < reach; ++j) CHECK(logits.data()[i * ldz + j] == -kInf);  // padding takes no part
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
