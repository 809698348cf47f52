// SPDX-License-Identifier: Apache-2.0
// What changes the rows of a state: append, expire, forget, merge.
#include <utility>

#include "base/arena.h"
#include "state/writer.h"
#include "verbs/histories.h"

namespace hisac {
namespace {

Status check_items(const char* verb, const Context& context, const Codebook& book, const StateItems& items,
                   const Ids& ids, const UserState& state) noexcept {
  HISAC_TRY(check_state(verb, &context, book, state));
  HISAC_TRY(check_writable(verb, state));
  const StateHead& head = *StateTable(state).head;
  if (items.model_tag != head.model_tag)
    return invalid("%s: model_tag expected %" PRIu64 ", got %" PRIu64, verb, head.model_tag, items.model_tag);
  if (!ids && ids.size) return invalid("%s: ids expected [%" PRId64 "], got none", verb, ids.size);
  if (head.mean_x && !items.x.data) return invalid("%s: x expected, since the state has mean x, got none", verb);
  static constexpr int64_t kNone = 0;
  Histories in = histories_of(items, head);
  in.x_ids = in.v_ids = ids ? ids : Ids{&kNone, DType::int64, 0};
  const int64_t bounds[] = {0, in.x_ids.size};
  in.offsets = offsets(bounds, 1);
  HISAC_TRY(check_histories(verb, &book, in, book.width(), Device::cpu));
  if (in.x.data && in.x.width != head.width)
    return invalid("%s: x is %s, the codebook has D = %" PRId64 ": D differs", verb,
                   ShapeText({in.x.rows, in.x.width}).text, head.width);
  if (in.v.data && in.v.width == head.value_width) return {};
  return invalid("%s: v expected [items, %" PRId64 "], got %s", verb, head.value_width,
                 ShapeText({in.v.rows, in.v.width}).text);
}

Status check_events(const char* verb, const StateEvents& events) noexcept {
  const int64_t n = events.ids.size;
  if (events.weights) HISAC_TRY(check_shape(verb, "weights", {n}, events.weights));
  if (events.times) HISAC_TRY(check_shape(verb, "times", {n}, events.times));
  return events.positions ? check_shape(verb, "positions", {n}, events.positions) : Status();
}

/// Whether the memory has room for so many leaves more.
Status check_room(const char* verb, const StateTable& t, int64_t more) noexcept {
  if (t.head->room == t.head->most || more <= t.head->room - t.head->leaves) return {};
  return Status::error(Code::out_of_memory,
                       "%s: room for %" PRId64 " leaves expected, got %" PRId64 "; serialise with more room", verb,
                       std::min(t.head->most, t.head->leaves + more), t.head->room);
}

/// Runs change(writer) in the workspace of the context.
template <class Change>
Status write(const char* verb, const Context& context, const Codebook& book, const StateItems& items,
             const UserState& state, Change change) noexcept {
  Arena arena(context.workspace);
  StateWriter writer(book, items, state);
  writer.carve(arena);
  HISAC_TRY(arena.check(verb));
  return change(writer);
}

float weight_of(const StateEvents& events, int64_t i) noexcept { return events.weights ? events.weights.data[i] : 1.f; }
int64_t time_of(const StateEvents& events, int64_t i) noexcept {
  return std::min(events.times ? events.times.data[i] : 0, events.latest);
}

bool among(const Ids& ids, int64_t id) noexcept {
  for (int64_t i = 0; i < ids.size; ++i)
    if (ids[i] == id) return true;
  return false;
}

/// Rows of which a leaf is made again, or all leaves where `leaf` is null; without those that are gone.
void enter_again(StateWriter& writer, const StateEvents& rows, const Ids& gone, const uint64_t* leaf) noexcept {
  for (int64_t i = 0; i < rows.ids.size; ++i) {
    const int64_t id = rows.ids[i];
    const float weight = weight_of(rows, i);
    uint64_t own;
    if (!usable(weight) || !writer.leaf_of(id, &own) || (leaf && own != *leaf) || among(gone, id)) continue;
    const int32_t time = writer.advance(time_of(rows, i));
    writer.enter({id, weight, time});
  }
}

/// Adds the leaves of another state, whose votes are halved so often.
void merge_leaves(StateWriter& writer, const StateTable& from, int64_t halvings) noexcept {
  StateHead& head = writer.head();
  const int64_t dropped = head.dropped_leaves, dropped_votes = head.dropped_votes, before = head.leaves;
  int64_t others = 0, votes = head.votes;
  // First the leaves that both have. One of these that makes place for a new one is met again in the second turn. There
  // it stays out: the table is full of leaves that have as many votes as it had, or more.
  for (const bool both : {true, false})
    for (int64_t i = 0; i < from.head->leaves; ++i) {
      const int64_t at = writer.find(from.keys[i]), theirs = shifted(from.votes[i], halvings);
      const bool found = writer.has(at, from.keys[i]);
      if (both) votes += theirs;
      if (both) others += !found;
      if (both != found) continue;
      const StateLeaf leaf{from.keys[i],
                           std::min(theirs, kMostTableVotes - head.votes),
                           halved(from.masses[i], halvings),
                           from.spreads ? from.spreads[i] : 0.f,
                           writer.x(),
                           from.v_row(from.slot(i))};
      if (from.x) std::copy_n(from.x_row(from.slot(i)), head.width, leaf.x);
      if (found)
        writer.add(at, leaf);
      else if (head.leaves < head.most || !writer.behind(leaf, writer.fewest()))
        writer.add_leaf(leaf);
    }
  head.dropped_leaves = dropped;
  head.dropped_votes = dropped_votes;
  if (before + others == head.leaves) return;  // votes that a full count did not take are not dropped
  count(head.dropped_leaves, before + others - head.leaves);
  count(head.dropped_votes, votes - head.votes);
}

/// Merges the rings by time, of equal times mine first. The rows that are too many leave first. Times count against the
/// epoch at which this begins, whatever epoch rows that leave move to.
void merge_rings(StateWriter& writer, const StateTable& from) noexcept {
  StateHead& head = writer.head();
  const StateTable& table = writer.table();
  const int64_t start = head.epoch;
  const auto moved = [&](RingRow row, int64_t by) {
    row.time = near_epoch(row.time + by);
    return row;
  };
  int64_t left = head.ring, taken = 0;
  const int64_t more = head.ring + from.head->ring - head.ring_room;  // too many
  for (int64_t n = 0; left > 0 || taken < from.head->ring; ++n) {
    const RingRow theirs = taken < from.head->ring ? moved(from.ring_row(taken), from.head->epoch - start) : RingRow{};
    const bool from_them = taken < from.head->ring && (left == 0 || theirs.time < table.ring_row(0).time);
    const RingRow row = from_them ? theirs : table.pop();
    (from_them ? taken : left) += from_them ? 1 : -1;
    if (n >= more) {
      table.push(row);
      continue;
    }
    const int64_t ring = std::exchange(head.ring, 0);  // a move of the epoch passes its rows over
    count(head.absent, !writer.enter(moved(row, start - head.epoch)));
    head.ring = ring;
  }
  for (int64_t i = 0; i < head.ring; ++i) table.ring_row(i) = moved(table.ring_row(i), start - head.epoch);
}

/// Adds the table and the ring of another state, at the later epoch.
void merge_rows(StateWriter& writer, const StateTable& from) noexcept {
  StateHead& head = writer.head();
  const int64_t epoch = from.head->epoch, h = head.half_life;
  if (!head.begun) head.epoch = epoch;
  head.begun = 1;
  if (epoch > head.epoch) writer.move_epoch(epoch - head.epoch);
  int64_t halvings = h ? (head.epoch - epoch) / h : 0, votes = head.votes;
  for (int64_t i = 0; i < from.head->leaves; ++i) votes += shifted(from.votes[i], halvings);
  if (h && votes > kMostTableVotes) {
    writer.move_epoch(h);
    ++halvings;
  }
  merge_leaves(writer, from, halvings);
  merge_rings(writer, from);
}

}  // namespace

size_t UserState::workspace() const noexcept {
  const StateHead& head = head_of(*this);
  Arena arena;
  arena.take<float>(head.width);
  arena.take<float>(head.value_width);
  return arena.used();
}

Status UserState::append(const Context& context, const Codebook& book, const StateItems& items,
                         const StateEvents& events) noexcept {
  HISAC_TRY(check_items("append", context, book, items, events.ids, *this));
  HISAC_TRY(check_events("append", events));
  const int64_t n = events.ids.size;
  HISAC_TRY(check_room("append", StateTable(*this), n));
  return write("append", context, book, items, *this, [&](StateWriter& writer) {
    StateHead& head = writer.head();
    const int64_t before = head.seen;
    for (int64_t i = 0; i < n; ++i) {
      if (i + kAhead < n && !head.ring_room) writer.prefetch(events.ids[i + kAhead]);
      if (events.positions) {
        if (events.positions.data[i] <= head.position) continue;
        head.position = events.positions.data[i];
      }
      writer.append(events.ids[i], weight_of(events, i), time_of(events, i));
    }
    head.revision += head.seen > before;
    return Status();
  });
}

Status UserState::expire(const Context& context, const Codebook& book, const StateItems& items, int64_t now,
                         int64_t age, int64_t least) noexcept {
  HISAC_TRY(check_items("expire", context, book, items, {}, *this));
  HISAC_TRY(check_room("expire", StateTable(*this), age < 0 ? 0 : ring()));
  return write("expire", context, book, items, *this, [&](StateWriter& writer) {
    StateHead& head = writer.head();
    if (!head.begun) return Status();
    const int64_t at = now == kEpoch ? head.epoch : head.epoch + near_epoch(limited(now) - head.epoch);
    while (age >= 0 && head.ring && head.epoch + writer.table().ring_row(0).time < at - std::min(age, kMostTime))
      writer.leave(head.ring - 1);
    const int64_t halvings = head.half_life ? std::max<int64_t>(floor_div(at - head.epoch, head.half_life), 0) : 0;
    for (int64_t i = head.leaves; i-- > 0;)
      if (shifted(writer.table().votes[i], halvings) < least) writer.drop(i);
    ++head.revision;
    return Status();
  });
}

Status UserState::forget(const Context& context, const Codebook& book, const StateItems& items, const Ids& ids,
                         const StateKept& kept) noexcept {
  HISAC_TRY(check_items("forget", context, book, items, ids, *this));
  if (migrated() && !kept.whole) return invalid("forget: whole expected, since the state has been migrated, got false");
  if (kept.whole && !kept.rows)
    return invalid("forget: kept expected, rows, of which the whole table is made again, got none");
  if (kept.rows) HISAC_TRY(check_items("forget", context, book, items, kept.rows->ids, *this));
  if (kept.rows) HISAC_TRY(check_events("forget", *kept.rows));
  return write("forget", context, book, items, *this, [&](StateWriter& writer) {
    StateHead& head = writer.head();
    const auto find = [&](int64_t i, uint64_t* key, int64_t* at) {
      if (!writer.leaf_of(ids[i], key)) return false;
      *at = writer.find(*key);
      return writer.has(*at, *key);
    };
    uint64_t key;
    int64_t at;
    for (int64_t i = 0; i < ids.size && !kept.rows && !kept.of_leaf; ++i)
      if (find(i, &key, &at))
        return invalid("forget: kept expected, rows or a function, since the table has their leaves, got none");
    ++head.revision;
    for (int64_t left = head.ring; left > 0; --left) {
      const RingRow row = writer.table().pop();
      if (!among(ids, row.id)) writer.table().push(row);
    }
    if (kept.whole) {
      head.votes = head.leaves = head.migrated = 0;
      enter_again(writer, *kept.rows, ids, nullptr);
      return Status();
    }
    for (int64_t i = 0; i < ids.size; ++i) {
      if (!find(i, &key, &at)) continue;
      StateEvents rows;
      if (kept.rows) {
        rows = *kept.rows;
      } else {
        HISAC_TRY(kept.of_leaf(kept.ctx, writer.loader().codes_of(ids[i]), &rows));
        HISAC_TRY(check_items("forget", context, book, items, rows.ids, *this));
        HISAC_TRY(check_events("forget", rows));
      }
      writer.remove(at);
      enter_again(writer, rows, ids, &key);
    }
    return Status();
  });
}

Status UserState::merge(const Context& context, const Codebook& book, const StateItems& items,
                        const UserState& other) noexcept {
  HISAC_TRY(check_state("merge", nullptr, book, other));
  HISAC_TRY(check_items("merge", context, book, items, {}, *this));
  HISAC_TRY(check_writable("merge", other));
  if (other.data() == data()) return invalid("merge: another state expected, got the same");
  const StateTable from(other);
  const StateParams mine = params(), theirs = other.params();
  if (mine.model_tag != theirs.model_tag)
    return invalid("merge: model_tag expected %" PRIu64 ", got %" PRIu64, mine.model_tag, theirs.model_tag);
  if (options() != other.options())
    return invalid("merge: options expected %016" PRIx64 ", got %016" PRIx64, options(), other.options());
  if (mine.width != theirs.width)
    return invalid("merge: width expected %" PRId64 ", got %" PRId64, mine.width, theirs.width);
  if (!from.head->begun && !from.head->seen) return {};
  HISAC_TRY(check_room("merge", StateTable(*this), from.head->leaves + ring() + other.ring()));
  return write("merge", context, book, items, *this, [&](StateWriter& writer) {
    StateHead& head = writer.head();
    if (from.head->begun) merge_rows(writer, from);
    head.migrated |= from.head->migrated;
    head.position = std::max(head.position, from.head->position);
    count(head.seen, from.head->seen);
    count(head.absent, from.head->absent);
    count(head.dropped_leaves, from.head->dropped_leaves);
    count(head.dropped_votes, from.head->dropped_votes);
    ++head.revision;
    return Status();
  });
}

}  // namespace hisac
