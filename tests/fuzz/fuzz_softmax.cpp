// SPDX-License-Identifier: Apache-2.0
// The part of the kernel fuzzer that is about logits: weights, their sums and their gradients.
#include "fuzz_kernels.h"

namespace kernel_fuzz {
namespace {

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

}  // namespace

/// The softmax over agents.
void row_sums(Bytes& in) {
  const int64_t n = in.between(1, 64), m = in.between(1, 70), ldz = pad(m);
  const auto z = logits(in, n, m, true);
  Guarded<float> values(strided(z, n, m, ldz, -kInf));
  for (const Kernels* kernels : all()) {
    Guarded<float> lse(n);
    kernels->row_lse(static_cast<int>(n), m, values.data(), ldz, lse.data());
    CHECK(values.intact() && lse.intact());
    for (int64_t i = 0; i < n; ++i) {
      const float* const row = z.data() + i * m;
      const float top = *std::max_element(row, row + m);
      std::vector<Near> terms;
      for (int64_t j = 0; j < m; ++j)
        if (row[j] > -kInf) terms.push_back(near::exp2(Near(row[j]) - Near(top)));
      if (terms.empty())
        CHECK(lse.data()[i] == -kInf);
      else
        close(lse.data()[i], log_sum(near::sum(terms), double(top)));
    }
  }
}

/// The softmax over rows, of products and of logits, with weights in float32, bfloat16 and bf16x3.
void route_weights(Bytes& in) {
  const int64_t n = in.between(1, 64), m = in.between(1, 70), ldz = pad(m);
  const bool products = in.flag();
  const auto z = products ? in.values(n * m, false) : logits(in, n, m, true);
  const float steep = static_cast<float>(in.between(1, 60));
  auto row_norms = in.values(n, false), norms = in.values(m, false), rates = in.values(m, false);
  for (auto* a : {&row_norms, &norms, &rates})
    for (float& x : *a) x = std::fabs(x);
  for (float& x : rates) x *= steep / 16;
  const auto shifts = in.values(n, false);
  auto old = with_absent(in, m);
  for (float& x : old) x *= steep;
  std::vector<float> denominators(test::size(m));
  for (size_t j = 0; j < denominators.size(); ++j)
    denominators[j] = std::isinf(old[j]) ? 0.f : 1 + std::fabs(in.value(false));
  std::vector<Near> logit;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      const Near product(z[test::size(i * m + j)]), s(shifts[test::size(i)]);
      Near d = Near(row_norms[test::size(i)]) + Near(norms[test::size(j)]) - Near(2.f) * product;
      d.value = std::max(0.0, d.value);
      logit.push_back(products ? s - Near(rates[test::size(j)]) * d : product + s);
    }
  Guarded<float> row_norm(row_norms), shift(shifts), norm(strided(norms, 1, m, ldz, kInf)),
      rate(strided(rates, 1, m, ldz, 1.f));
  const auto padded = strided(z, n, m, ldz, products ? 0 : -kInf);
  const auto check = [&](auto weigh, double rounding, auto weight) {
    Guarded<float> max_logit(strided(old, 1, m, ldz, -kInf)), denominator(strided(denominators, 1, m, ldz)),
        factor(ldz), values(padded);
    const bool changed =
        weigh(values.data(), simd::RouteWeights{products ? row_norm.data() : nullptr, shift.data(), norm.data(),
                                                rate.data(), max_logit.data(), denominator.data(), factor.data()});
    CHECK(max_logit.intact() && denominator.intact() && factor.intact() && values.intact());
    CHECK(std::memcmp(values.data(), padded.data(), padded.size() * 4) == 0);
    bool rises = false;
    for (int64_t j = 0; j < m; ++j) {
      const float before = old[test::size(j)], now = max_logit.data()[j];
      std::vector<Near> column;
      for (int64_t i = 0; i < n; ++i) column.push_back(Near(0.f) - logit[test::size(i * m + j)]);
      const Near peak = Near(0.f) - near::least(column);
      if (now == before) {
        CHECK(peak.value - peak.wrong <= double(before) + 12.001);
      } else {
        rises = true;
        close(now, peak);
        CHECK(now > before);  // also beside a column whose max_logit had to rise
      }
      const Near kept = now == before ? Near(1.f) : near::exp2(Near(before) - Near(now));
      if (changed && (before > -kInf || now > -kInf)) close(factor.data()[j], kept);
      std::vector<Near> terms{kept * Near(denominators[test::size(j)])};
      for (int64_t i = 0; i < n; ++i) {
        const Near& x = logit[test::size(i * m + j)];
        const Near exact = x.value > -HUGE_VAL ? near::exp2(x - Near(now)) : Near(0.f);
        const float w = weight(i, j);
        close(w, Near(exact.value, exact.wrong + rounding * (exact.value + exact.wrong)));
        terms.emplace_back(w);
      }
      close(denominator.data()[j], near::sum(terms));
    }
    CHECK(changed == rises);
  };
  for (const Kernels* kernels : all()) {
    Guarded<float> e(n * ldz);
    check(
        [&](const float* x, const simd::RouteWeights& p) {
          return kernels->route_weights(static_cast<int>(n), m, x, ldz, p, e.data(), ldz);
        },
        0, [&](int64_t i, int64_t j) { return e.data()[i * ldz + j]; });
    CHECK(e.intact());
    if (kernels->route_weights_bf16) {
      Guarded<uint32_t> pairs((n + 1) / 2 * ldz);
      check(
          [&](const float* x, const simd::RouteWeights& p) {
            return kernels->route_weights_bf16(static_cast<int>(n), m, x, ldz, p, pairs.data(), nullptr, ldz);
          },
          0x1p-8, [&](int64_t i, int64_t j) { return half_of(pairs.data() + i / 2 * ldz + j, i % 2); });
      CHECK(pairs.intact());
      for (int64_t j = 0; n % 2 && j < m; ++j) CHECK(half_of(pairs.data() + n / 2 * ldz + j, 1) == 0);
    }
    if (kernels->route_weights_bf16) {
      Guarded<uint32_t> high((n + 1) / 2 * ldz), low((n + 1) / 2 * ldz);
      check(
          [&](const float* x, const simd::RouteWeights& p) {
            return kernels->route_weights_bf16(static_cast<int>(n), m, x, ldz, p, high.data(), low.data(), ldz);
          },
          0x1p-16,
          [&](int64_t i, int64_t j) {
            return half_of(high.data() + i / 2 * ldz + j, i % 2) + half_of(low.data() + i / 2 * ldz + j, i % 2);
          });
      CHECK(high.intact() && low.intact());
    }
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

/// Absent rows hold a NaN, and so does what may be read beyond the biases.
void weighed(Bytes& in) {
  const int64_t n = in.between(1, 64), width = in.between(1, 90), ld = width + in.between(0, 3);
  const auto biases = with_absent(in, n), rows = in.values(n * width, false);
  const float scale = std::ldexp(1.f, -static_cast<int>(in.between(0, 20)));
  auto given = strided(biases, 1, n, n + simd::kLanes, std::nanf(""));
  Guarded<float> bias(given), from(strided(rows, n, width, ld));
  for (int64_t i = 0; i < n; ++i)
    if (std::isinf(biases[test::size(i)])) std::fill_n(from.data() + i * ld, width, std::nanf(""));
  for (const Kernels* kernels : all()) {
    const float top = kernels->largest(n, bias.data());
    CHECK(top == *std::max_element(biases.begin(), biases.end()));
    if (std::isinf(top)) continue;
    Guarded<float> sum(width);
    const float total =
        kernels->weigh_rows(static_cast<int>(n), width, bias.data(), top, scale, from.data(), ld, sum.data());
    CHECK(sum.intact());
    std::vector<Near> weights;
    for (float x : biases) weights.push_back(near::exp2((Near(x) - Near(top)) * Near(simd::kLog2e)) * Near(scale));
    close(total, near::sum(weights));
    for (int64_t d = 0; d < width; ++d) {
      std::vector<Near> terms;
      for (int64_t i = 0; i < n; ++i)
        if (!std::isinf(biases[test::size(i)]))
          terms.push_back(weights[test::size(i)] * Near(rows[test::size(i * width + d)]));
      close(sum.data()[d], near::sum(terms));
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
  const bool softmax_over_agents = in.flag();
  for (const Kernels* kernels : all()) {
    Guarded<float> weights(strided(raw, n, m, ldz, -kInf)), slopes(strided(g, n, m, ldz)), d_bias(n), row_sum(n),
        d_raw(std::vector<float>(test::size(ldz))), column_sum(std::vector<float>(test::size(ldz)));
    kernels->route_gradient(static_cast<int>(n), m, weights.data(), slopes.data(), ldz,
                            {shift.data(), softmax_over_agents ? row_lse.data() : nullptr, lse.data(), offset.data(),
                             rate.data(), d_bias.data(), row_sum.data(), d_raw.data(), column_sum.data()});
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
        if (softmax_over_agents) dz[a] = dz[a] - near::exp2(Near(raw[at]) - Near(row_lses[test::size(i)])) * bias;
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

}  // namespace kernel_fuzz
