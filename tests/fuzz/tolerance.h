// SPDX-License-Identifier: Apache-2.0
// How far two instruction sets may be apart on tame inputs: twice what python/hisac/bounds.py derives for one, with the
// largest norms and moduli of the input in place of each cell's own. Infinite where nothing can be said.
#pragma once
#include <algorithm>
#include <cmath>

#include "hisac/array.h"

namespace tolerance {

using hisac::DType;
constexpr double kUlp = 0x1p-24;
constexpr double kRounded = 0x1p-8, kBf16x3 = 0x1p-15;  // of an operand in bfloat16, or in bf16x3 (amx.h)

/// Roundings on a term's way into a sum of n.
inline double steps(double n) { return 64 + 2 * std::min(n / 64, 32.) + std::log2(std::max(n, 1.)); }
/// A mean of values of at most `size` whose weights are off by at most f each, relatively.
inline double mean(double f, double size) { return f < .5 ? std::min(2 * f / (1 - f), 1.) * 2 * size : 2 * size; }
/// The log of such a sum of weights, whose logits are off by at most e.
inline double log_sum(double f, double e) { return f < 1 ? std::min(-std::log1p(-f), e) : e; }
inline double rounding(DType type, double size) {
  const bool half = type == DType::float16, single = type == DType::float32;
  return (single ? kUlp : half ? 0x1p-11 : 0x1p-8) * size + (half ? 0x1p-24 : 0x1p-133);
}

struct Route {
  double rows, users, agents, width, value_width;  // sizes; rows: the longest history
  double x, p;                                     // the longest row and prototype
  double v, bias, spread, d_tokens, d_lse;         // the largest moduli
  double tau;                                      // the smallest
  bool softmax_over_agents, leaf;                  // Normalize::agents, Method::leaf
  double coarse;                                   // kRounded, kSplit or 0: of x, prototypes, weights and v
  DType type;

  double far() const { return x + std::max(x, p); }
  double square() const { return far() * far() + spread; }
  double skew() const { return leaf ? (steps(rows) + 16 + 4 * bias + 2 * std::log(rows + 1)) * kUlp : 0; }
  /// Of a weight, as an error of its logit, with prototypes off by `drift`.
  double logit(double drift) const {
    if (coarse > 0) drift += coarse * far() + 2 * std::sqrt(width) * 0x1p-126;
    const double r = square() / tau;
    double e = ((width + 14) * kUlp + 4 * skew()) * r + (2 * far() * drift + drift * drift) / tau + skew();
    if (softmax_over_agents) e = 2 * e + (agents + 8 + 6 * r + 4 * std::log(agents + 1)) * kUlp;
    return e + (4 * r + 8 * bias + 2 * std::log(rows + 1) + 16) * kUlp + 2 * coarse;
  }
  double sums() const { return (2 * steps(rows) + 8) * kUlp + 2 * skew() + coarse + rows * 0x1p-124; }
  double moved(double drift) const { return mean(std::expm1(logit(drift)), x) + (sums() + kUlp) * x; }
  double drift(int refine) const {
    double d = 0;
    for (; refine > 0; --refine) d = std::sqrt(width) * moved(d);
    return d;
  }
  double refined(int refine) const { return refine > 0 ? 2 * moved(drift(refine - 1)) : 0; }
  double tokens(int refine) const {
    const double one = mean(std::expm1(logit(drift(refine))), v) + sums() * v;
    return 2 * (one + rounding(type, v + one));
  }
  double lse(int refine) const {
    const double e = logit(drift(refine)), size = square() / tau + bias + std::log(rows + 1);
    return 2 * (log_sum(std::expm1(e), e) + (steps(rows) + 8 + 2 * size) * kUlp);
  }

  /// Backward, from given tokens, lse and prototypes. A column of weights sums to (1 + f)^2 at most, a row of them to
  /// as much for each agent; `slope` bounds what multiplies a weight in dz.
  double f() const {
    return std::expm1(logit(0)) + 8 * skew() + 2 * coarse +
           (value_width + width + 2 * steps(rows) + agents + 64) * kUlp;
  }
  double mass() const { return (1 + f()) * (1 + f()); }
  double dz() const {
    const double slope = 2 * value_width * v * d_tokens + d_lse;
    return 2 * f() * mass() * slope * (softmax_over_agents ? 2 * (1 + agents) : 1) + 0x1p-100;
  }
  double d_v() const { return 4 * users * (agents + 1) * mass() * d_tokens * f() + 0x1p-100; }
  double d_bias() const { return users * agents * dz(); }
  double d_temperature() const { return users * agents * dz() * square() / (tau * tau); }
  double d_x() const { return 4 * users * agents * dz() * far() / tau; }
  double d_prototypes() const { return 4 * dz() * far() / tau; }
};

struct Attend {
  double pairs, tokens, heads, key, value_width;      // sizes; pairs: the most of a user
  double q, keys, values, bias, scale, d_out, d_lse;  // the largest moduli
  DType type;

  double logit() const {
    const double z = std::fabs(scale) * key * q * keys;
    return ((key + 10) * z + 8 * bias + 2 * std::log(tokens + 1) + 16) * kUlp;
  }
  double out() const {
    const double one = mean(std::expm1(logit()), values) + (tokens + 16) * kUlp * values;
    return 2 * (one + rounding(type, values + one));
  }
  double lse() const {
    const double size = std::fabs(scale) * key * q * keys + bias + std::log(tokens + 1);
    return 2 * (log_sum(std::expm1(logit()), logit()) + (tokens + 8 + 2 * size) * kUlp);
  }
  double f() const { return std::expm1(logit()) + (value_width + key + 2 * tokens + pairs + 64) * kUlp; }
  double mass() const { return (1 + f()) * (1 + f()); }
  double dz() const { return 2 * f() * mass() * (2 * value_width * values * d_out + d_lse) + 0x1p-100; }
  double d_q() const { return 2 * dz() * keys * std::fabs(scale); }
  double d_keys() const { return 2 * pairs * dz() * q * std::fabs(scale); }
  double d_values() const { return 2 * pairs * mass() * d_out * f() + 0x1p-100; }
  double d_bias() const { return pairs * heads * dz(); }
};

}  // namespace tolerance
