// SPDX-License-Identifier: Apache-2.0
// A batch of histories: what every verb reads of the users' behaviours.
#pragma once
#include "array.h"

namespace hisac {

/// The behaviours of B users. The same fields in the same order are `hisac.Histories` in Python. A field whose data is
/// null is not given. data() of an empty std::vector may be null: pass any other pointer for an empty array. Each verb
/// names the fields that it reads. The sizes of all fields that are given must agree.
///
/// With x_ids, x and codes are tables of items, with the same rows: encode a catalogue once, and name the item of each
/// behaviour. A behaviour whose id is outside the table (-1 for padding) is absent in every verb. With v_ids, v is a
/// table; a behaviour whose id is outside has no v: it votes, and is not routed.
///
/// `longest` and `rows` size workspaces. Where they are stated, a batch with more is an error. Where they are not, the
/// CPU counts them from the offsets. On CUDA the host does not see the offsets: `longest` is then T, and `rows` T for
/// ragged offsets, else B * longest.
///
/// A service makes its workspace before any request is there. No array need be there for that, but codes, where the
/// requests have them: else the workspace has room to encode x. `offsets(users)` of array.h names the users, and
/// `longest` and `rows` are stated (else they are T and B * T). The workspace serves every smaller batch:
///
///   Histories largest;
///   largest.v = rows(static_cast<const float*>(nullptr), 0, V);
///   largest.codes = codes_of_all_items;
///   largest.offsets = offsets(64);
///   largest.longest = largest.rows = 10000;
///   const size_t bytes = compress_workspace(context, book, params, largest, out);
struct Histories {
  Rows x{};                         // [T, D], or [items, D] with x_ids; data null: the prototypes of `codes`
  Rows v{};                         // [T, V], or [rows, V] with v_ids
  Spans offsets{};                  // B users
  Array<const int32_t, 2> codes{};  // [T, L], or [items, L] with x_ids: semantic IDs
  Ids x_ids{}, v_ids{};             // [T]; null: behaviour t has row t
  Array<const float, 1> x_scale{};  // [1] or [rows of x], with x of int8: x = scale * int8, rounded; null: 1
  Array<const float, 1> bias{};     // [T] of routing: the logarithm of a behaviour's weight; null: 0
  Array<const float, 1> spread{};   // [T] added to a behaviour's squared distances; null: 0
  Weights weights{};                // [T] of voting; null: 1
  int64_t longest = 0;              // no user has more behaviours; 0: not stated
  int64_t rows = 0;                 // all users have no more behaviours together; 0: not stated

  /// T: the size of x_ids, else of v_ids, else the rows of v, of x, of codes.
  int64_t behaviours() const noexcept { return x_ids ? x_ids.size : v_ids ? v_ids.size : v.data ? v.rows : items(); }
  /// The rows of x and codes.
  int64_t items() const noexcept { return x.data ? x.rows : codes.shape[0]; }
};

}  // namespace hisac
