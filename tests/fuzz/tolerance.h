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

struct Leaf {
  double rows, users, width, value_width;           // sizes; rows: the longest history
  double x;                                         // the longest row
  double v, bias, spread;                           // the largest moduli
  double d_sum_x = 0, d_sum_v = 0, d_sum_bias = 0;  // d_sum_bias: of spread too

  /// Of a sum, relatively: roundings of e^(bias - the leaf's log weight) and of what is added up.
  double skew() const { return (steps(rows) + 16 + 4 * bias + 2 * std::log(rows + 1)) * kUlp; }
  /// Of a sum: its rows and their mean are at most 2 x apart.
  double most_spread() const { return 4 * x * x + spread; }
  double sum_x() const { return 2 * (4 * skew() * x + 0x1p-124); }
  double sum_v() const { return 2 * (4 * skew() * v + 0x1p-124); }
  double sum_bias() const { return 2 * (skew() + 4 * kUlp * (bias + std::log(rows + 1)) + 4 * kUlp); }
  double sum_spread() const { return 2 * ((4 * skew() + 2 * kUlp) * most_spread() + 0x1p-124); }

  /// Backward, from given sums: a share is at most 1, and a row has one for each user.
  double share() const { return std::expm1((2 * (2 * bias + std::log(rows + 1)) + 16) * kUlp) + 2 * skew(); }
  double d_v() const { return 2 * users * ((share() + (users + 1) * kUlp) * d_sum_v + 0x1p-124); }
  double d_bias() const {
    const double slope = 2 * value_width * v * d_sum_v + 2 * width * x * d_sum_x + d_sum_bias * (1 + 2 * most_spread());
    return 2 * users * ((share() + (width + value_width + users + 32) * kUlp) * slope + 0x1p-124);
  }
};

struct Route {
  double rows, users, agents, width, value_width;     // sizes; rows: the longest history
  double x, p;                                        // the longest row and prototype
  double v, bias, spread, d_tokens, d_lse, d_mean_x;  // the largest moduli
  double tau;                                         // the smallest
  bool softmax_over_agents;                           // Normalize::agents
  double coarse;                                      // kRounded, kBf16x3 or 0: of x, prototypes, weights and v
  DType type;
  double groups;  // of rows in sparse routing, each of which is scaled and added; else 0

  double far() const { return x + std::max(x, p); }
  double all_steps() const { return steps(rows) + 6 * groups; }
  double square() const { return far() * far() + spread; }
  /// Of a weight, as an error of its logit.
  double logit() const {
    const double drift = coarse > 0 ? coarse * far() + 2 * std::sqrt(width) * 0x1p-126 : 0;  // of prototypes
    const double r = square() / tau;
    double e = (width + 14) * kUlp * r + (2 * far() * drift + drift * drift) / tau;
    if (softmax_over_agents) e = 2 * e + (agents + 8 + 6 * r + 4 * std::log(agents + 1)) * kUlp;
    return e + (4 * r + 8 * bias + 2 * std::log(rows + 1) + 16) * kUlp + 2 * coarse;
  }
  double sums() const { return (2 * all_steps() + 8) * kUlp + coarse + rows * 0x1p-124; }
  double mean_of(double size) const { return mean(std::expm1(logit()), size) + sums() * size; }
  double mean_x() const { return 2 * (mean_of(x) + rounding(DType::float32, x + mean_of(x))); }
  double tokens() const { return 2 * (mean_of(v) + rounding(type, v + mean_of(v))); }
  double lse() const {
    const double e = logit(), size = square() / tau + bias + std::log(rows + 1);
    return 2 * (log_sum(std::expm1(e), e) + (all_steps() + 8 + 2 * size) * kUlp);
  }

  /// Backward, from given tokens, lse and means of x. A column of weights sums to (1 + f)^2 at most, a row of them to
  /// as much for each agent; `slope` bounds what multiplies a weight in dz.
  double f() const {
    return std::expm1(logit()) + 2 * coarse + (value_width + 2 * width + 2 * all_steps() + agents + 64) * kUlp;
  }
  double mass() const { return (1 + f()) * (1 + f()); }
  double dz() const {
    const double slope = 2 * value_width * v * d_tokens + 2 * width * x * d_mean_x + d_lse;
    return 2 * f() * mass() * slope * (softmax_over_agents ? 2 * (1 + agents) : 1) + 0x1p-100;
  }
  double d_v() const { return 4 * users * (agents + 1) * mass() * d_tokens * f() + 0x1p-100; }
  double d_bias() const { return users * agents * dz(); }
  double d_spread() const { return 2 * users * agents * dz() / tau; }
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

struct Match {
  double rows, width, candidates;  // sizes, of all users
  double v, bias, d_v, d_lse;      // the largest moduli
  DType type;

  double weight() const { return std::expm1((8 * bias + 16) * kUlp) + steps(rows) * kUlp; }
  double v_out() const { return 2 * (mean(weight(), v) + rounding(type, v + mean(weight(), v))); }
  double lse() const { return 2 * (log_sum(weight(), weight()) + (8 + 2 * (bias + std::log(rows + 1))) * kUlp); }
  /// Of what all candidates give to a sum, on all levels, of which a book has 8 at most.
  double d_v_out() const { return 2 * 8 * candidates * (2 * weight() + 16 * kUlp) * d_v + 0x1p-100; }
  double d_bias() const {
    return 2 * 8 * candidates * (4 * weight() + 32 * kUlp) * (2 * width * v * d_v + d_lse) + 0x1p-100;
  }
};

}  // namespace tolerance
