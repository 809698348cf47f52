// SPDX-License-Identifier: Apache-2.0
// Running error analysis: a value in double beside the most that the same float32 computation may be away from it, with
// products fused into sums or not. Terms in u^2 are left out; kUlp is larger than u to cover them.
#pragma once
#include <cmath>
#include <vector>

namespace near {

constexpr double kUlp = 0x1.001p-24;  // of a float32 operation, relative
constexpr double kLeast = 0x1p-149;   // and absolute

struct Near {
  double value, wrong;
  explicit Near(float exact) : value(double(exact)), wrong(0) {}
  Near(double v, double w) : value(v), wrong(w) {}
};

inline Near rounded(double value, double wrong) {
  return {value, std::isinf(value) ? 0 : wrong + kUlp * (std::fabs(value) + wrong) + kLeast};
}
inline Near operator+(const Near& a, const Near& b) { return rounded(a.value + b.value, a.wrong + b.wrong); }
inline Near operator-(const Near& a, const Near& b) { return rounded(a.value - b.value, a.wrong + b.wrong); }
inline Near operator*(const Near& a, const Near& b) {
  return rounded(a.value * b.value, (std::fabs(a.value) + a.wrong) * b.wrong + std::fabs(b.value) * a.wrong);
}
/// a (1 / b) for b > 0: two roundings.
inline Near operator/(const Near& a, const Near& b) {
  const double least = b.value - b.wrong, inverse = 1 / b.value;
  return a * rounded(inverse, 1 / least - inverse);
}
/// The kernels' 2^x: 2 ulp, and nothing below 2^-126.
inline Near exp2(const Near& x) {
  const double value = std::exp2(x.value);
  return {value, value * (std::exp2(x.wrong) * (1 + 4 * kUlp) - 1) + 0x1p-126};
}
/// Added up in any order.
inline Near sum(const std::vector<Near>& terms) {
  double value = 0, wrong = 0, size = 0;
  for (const Near& t : terms) {
    value += t.value;
    wrong += t.wrong;
    size += std::fabs(t.value) + t.wrong;
  }
  return {value, wrong + static_cast<double>(terms.size()) * kUlp * size};
}

/// The least of terms; infinities are exact.
inline Near least(const std::vector<Near>& terms) {
  double low = HUGE_VAL, value = HUGE_VAL, high = HUGE_VAL;
  for (const Near& t : terms) {
    low = std::fmin(low, t.value - t.wrong);
    value = std::fmin(value, t.value);
    high = std::fmin(high, t.value + t.wrong);
  }
  return {value, std::isinf(value) ? 0 : std::fmax(value - low, high - value)};
}

}  // namespace near
