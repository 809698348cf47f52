// SPDX-License-Identifier: Apache-2.0
// The inner loops of every instruction set that this processor has, on the same bytes and in exact-size memory: copies,
// conversions, screens and survivors equal to the bit what plain scalar code makes of them; sums and exponentials
// within a bound that is carried along with their values in double.
#include "cpu/kernels.h"

#include <algorithm>

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
  return {have, have + cpu::supported(have)};
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
    kernels->matmul(static_cast<int>(n), k, m, left.data(), k, packed.data(), z.data(), ldz);
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

void accumulations(Bytes& in) {
  const int64_t n = in.between(0, 64), m = in.between(1, 70), w = in.between(1, 100), lda = pad(m), ldb = pad(w);
  const auto a = in.values(n * m, false), b = in.values(n * w, false), c = in.values(m * w, false);
  Guarded<float> left(strided(a, n, m, lda)), right(strided(b, n, w, ldb));
  const int64_t rows = (m + 3) / 4 * 4;
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

void screens(Bytes& in) {
  const int64_t n = in.between(1, 16), m = in.between(1, 100), ldz = pad(m);
  const auto z = in.values(n * m, true), half = in.values(m, true);
  const float threshold = in.value(true);
  Guarded<float> norms(strided(half, 1, m, ldz, kInf));
  for (const Kernels* kernels : all()) {
    Guarded<float> scores(strided(z, n, m, ldz)), smallest(n);
    kernels->screen(static_cast<int>(n), m, scores.data(), ldz, norms.data(), smallest.data());
    CHECK(scores.intact() && smallest.intact());
    for (int64_t i = 0; i < n; ++i) {
      const float* const row = scores.data() + i * ldz;
      float least = kInf;
      std::vector<int32_t> expected;
      for (int64_t j = 0; j < m; ++j) {
        CHECK(same(row[j], half[test::size(j)] - z[test::size(i * m + j)]));
        if (row[j] < least) least = row[j];
        if (!(row[j] > threshold)) expected.push_back(static_cast<int32_t>(j));
      }
      CHECK(smallest.data()[i] == least);
      Guarded<int32_t> survivors(m);
      const int64_t count = kernels->survivors(m, row, threshold, survivors.data());
      CHECK(survivors.intact());
      CHECK(std::vector<int32_t>(survivors.data(), survivors.data() + count) == expected);
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

void columns(Bytes& in) {
  const int64_t n = in.between(1, 64), m = in.between(1, 70), ldz = pad(m);
  const auto z = logits(in, n, m, true), shifts = in.values(n, false), old = with_absent(in, m);
  std::vector<float> masses(test::size(m));
  for (size_t j = 0; j < masses.size(); ++j) masses[j] = std::isinf(old[j]) ? 0.f : 1 + std::fabs(in.value(false));
  const auto padded = strided(z, n, m, ldz, -kInf);
  Guarded<float> shift(shifts);
  for (const Kernels* kernels : all()) {
    Guarded<float> values(padded), lse(n);
    kernels->row_lse(static_cast<int>(n), m, values.data(), ldz, lse.data());
    kernels->row_shift(static_cast<int>(n), m, values.data(), ldz, shift.data());
    CHECK(values.intact() && lse.intact());
    for (int64_t i = 0; i < n; ++i) {
      const float* const row = z.data() + i * m;
      const float top = *std::max_element(row, row + m);
      std::vector<Near> terms;
      for (int64_t j = 0; j < m; ++j) {
        CHECK(values.data()[i * ldz + j] == row[j] + shifts[test::size(i)]);
        if (row[j] > -kInf) terms.push_back(near::exp2(Near(row[j]) - Near(top)));
      }
      if (terms.empty())
        CHECK(lse.data()[i] == -kInf);
      else
        close(lse.data()[i], log_sum(near::sum(terms), double(top)));
    }
    Guarded<float> top(strided(old, 1, m, ldz, -kInf)), mass(strided(masses, 1, m, ldz)), factor(ldz);
    const std::vector<float> before = values.values();
    const bool changed =
        kernels->column_softmax(static_cast<int>(n), m, values.data(), ldz, top.data(), mass.data(), factor.data());
    CHECK(values.intact() && top.intact() && mass.intact() && factor.intact());
    bool rises = false;
    for (int64_t j = 0; j < m; ++j) {
      float peak = old[test::size(j)];
      for (int64_t i = 0; i < n; ++i) peak = std::max(peak, before[test::size(i * ldz + j)]);
      rises = rises || peak > old[test::size(j)];
      CHECK(top.data()[j] == peak);
      const auto weight = [&](float x) { return x > -kInf ? near::exp2(Near(x) - Near(peak)) : Near(0.f); };
      const Near kept = weight(old[test::size(j)]);
      close(factor.data()[j], kept);
      std::vector<Near> terms{kept * Near(masses[test::size(j)])};
      for (int64_t i = 0; i < n; ++i) {
        terms.push_back(weight(before[test::size(i * ldz + j)]));
        close(values.data()[i * ldz + j], terms.back());
      }
      close(mass.data()[j], near::sum(terms));
    }
    CHECK(changed == rises);
  }
}

void rows(Bytes& in) {
  const int64_t n = in.between(1, 64), m = in.between(1, 70), ldz = pad(m);
  const auto z = logits(in, n, m, false), biases = with_absent(in, m);  // products are finite: absence is the bias's
  const float scale = in.value(false) / 8;
  Guarded<float> bias(strided(biases, 1, m, ldz, -kInf));
  for (const Kernels* kernels : all()) {
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
  constexpr void (*kParts[])(Bytes&) = {products, accumulations, rows_in_and_out, screens,
                                        columns,  rows,          gradients,       distances};
  kParts[in.byte() % 8](in);
  return 0;
}
