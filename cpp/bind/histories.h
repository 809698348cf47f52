// SPDX-License-Identifier: Apache-2.0
// A batch of histories from Python: a tuple of the fields of hisac.Histories, in their order.
#pragma once
#include <algorithm>

#include "arrays.h"

namespace hisac::bind {

/// offsets [B + 1]
inline Spans spans(const View& offsets, Call& call, const char* name) {
  const Ids at = ids(offsets, call, name, "int32 or int64 [B + 1]");
  if (at.size == 0) wrong_value(call, name, "[B + 1]", describe(offsets));
  return {at.data, static_cast<const char*>(at.data) + bytes_of(at.dtype), at.dtype, at.size - 1};
}

/// starts and ends [B]
inline Spans spans(const View& starts, const View& ends, Call& call) {
  constexpr const char* kExpected = "int32 or int64 [B]";
  const Ids first = ids(starts, call, "starts", kExpected), last = ids(ends, call, "ends", kExpected);
  if (last.dtype != first.dtype || last.size != first.size)
    wrong_value(call, "ends", "the type and length of starts, " + describe(starts), describe(ends));
  return {first.data, last.data, first.dtype, first.size};
}

using Fields = nb::typed<nb::tuple, nb::object, nb::ellipsis>;

/// The fields that a verb asks for, borrowed.
class Batch {
 public:
  Histories in;

  Batch(Call& call, const Fields& given) : call_(call), given_(given) {
    if (given.size() != kFields) wrong_type(call, "histories", "hisac.Histories", "another tuple");
    in.longest = count(kLongest, "longest");
    in.rows = count(kRows, "rows");
  }
  Batch(const Batch&) = delete;

  /// Every field but weights, where not `weighted`, and codes, where not `coded`: of these it sees the sizes, as of all
  /// that is not read.
  void read_rows(bool coded, bool weighted = false) {
    if (!field(kX).is_none()) in.x = rows(view(kX), call_, "x", 2, "float32, bfloat16, float16 or int8 [T, D]", true);
    if (!field(kV).is_none()) in.v = rows(view(kV), call_, "v", 2, "float32, bfloat16 or float16 [T, V]");
    read_spans();
    if (coded) read_codes();
    in.x_ids = read_ids(kXIds, "x_ids");
    in.v_ids = read_ids(kVIds, "v_ids");
    in.x_scale = array<const float, 1>(view(kXScale), call_, "x_scale", "float32 [1] or [rows of x]", true);
    in.bias = array<const float, 1>(view(kBias), call_, "bias", "float32 [T]", true);
    in.spread = array<const float, 1>(view(kSpread), call_, "spread", "float32 [T]", true);
    if (!coded) see(kCodes, in.codes);
    if (weighted)
      read_weights();
    else if (const int64_t* const n = shape(kWeights, 1))
      in.weights = {kUnread, DType::float32, n[0]};
  }
  /// Leaf sums.
  void read_sums() {
    const auto x = array<const float, 2>(view(kX), call_, "sums.x", "float32 [S, D]");
    const auto v = array<const float, 2>(view(kV), call_, "sums.v", "float32 [S, V]");
    in.x = {x.data, DType::float32, x.shape[0], x.shape[1]};
    in.v = {v.data, DType::float32, v.shape[0], v.shape[1]};
    read_spans();
    in.codes = array<const int32_t, 2>(view(kCodes), call_, "sums.codes", "int32 [S, L]");
    in.bias = array<const float, 1>(view(kBias), call_, "sums.bias", "float32 [S]");
    in.spread = array<const float, 1>(view(kSpread), call_, "sums.spread", "float32 [S]");
  }
  /// Leaf sums for `match`: v, offsets, codes and bias. Of ids it sees that there are some.
  void read_matched() {
    in.v = rows(view(kV), call_, "sums.v", 2, "float32, bfloat16 or float16 [S, V]");
    read_spans();
    in.codes = array<const int32_t, 2>(view(kCodes), call_, "sums.codes", "int32 [S, L]");
    in.bias = array<const float, 1>(view(kBias), call_, "sums.bias", "float32 [S]", true);
    if (!field(kXIds).is_none()) in.x_ids = {kUnread, DType::int64, 0};
    if (!field(kVIds).is_none()) in.v_ids = {kUnread, DType::int64, 0};
  }
  /// The gradients of leaf sums.
  void read_gradients(LeafSumsForward& f) {
    f.d_x = array<const float, 2>(view(kX), call_, "gradients.x", "float32 [S, D]", true);
    f.d_v = array<const float, 2>(view(kV), call_, "gradients.v", "float32 [S, V]", true);
    f.d_bias = array<const float, 1>(view(kBias), call_, "gradients.bias", "float32 [S]", true);
    f.d_spread = array<const float, 1>(view(kSpread), call_, "gradients.spread", "float32 [S]", true);
  }
  /// Codes, x_ids, offsets and weights.
  void read_votes() {
    read_codes();
    read_spans();
    in.x_ids = read_ids(kXIds, "x_ids");
    read_weights();
    if (const int64_t* const n = shape(kX, 2)) in.x = {kUnread, DType::float32, n[0], n[1]};
    if (const int64_t* const n = shape(kV, 2)) in.v = {kUnread, DType::float32, n[0], n[1]};
    if (const int64_t* const n = shape(kVIds, 1)) in.v_ids = {kUnread, DType::int64, n[0]};
    see(kBias, in.bias);
    see(kSpread, in.spread);
  }

 private:
  enum Field { kX, kV, kOffsets, kCodes, kXIds, kVIds, kXScale, kBias, kSpread, kWeights, kLongest, kRows, kFields };

  alignas(8) static constexpr char kUnread[8] = {};  // in place of elements that are not read

  nb::handle field(Field at) const { return PyTuple_GET_ITEM(given_.ptr(), at); }
  const View& view(Field at) { return hold(field(at), at); }
  const View& hold(nb::handle array, int at) { return view_[at] = nb::cast<View>(array); }

  /// A whole number, or 0 for None.
  int64_t count(Field at, const char* name) {
    const nb::handle given = field(at);
    if (given.is_none()) return 0;
    const auto whole = nb::steal(PyBool_Check(given.ptr()) ? nullptr : PyNumber_Index(given.ptr()));
    PyErr_Clear();
    int64_t n = 0;
    if (!whole || !nb::try_cast(whole, n, false))
      wrong_type(call_, name, "a whole number", nb::cast<std::string>(nb::repr(given)));
    if (n < 0) wrong_value(call_, name, "0 or more", std::to_string(n));
    return n;
  }
  void read_codes() { in.codes = array<const int32_t, 2>(view(kCodes), call_, "codes", "int32 [T, L]"); }
  void read_weights() {
    constexpr const char* kExpected = "float32 or int64 [T]";
    const View& given = view(kWeights);
    if (given.none) return;
    const void* const data = borrow(given, call_, "weights", 1, kExpected, false);
    const bool votes = given.tensor.dtype == nb::dtype<int64_t>();
    if (!votes && given.tensor.dtype != nb::dtype<float>()) wrong_type(call_, "weights", kExpected, describe(given));
    in.weights = {data, votes ? DType::int64 : DType::float32, given.tensor.shape[0]};
  }
  Ids read_ids(Field at, const char* name) { return ids(view(at), call_, name, "int32 or int64 [T]", true); }

  /// The shape of an array whose elements are not read; null where there is none of so many dimensions.
  const int64_t* shape(Field at, int dimensions) {
    const View& array = view(at);
    return array.none || array.unreadable || array.tensor.ndim != dimensions ? nullptr : array.tensor.shape;
  }
  template <class T, int N>
  void see(Field at, Array<const T, N>& to) {
    const int64_t* const n = shape(at, N);
    if (!n) return;
    to.data = reinterpret_cast<const T*>(kUnread);
    std::copy_n(n, N, to.shape);
  }

  void read_spans() {
    const nb::handle offsets = field(kOffsets);
    if (!PyTuple_Check(offsets.ptr())) {
      in.offsets = spans(view(kOffsets), call_, "offsets");
    } else {
      const auto pair = nb::borrow<nb::tuple>(offsets);
      if (pair.size() != 2) wrong_value(call_, "offsets", "an array, or a tuple (starts, ends)", "another tuple");
      in.offsets = spans(hold(pair[0], kOffsets), hold(pair[1], kFields), call_);
    }
  }

  Call& call_;
  const Fields& given_;
  View view_[kFields + 1];
};

}  // namespace hisac::bind
