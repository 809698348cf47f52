// SPDX-License-Identifier: Apache-2.0
// A state under another codebook.
#include "base/arena.h"
#include "hisac/encode.h"
#include "state/writer.h"

namespace hisac {
namespace {

/// What a migration needs beside the workspace of `encode`.
class Migration {
 public:
  Migration(const StateHead& head, const Codebook& to) noexcept : head_(head), to_(to) {}

  void carve(Arena& arena) noexcept {
    codes = arena.take<int32_t>(head_.room, to_.levels());
    x = arena.take<float>(head_.mean_x ? 1 : head_.room, head_.width);
  }

  int32_t* codes = nullptr;  // [leaves, L]
  float* x = nullptr;        // [D], or of all leaves where there is no mean x

 private:
  const StateHead& head_;
  const Codebook& to_;
};

}  // namespace

size_t UserState::migrate_workspace(const Context& context, const Codebook& to) const noexcept {
  if (to.empty()) return 0;
  Migration migration(head_of(*this), to);
  Arena arena;
  migration.carve(arena);
  arena.take<std::byte>(static_cast<int64_t>(encode_workspace(context, to)));
  return arena.used();
}

Status UserState::migrate(const Context& context, const Codebook& from, const Codebook& to, Array<std::byte, 1> memory,
                          UserState* out, StateLoss* loss) const noexcept {
  HISAC_TRY(check_state("migrate", &context, from, *this));
  HISAC_TRY(check_writable("migrate", *this));
  HISAC_TRY(check_book("migrate", &to));
  if (to.width() != from.width())
    return invalid("migrate: codebook expected of D = %" PRId64 ", got %" PRId64, from.width(), to.width());
  const StateTable table(*this);
  const StateHead& head = *table.head;
  const StateParams same = params();
  HISAC_TRY(check_memory("migrate", memory, static_cast<int64_t>(bytes(to, same)), *this));
  Arena arena(context.workspace);
  Migration scratch(head, to);
  scratch.carve(arena);
  Context encoding = context;
  int64_t rest;
  std::byte* const left = arena.take_rest(static_cast<int64_t>(encode_workspace(context, to)), &rest);
  encoding.workspace = {left, {rest}};
  HISAC_TRY(arena.check("migrate"));
  UserState made;
  HISAC_TRY(create(to, same, memory, &made));
  Rows x = rows(static_cast<const std::byte*>(table.x), DType::float32, head.leaves, head.width);
  if (!head.mean_x) {
    for (int64_t i = 0; i < head.leaves; ++i) {
      int32_t codes[kMaxLevels];
      codes_of_leaf(from, table.keys[i], codes);
      from.prototype(codes, scratch.x + table.slot(i) * head.width);
    }
    x.data = scratch.x;
  }
  HISAC_TRY(encode(encoding, to, x, {scratch.codes, {head.leaves, to.levels()}}));
  StateWriter writer(to, {}, made);
  StateHead& target = writer.head();
  target.begun = head.begun;
  target.epoch = head.epoch;
  target.position = head.position;
  target.revision = head.revision + 1;
  target.migrated = head.migrated || head.leaves > 0;
  target.seen = head.seen;
  target.absent = head.absent;
  target.dropped_leaves = head.dropped_leaves;
  target.dropped_votes = head.dropped_votes;
  for (int64_t i = 0; i < head.ring; ++i) writer.table().push(table.ring_row(i));
  StateLoss lost;
  for (int64_t i = 0; i < head.leaves; ++i) {
    const int64_t slot = table.slot(i);
    const int32_t* const codes = scratch.codes + slot * to.levels();
    if (!(table.masses[i] > 0) || !to.valid(codes)) {
      ++lost.leaves;
      lost.votes += table.votes[i];
      continue;
    }
    if (table.x) std::copy_n(table.x_row(slot), head.width, scratch.x);
    writer.add_leaf({to.leaf(codes), table.votes[i], table.masses[i], table.spreads ? table.spreads[i] : 0.f, scratch.x,
                     table.v_row(slot)});
  }
  *out = made;
  if (loss) *loss = lost;
  return {};
}

}  // namespace hisac
