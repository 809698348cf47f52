// SPDX-License-Identifier: Apache-2.0
// A batch of histories: what every verb reads of the users' behaviours.
#pragma once
#include "array.h"

namespace hisac {

/// The behaviours of B users. The same fields in the same order are `hisac.Histories` in Python. Each verb names the
/// fields that it reads, and looks at no other. A field whose data is null is not given: an empty array that is given
/// needs another pointer.
struct Histories {
  Rows x{};                         // [T, D], or [rows, D] with x_ids; data null: the prototypes of `codes`
  Rows v{};                         // [T, V], or [rows, V] with v_ids
  Spans offsets{};                  // B users
  Array<const int32_t, 2> codes{};  // [T, L] semantic IDs
  Ids x_ids{}, v_ids{};             // [T], null: behaviour t has row t
  Array<const float, 1> x_scale{};  // [1] or [rows of x], with x of int8: x = scale * int8, rounded; null: 1
  Array<const float, 1> bias{};     // [T] of routing: the logarithm of a behaviour's weight; null: 0
  Array<const float, 1> spread{};   // [T] added to a behaviour's squared distances; null: 0
  Array<const float, 1> weights{};  // [T] of voting; null: 1

  /// T as `route` and `leaf_sums` count it.
  int64_t behaviours() const noexcept { return v_ids ? v_ids.size : v.rows; }
};

}  // namespace hisac
