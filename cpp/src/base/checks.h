// SPDX-License-Identifier: Apache-2.0
// Checks that several verbs share. Each message says what was expected and what was given.
#pragma once
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <initializer_list>

#include "hisac/array.h"
#include "hisac/context.h"
#include "hisac/status.h"

namespace hisac {

#define HISAC_TRY(expression)                          \
  do {                                                 \
    if (Status s_ = (expression); !s_.ok()) return s_; \
  } while (0)

/// The error of an argument.
__attribute__((format(printf, 1, 2))) Status invalid(const char* format, ...) noexcept;

constexpr int64_t kMostWidth = int64_t{1} << 20;   // of D, V, d and H
constexpr int64_t kMostAgents = int64_t{1} << 24;  // of a user
constexpr int64_t kMostRows = int64_t{1} << 40;    // of T, B and N: a product of two sizes stays within int64

/// Whether all sizes are in [least, most].
inline bool within(std::initializer_list<int64_t> sizes, int64_t least, int64_t most) noexcept {
  for (const int64_t size : sizes)
    if (size < least || size > most) return false;
  return true;
}

/// Every [start, end) lies in [0, rows) with start <= end. On a device the ranges cannot be read and are not checked.
inline Status check_spans(const char* verb, const char* name, const Spans& h, int64_t rows, Device device) noexcept {
  if (h.users < 0 || (h.users > 0 && (!h.starts || !h.ends)))
    return invalid("%s: %s expected for %" PRId64 " users, got none", verb, name, h.users);
  if (h.dtype != DType::int32 && h.dtype != DType::int64)
    return Status::error(Code::wrong_type, "%s: %s expected int32 or int64", verb, name);
  for (int64_t b = 0; b < h.users && device == Device::cpu; ++b)
    if (h.start(b) < 0 || h.end(b) < h.start(b) || h.end(b) > rows)
      return invalid("%s: %s expected 0 <= start <= end <= %" PRId64 " for every user, got [%" PRId64 ", %" PRId64
                     ") for user %" PRId64,
                     verb, name, rows, h.start(b), h.end(b), b);
  return {};
}

/// The users' ranges of n candidates or tokens, one after another.
inline Status check_in_order(const char* verb, const char* name, const Spans& spans, int64_t n,
                             Device device) noexcept {
  HISAC_TRY(check_spans(verb, name, spans, n, device));
  for (int64_t b = 1; b < spans.users && device == Device::cpu; ++b)
    if (spans.start(b) < spans.end(b - 1))
      return invalid("%s: %s expected in order, got a step back at user %" PRId64, verb, name, b);
  return {};
}

constexpr const char* name_of(DType type) noexcept {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "int32", "int64", "int8"};
  return kNames[static_cast<int>(type)];
}

inline Status check_float(const char* verb, const char* name, DType type, const char* others = " or float16") noexcept {
  if (type == DType::float32 || type == DType::bfloat16 || type == DType::float16) return {};
  return Status::error(Code::wrong_type, "%s: %s expected float32, bfloat16%s", verb, name, others);
}

/// A shape as messages have it: "[300, 48]".
struct ShapeText {
  char text[96];  // 4 numbers of 20 characters
  template <int N>
  explicit ShapeText(const int64_t (&shape)[N]) noexcept {
    static_assert(N <= 4);
    int n = 0;
    for (int i = 0; i < N; ++i)
      n += std::snprintf(text + n, sizeof text - size_t(n), "%s%" PRId64, i ? ", " : "[", shape[i]);
    std::snprintf(text + n, sizeof text - size_t(n), "]");
  }
};

template <class T, int N>
bool has_shape(const Array<T, N>& array, const int64_t (&expected)[N]) noexcept {
  return std::equal(expected, expected + N, array.shape);
}

template <class T, int N>
Status check_shape(const char* verb, const char* name, const int64_t (&expected)[N], const Array<T, N>& got) noexcept {
  if (has_shape(got, expected)) return {};
  return invalid("%s: %s expected %s, got %s", verb, name, ShapeText(expected).text, ShapeText(got.shape).text);
}

}  // namespace hisac
