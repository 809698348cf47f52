// SPDX-License-Identifier: Apache-2.0
// Sums of float64 that are exact until they are rounded, once, to nearest even.
#include "base/exact_sum.h"

#include <doctest/doctest.h>

#include <limits>
#include <vector>

using hisac::ExactSum;

namespace {

/// The sum of values, in two parts whose digits are added.
double sum(const std::vector<double>& values, size_t cut = 0) {
  int64_t digits[ExactSum::kDigits] = {}, more[ExactSum::kDigits] = {};
  for (size_t i = 0; i < values.size(); ++i) ExactSum::add(i < cut ? digits : more, values[i]);
  ExactSum::carry(digits);
  for (int i = 0; i < ExactSum::kDigits; ++i) digits[i] += more[i];
  ExactSum::carry(digits);
  return ExactSum::value(digits);
}

}  // namespace

TEST_CASE("one value, of any size, is itself") {
  CHECK(sum({}) == 0);
  for (int exponent = -1074; exponent < 1024; ++exponent)
    for (double mantissa : {1.0, 1.25, 1 + 0x1p-52, 2 - 0x1p-52}) {
      const double value = std::ldexp(mantissa, exponent);
      CHECK(sum({value}) == value);
      CHECK(sum({value, 0}, 1) == value);
    }
  CHECK(sum({std::numeric_limits<double>::max()}) == std::numeric_limits<double>::max());
}

TEST_CASE("ties go to even, and the smallest part beyond a tie decides it") {
  for (double unit : {0x1p-900, 0x1p-30, 1.0, 0x1p900}) {
    const double whole = std::ldexp(1.0, 53) * unit;
    CHECK(sum({whole, unit}) == whole);                                // a tie, to even
    CHECK(sum({whole + 2 * unit, unit}, 1) == whole + 4 * unit);       // a tie, to even
    CHECK(sum({whole, unit, 0x1p-1074}, 2) == whole + 2 * unit);       // beyond the tie, far below
    CHECK(sum({whole, unit, unit * 0x1p-20}) == whole + 2 * unit);     // and near
    CHECK(sum({whole, unit * (1 - 0x1p-53), 0x1p-1074}, 1) == whole);  // before it
    CHECK(sum({unit, unit, whole}, 1) == whole + 2 * unit);            // small values count together
  }
}

TEST_CASE("many values carry") {
  const std::vector<double> ones(100'000, 4294967295.0);
  CHECK(sum(ones, 50'000) == 429496729500000.0);
}
