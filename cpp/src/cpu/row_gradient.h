// SPDX-License-Identifier: Apache-2.0
// The gradient of x or of v. Without ids it has a row for each behaviour, and is written in place. With ids x or v is a
// table: each behaviour of some history then has a slot of scratch (Waves::gap), and `finish` adds up the slots of each
// row of the table, in float64 and in the order of the behaviours. Nothing here grows with T but the gradient itself.
#pragma once
#include "base/arena.h"
#include "base/schedule.h"
#include "hisac/histories.h"

namespace hisac::cpu {

class RowGradient {
 public:
  /// out [T, width], or [rows of the table, width], or [size of rows, width] where rows of the table are listed; null:
  /// not wanted. table_rows: of the table, where there are ids.
  RowGradient(const Histories& in, const Ids& ids, int64_t table_rows, const Ids& rows,
              const Array<float, 2>& out) noexcept
      : ids_(ids), rows_(rows), table_rows_(table_rows), slots_(std::min(in.rows, in.behaviours())), out_(out) {}

  explicit operator bool() const noexcept { return out_ && out_.shape[1] > 0; }

  void carve(Arena& arena) noexcept {
    if (!gathers()) return;
    row_ = arena.take<float>(slots_, out_.shape[1]);
    arena.take_into(slots_, key_, spare_key_, slot_, spare_slot_);
  }

  /// Before any row is added to.
  void clear(const Context& context, const Waves& waves) noexcept;

  /// The row of a behaviour of a user before whose history `gap` behaviours are in none.
  float* row(int64_t behaviour, int64_t gap) const noexcept {
    return row_ + (gathers() ? behaviour - gap : behaviour) * out_.shape[1];
  }

  /// Notes which rows of the table such behaviours [begin, end) have.
  void note(int64_t begin, int64_t end, int64_t gap) const noexcept {
    if (!gathers()) return;
    for (int64_t i = begin; i < end; ++i)
      key_[i - gap] = std::min(static_cast<uint64_t>(ids_[i]), static_cast<uint64_t>(table_rows_));
  }

  /// After all behaviours of all histories.
  void finish(const Context& context, const Waves& waves) noexcept;

 private:
  bool gathers() const noexcept { return *this && ids_; }
  void prefetch(int64_t at, int64_t n) const noexcept;
  void add_up(int64_t begin, int64_t end, float* out) const noexcept;

  Ids ids_, rows_;
  int64_t table_rows_, slots_;
  Array<float, 2> out_;
  float* row_ = out_.data;
  uint64_t *key_ = nullptr, *spare_key_ = nullptr;  // [slots] rows of the table; table_rows_: none
  int64_t *slot_ = nullptr, *spare_slot_ = nullptr;
};

/// Of x and of v.
inline RowGradient gradient_of_x(const Histories& in, const Ids& rows, const Array<float, 2>& out) noexcept {
  return {in, in.x_ids, in.items(), rows, out};
}
inline RowGradient gradient_of_v(const Histories& in, const Ids& rows, const Array<float, 2>& out) noexcept {
  return {in, in.v_ids, in.v.rows, rows, out};
}

/// p [n] = value, by all workers where it is long; p may be null.
void fill(const Context& context, float* p, int64_t n, float value = 0) noexcept;

}  // namespace hisac::cpu
