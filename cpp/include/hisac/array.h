// SPDX-License-Identifier: Apache-2.0
// Borrowed arrays. Nothing here owns memory; all arrays are row-major and contiguous. The natural alignment of
// their elements suffices, but workspaces and codebook images need 64 bytes. Outputs must not overlap inputs or one
// another; only the Python binding checks this. Verbs check the shape of a required array, but hardly ever its pointer:
// null data there is undefined behaviour.
//
// Letters are dimensions everywhere: B users, T behaviours, D semantic width, V value width, L levels, C codes of a
// level, M agents a user, N candidates, H heads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace hisac {

/// N-dimensional view; shape[N - 1] varies fastest. `data` may be null where an argument is optional.
template <class T, int N>
struct Array {
  T* data = nullptr;
  int64_t shape[static_cast<std::size_t>(N)] = {};
  explicit operator bool() const noexcept { return data != nullptr; }
  template <class U = T, class = std::enable_if_t<!std::is_const_v<U>>>
  operator Array<const U, N>() const noexcept {
    Array<const U, N> read_only{data, {}};
    for (int i = 0; i < N; ++i) read_only.shape[i] = shape[i];
    return read_only;
  }
};

enum class DType : int32_t { float32, bfloat16, float16, int32, int64, int8 };

constexpr int64_t bytes_of(DType type) noexcept {
  return type == DType::int8 ? 1 : type == DType::bfloat16 || type == DType::float16 ? 2 : type == DType::int64 ? 8 : 4;
}

/// Element i of an array of int32 or int64.
inline int64_t integer_at(const void* data, DType type, int64_t i) noexcept {
  return type == DType::int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
}

/// Read-only rows [rows, width] of float32, bfloat16 or float16: x and v of the verbs; q, keys and values of `attend`.
/// The x of `route`, its backward and `leaf_sums` may be int8 too.
struct Rows {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t rows = 0, width = 0;
};

/// The row of a table for each behaviour, [size], int32 or int64; one outside the table means no row. Null: behaviour t
/// has row t.
struct Ids {
  const void* data = nullptr;
  DType dtype = DType::int64;
  int64_t size = 0;

  explicit operator bool() const noexcept { return data != nullptr; }
  int64_t operator[](int64_t t) const noexcept { return integer_at(data, dtype, t); }
};

/// What each behaviour counts in a vote, [size], float32 or int64. Null: 1.
struct Weights {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t size = 0;

  explicit operator bool() const noexcept { return data != nullptr; }
};

/// Rows to write, [rows, width]: tokens, which have the type of v, and `out` of `attend`, which has the type of q.
struct MutableRows {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t rows = 0, width = 0;

  operator Rows() const noexcept { return {data, dtype, rows, width}; }
};

/// User b has the rows [starts[b], ends[b]), int32 or int64. Ragged offsets [B + 1]: starts = offsets, ends =
/// offsets + 1. Ranges may overlap: the daily samples of one user share one table of events.
struct Spans {
  const void* starts = nullptr;
  const void* ends = nullptr;
  DType dtype = DType::int64;
  int64_t users = 0;

  int64_t start(int64_t b) const noexcept { return integer_at(starts, dtype, b); }
  int64_t end(int64_t b) const noexcept { return integer_at(ends, dtype, b); }
  /// Whether starts and ends are of one array of offsets.
  bool ragged() const noexcept { return starts && ends == static_cast<const std::byte*>(starts) + bytes_of(dtype); }
};

/// Spans to write, of int64. Ragged: ends = starts + 1, of an array [B + 1].
struct MutableSpans {
  int64_t* starts = nullptr;
  int64_t* ends = nullptr;
  int64_t users = 0;

  bool ragged() const noexcept { return starts && ends == starts + 1; }
};

// ---- makers

/// Of float and of signed integers of 8, 32 and 64 bits; no other has one.
template <class T>
constexpr DType dtype_of() noexcept {
  constexpr bool integer = std::is_integral_v<T> && std::is_signed_v<T>;
  static_assert(std::is_same_v<T, float> || (integer && sizeof(T) != 2),
                "float, or a signed integer, of 8, 32, 64 bits");
  return !integer ? DType::float32 : sizeof(T) == 1 ? DType::int8 : sizeof(T) == 4 ? DType::int32 : DType::int64;
}
/// The same where only integers of 32 and 64 bits will do, such as int64_t, but not size_t.
template <class T>
constexpr DType index_type() noexcept {
  constexpr bool fits = std::is_integral_v<T> && std::is_signed_v<T> && sizeof(T) >= 4;
  static_assert(fits, "int32_t or int64_t");
  return sizeof(T) == 4 ? DType::int32 : DType::int64;
}

/// array(p, 2, 3): [2, 3].
template <class T, class... Sizes>
Array<T, sizeof...(Sizes)> array(T* data, Sizes... shape) noexcept {
  return {data, {static_cast<int64_t>(shape)...}};
}

/// Rows of float or int8_t: Rows of a pointer to const, else MutableRows, which convert to Rows.
template <class T>
auto rows(T* data, int64_t n, int64_t width) noexcept {
  using Element = std::remove_const_t<T>;
  static_assert(std::is_same_v<Element, float> || sizeof(T) == 1, "float or int8_t; name the type of any other");
  return std::conditional_t<std::is_const_v<T>, Rows, MutableRows>{data, dtype_of<Element>(), n, width};
}
inline Rows rows(const void* data, DType type, int64_t n, int64_t width) noexcept { return {data, type, n, width}; }
inline MutableRows rows(void* data, DType type, int64_t n, int64_t width) noexcept { return {data, type, n, width}; }

/// offsets [users + 1], int32_t or int64_t.
template <class Integer>
Spans offsets(const Integer* data, int64_t users) noexcept {
  return {data, data + 1, index_type<Integer>(), users};
}
/// Of users whose offsets are not there yet, to size a workspace.
inline Spans offsets(int64_t users) noexcept { return {nullptr, nullptr, DType::int64, users}; }
/// starts and ends [users] each.
template <class Integer>
Spans ranges(const Integer* starts, const Integer* ends, int64_t users) noexcept {
  return {starts, ends, index_type<Integer>(), users};
}

/// int32_t or int64_t [n].
template <class Integer>
Ids ids(const Integer* data, int64_t n) noexcept {
  return {data, index_type<Integer>(), n};
}
/// float or int64_t [n].
template <class T>
Weights weights(const T* data, int64_t n) noexcept {
  static_assert(std::is_same_v<T, float> || sizeof(T) == 8, "float or int64_t");
  return {data, dtype_of<T>(), n};
}

}  // namespace hisac
