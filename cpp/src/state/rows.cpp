// SPDX-License-Identifier: Apache-2.0
// What changes the rows of a state: append, expire, forget, merge, migrate.
#include <cmath>
#include <cstring>

#include "base/arena.h"
#include "codebook/body.h"
#include "cpu/histories.h"
#include "hisac/encode.h"
#include "state/table.h"
#include "verbs/histories.h"

namespace hisac {
namespace {

constexpr int kUnitBits = 12;  // with a half-life a vote is 2^-12 of a behaviour of weight 1 at the epoch
constexpr int64_t kMostTime = int64_t{1} << 53, kFar = 20;
constexpr float kMostWeight = 0x1p40f;
constexpr int64_t kAhead = 4;  // how many rows before its use an item is prefetched

/// 2^f on [0, 1), by Horner's rule in float64: as the definition has it, to the bit.
double power(double f) noexcept {
  constexpr double kPower[] = {1.3691488853904128e-12, 2.5678435993488206e-11,
                               4.4455382718708116e-10, 7.054911620801123e-09,
                               1.01780860092397e-07,   1.321548679014431e-06,
                               1.5252733804059841e-05, 0.0001540353039338161,
                               0.0013333558146428443,  0.009618129107628477,
                               0.05550410866482158,    0.24022650695910072,
                               0.6931471805599453,     1.0};
  double total = 0;
  for (const double c : kPower) total = total * f + c;
  return total;
}

int64_t floor_div(int64_t a, int64_t b) noexcept { return a / b - (a % b < 0); }

int64_t limited(int64_t time) noexcept { return std::clamp(time, -kMostTime, kMostTime); }

int32_t near_epoch(int64_t since) noexcept {
  return static_cast<int32_t>(std::clamp<int64_t>(since, INT32_MIN, INT32_MAX));
}

int64_t shifted(int64_t votes, int64_t halvings) noexcept { return votes >> std::min<int64_t>(halvings, 63); }

/// 0 below the least mass.
float mass_of(double mass) noexcept { return mass < 0x1p-100 ? 0.f : static_cast<float>(mass); }

float halved(float mass, int64_t halvings) noexcept {
  return mass_of(std::ldexp(double(mass), -static_cast<int>(std::min<int64_t>(halvings, 400))));
}

/// What a row adds to its leaf; x and v may be scratch.
struct Leaf {
  uint64_t key;
  int64_t votes;
  float mass, spread;
  float *x, *v;
};

/// The tables as histories, one behaviour a row; x only where the state has mean x.
Histories histories_of(const StateItems& items, const StateHead& head) noexcept {
  Histories in;
  in.v = items.v;
  in.codes = items.codes;
  if (!head.mean_x) return in;
  in.x = items.x;
  in.x_scale = items.x_scale;
  return in;
}

/// Writes to a state's table and ring.
class Writer {
 public:
  Writer(const Codebook& book, const StateItems& items, const UserState& state) noexcept
      : book_(book), table_(state), in_(histories_of(items, *table_.head)) {}

  void carve(Arena& arena) noexcept {
    x_ = arena.take<float>(head_.width);
    v_ = arena.take<float>(head_.value_width);
  }

  // ---- time

  /// The time against the epoch, after that has been set or moved for it.
  int32_t advance(int64_t time) noexcept {
    const int64_t h = head_.half_life;
    time = limited(time);
    if (!head_.begun) {
      head_.epoch = h ? floor_div(time, h) * h : time;
      head_.begun = 1;
    }
    if (h && floor_div(time - head_.epoch, h) >= kFar) move_epoch(floor_div(time - head_.epoch, h));
    return near_epoch(time - head_.epoch);
  }

  void move_epoch(int64_t halvings) noexcept {
    const int64_t by = halvings * head_.half_life;
    head_.epoch += by;
    head_.votes = 0;
    for (int64_t i = 0; i < head_.leaves; ++i) {
      head_.votes += table_.votes[i] = shifted(table_.votes[i], halvings);
      const float left = halved(table_.masses[i], halvings);
      if (table_.masses[i] > 0 && !(left > 0)) clear(i);
      table_.masses[i] = left;
    }
    for (int64_t i = 0; i < head_.ring; ++i) {
      RingRow& row = table_.ring_row(i);
      row.time = near_epoch(row.time - by);
    }
  }

  // ---- leaves

  /// Where a leaf is, or would be.
  int64_t find(uint64_t key) const noexcept {
    int64_t at = 0;
    for (int64_t n = head_.leaves; n > 0;) {
      const int64_t half = (n + 1) / 2;
      at = table_.keys[at + half - 1] < key ? at + half : at;
      n = n - half;
    }
    return at;
  }
  bool has(int64_t at, uint64_t key) const noexcept { return at < head_.leaves && table_.keys[at] == key; }

  /// Calls move(array) for each array that is sorted by leaf.
  template <class Move>
  void each_sorted(Move move) noexcept {
    move(table_.keys);
    move(table_.votes);
    move(table_.masses);
    if (table_.spreads) move(table_.spreads);
    move(table_.slots);
  }

  void insert(int64_t at, uint64_t key) noexcept {
    const int64_t n = head_.leaves++;
    each_sorted([=](auto* a) { std::memmove(a + at + 1, a + at, static_cast<size_t>(n - at) * sizeof *a); });
    table_.keys[at] = key;
    table_.votes[at] = 0;
    table_.masses[at] = 0;
    table_.slots[at] = static_cast<int32_t>(n);
    clear(at);
  }

  /// Zeros for the means of a leaf.
  void clear(int64_t at) noexcept {
    std::fill_n(table_.v_row(table_.slots[at]), head_.value_width, 0.f);
    if (!table_.x) return;
    std::fill_n(table_.x_row(table_.slots[at]), head_.width, 0.f);
    table_.spreads[at] = 0;
  }

  /// Takes a leaf out; the last row goes to its row.
  void remove(int64_t at) noexcept {
    const int32_t slot = table_.slots[at];
    const int64_t last = --head_.leaves;
    head_.votes -= table_.votes[at];
    each_sorted([=](auto* a) { std::memmove(a + at, a + at + 1, static_cast<size_t>(last - at) * sizeof *a); });
    if (slot == last) return;
    std::copy_n(table_.v_row(last), head_.value_width, table_.v_row(slot));
    if (table_.x) std::copy_n(table_.x_row(last), head_.width, table_.x_row(slot));
    *std::find(table_.slots, table_.slots + last, static_cast<int32_t>(last)) = slot;
  }

  void drop(int64_t at) noexcept {
    ++head_.dropped_leaves;
    head_.dropped_votes += table_.votes[at];
    remove(at);
  }

  /// The leaf with fewest votes, the last of equals.
  int64_t fewest() const noexcept {
    int64_t found = 0;
    for (int64_t i = 1; i < head_.leaves; ++i)
      if (table_.votes[i] <= table_.votes[found]) found = i;
    return found;
  }

  /// Adds to a leaf that is there. x is overwritten.
  void add(int64_t at, const Leaf& leaf) noexcept {
    table_.votes[at] += leaf.votes;
    head_.votes += leaf.votes;
    if (!(leaf.mass > 0)) return;
    const float before = table_.masses[at], after = before + leaf.mass;
    const float old_share = before / after, share = leaf.mass / after;
    const int64_t slot = table_.slot(at);
    table_.masses[at] = after;
    if (before > 0)
      k_.blend_row(head_.value_width, old_share, leaf.v, share, table_.v_row(slot));
    else
      std::copy_n(leaf.v, head_.value_width, table_.v_row(slot));
    if (!table_.x) return;
    float& spread = table_.spreads[at];
    if (before > 0) {
      const float far = k_.subtract_row(head_.width, table_.x_row(slot), leaf.x);
      k_.add_row(head_.width, leaf.x, share, table_.x_row(slot));
      spread = old_share * (spread + share * far) + share * leaf.spread;
    } else {
      std::copy_n(leaf.x, head_.width, table_.x_row(slot));
      spread = leaf.spread;
    }
  }

  /// Adds to a leaf, which is made where it is not there. Of a full table the one with fewest votes makes place.
  void add_leaf(const Leaf& leaf) noexcept {
    int64_t at = find(leaf.key);
    if (!has(at, leaf.key)) {
      if (head_.leaves == head_.most) {
        drop(fewest());
        at = find(leaf.key);
      }
      insert(at, leaf.key);
    }
    add(at, leaf);
  }

  // ---- rows

  void prefetch(int64_t id) const noexcept {
    if (loader_.x_source.has(id)) loader_.prefetch(id);
  }

  /// The number of an item's leaf; false where it has none.
  bool leaf_of(int64_t id, uint64_t* key) const noexcept {
    if (!loader_.x_source.has(id)) return false;
    const int32_t* const codes = loader_.codes_of(id);
    if (!book_.valid(codes)) return false;
    *key = book_.leaf(codes);
    return true;
  }

  /// A row into the table; false where it is absent.
  bool enter(const RingRow& row) noexcept {
    Leaf leaf{0, 0, 0, 0, x_, v_};
    if (!(row.weight > 0 && row.weight <= FLT_MAX) || !leaf_of(row.id, &leaf.key)) return false;
    float norm;
    const bool routed = loader_.v_source.has(row.id) && loader_.load_x_unchecked(row.id, x_, &norm);
    const double weight = double(std::min(row.weight, kMostWeight));
    double mass = weight;
    if (head_.half_life) {
      int64_t time = row.time;
      const auto votes = [&] {
        const int64_t whole = floor_div(time, head_.half_life);
        const double part = static_cast<double>(time - whole * head_.half_life);
        mass = std::ldexp(weight * power(part / static_cast<double>(head_.half_life)),
                          static_cast<int>(std::clamp<int64_t>(whole, -4096, 4096)));
        return rounded(std::ldexp(mass, kUnitBits));
      };
      leaf.votes = votes();
      while (head_.votes + leaf.votes > kMostTableVotes) {
        move_epoch(1);
        time -= head_.half_life;
        leaf.votes = votes();
      }
    } else {
      leaf.votes = std::min(rounded(weight), kMostTableVotes - head_.votes);
    }
    leaf.mass = routed ? mass_of(mass) : 0.f;
    if (!leaf.votes && !(leaf.mass > 0)) return true;
    if (leaf.mass > 0) loader_.v_source.load(row.id, v_);
    add_leaf(leaf);
    return true;
  }

  /// Rows leave the ring for the table until so many are left.
  void leave(int64_t most) noexcept {
    while (head_.ring > most) head_.absent += !enter(table_.pop());
  }

  void append(int64_t id, float weight, int64_t time) noexcept {
    advance(time);
    ++head_.seen;
    if (head_.ring_room) {
      leave(head_.ring_room - 1);  // which may move the epoch
      table_.push({id, weight, near_epoch(limited(time) - head_.epoch)});
    } else {
      head_.absent += !enter({id, weight, near_epoch(limited(time) - head_.epoch)});
    }
  }

  const StateTable& table() const noexcept { return table_; }
  StateHead& head() noexcept { return head_; }
  float* x() const noexcept { return x_; }
  const cpu::RowLoader& loader() const noexcept { return loader_; }

 private:
  static int64_t rounded(double votes) noexcept {
    return votes < double(kMostTableVotes) ? static_cast<int64_t>(std::rint(votes)) : kMostTableVotes;
  }

  const Codebook& book_;
  const simd::Kernels& k_ = simd::kernels();
  const StateTable table_;
  StateHead& head_ = *table_.head;
  const Histories in_;
  const cpu::RowLoader loader_{&book_, in_, head_.width};
  float *x_ = nullptr, *v_ = nullptr;
};

Status check_items(const char* verb, const Context& context, const Codebook& book, const StateItems& items,
                   const Ids& ids, const UserState& state) noexcept {
  HISAC_TRY(check_state(verb, &context, book, state));
  HISAC_TRY(check_writable(verb, state));
  const StateHead& head = *StateTable(state).head;
  if (items.model_tag != head.model_tag)
    return invalid("%s: model_tag expected %" PRIu64 ", got %" PRIu64, verb, head.model_tag, items.model_tag);
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

Status check_events(const char* verb, const StateItems& items, const StateEvents& events) noexcept {
  const int64_t n = events.size(items);
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
  Writer writer(book, items, state);
  writer.carve(arena);
  HISAC_TRY(arena.check(verb));
  return change(writer);
}

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

float weight_of(const StateEvents& events, int64_t i) noexcept { return events.weights ? events.weights.data[i] : 1.f; }
int64_t time_of(const StateEvents& events, int64_t i) noexcept { return events.times ? events.times.data[i] : 0; }
int64_t id_of(const StateEvents& events, int64_t i) noexcept { return events.ids ? events.ids[i] : i; }

}  // namespace

size_t UserState::workspace() const noexcept {
  const StateHead& head = *StateTable(*this).head;
  Arena arena;
  arena.take<float>(head.width);
  arena.take<float>(head.value_width);
  return arena.used();
}

Status UserState::append(const Context& context, const Codebook& book, const StateItems& items,
                         const StateEvents& events) noexcept {
  HISAC_TRY(check_items("append", context, book, items, events.ids, *this));
  HISAC_TRY(check_events("append", items, events));
  const int64_t n = events.size(items);
  const StateTable table(*this);
  if (!events.ids && table.head->ring_room) return invalid("append: ids expected for a state with a ring, got none");
  HISAC_TRY(check_room("append", table, n));
  return write("append", context, book, items, *this, [&](Writer& writer) {
    StateHead& head = writer.head();
    const int64_t before = head.seen;
    for (int64_t i = 0; i < n; ++i) {
      if (i + kAhead < n && !head.ring_room) writer.prefetch(id_of(events, i + kAhead));
      if (events.positions) {
        if (events.positions.data[i] <= head.position) continue;
        head.position = events.positions.data[i];
      }
      writer.append(id_of(events, i), weight_of(events, i), time_of(events, i));
    }
    head.revision += head.seen > before;
    return Status();
  });
}

Status UserState::expire(const Context& context, const Codebook& book, const StateItems& items, int64_t now,
                         int64_t age, int64_t least) noexcept {
  HISAC_TRY(check_items("expire", context, book, items, {}, *this));
  HISAC_TRY(check_room("expire", StateTable(*this), age < 0 ? 0 : ring()));
  return write("expire", context, book, items, *this, [&](Writer& writer) {
    StateHead& head = writer.head();
    if (!head.begun) return Status();
    const int64_t at = head.epoch + near_epoch(limited(now) - head.epoch);
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
  if (kept.rows) HISAC_TRY(check_items("forget", context, book, items, kept.rows->ids, *this));
  if (kept.rows) HISAC_TRY(check_events("forget", items, *kept.rows));
  return write("forget", context, book, items, *this, [&](Writer& writer) {
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
    for (int64_t left = head.ring; left > 0; --left) {
      const RingRow row = writer.table().pop();
      bool gone = false;
      for (int64_t i = 0; i < ids.size; ++i) gone = gone || ids[i] == row.id;
      if (!gone) writer.table().push(row);
    }
    for (int64_t i = 0; i < ids.size; ++i) {
      if (!find(i, &key, &at)) continue;
      StateEvents rows;
      if (kept.rows) {
        rows = *kept.rows;
      } else {
        HISAC_TRY(kept.of_leaf(kept.ctx, writer.loader().codes_of(ids[i]), &rows));
        HISAC_TRY(check_items("forget", context, book, items, rows.ids, *this));
        HISAC_TRY(check_events("forget", items, rows));
      }
      writer.remove(at);
      for (int64_t r = 0; r < rows.size(items); ++r) {
        uint64_t own;
        if (!writer.leaf_of(id_of(rows, r), &own) || own != key) continue;
        const int32_t time = writer.advance(time_of(rows, r));
        writer.enter({id_of(rows, r), weight_of(rows, r), time});
      }
    }
    ++head.revision;
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
  if (!from.head->begun) return {};
  HISAC_TRY(check_room("merge", StateTable(*this), from.head->leaves + ring() + other.ring()));
  return write("merge", context, book, items, *this, [&](Writer& writer) {
    StateHead& head = writer.head();
    const StateTable& table = writer.table();
    if (!head.begun) head.epoch = from.head->epoch;
    head.begun = 1;
    const int64_t epoch = from.head->epoch, h = head.half_life;
    if (h && epoch > head.epoch) writer.move_epoch((epoch - head.epoch) / h);
    int64_t halvings = h ? (head.epoch - epoch) / h : 0, votes = 0;
    for (int64_t i = 0; i < from.head->leaves; ++i) votes += shifted(from.votes[i], halvings);
    if (h && head.votes + votes > kMostTableVotes) {
      writer.move_epoch(1);
      ++halvings;
    }
    for (const bool there : {true, false})
      for (int64_t i = 0; i < from.head->leaves; ++i) {
        const int64_t at = writer.find(from.keys[i]), slot = from.slot(i);
        const bool found = writer.has(at, from.keys[i]);
        if (there != found) continue;
        const Leaf leaf{from.keys[i],
                        std::min(shifted(from.votes[i], halvings), kMostTableVotes - head.votes),
                        halved(from.masses[i], halvings),
                        from.spreads ? from.spreads[i] : 0.f,
                        writer.x(),
                        from.v_row(slot)};
        if (from.x) std::copy_n(from.x_row(slot), head.width, leaf.x);
        if (found) {
          writer.add(at, leaf);
          continue;
        }
        const int64_t fewest = head.leaves == head.most ? writer.fewest() : -1;
        if (fewest >= 0 && (leaf.votes < table.votes[fewest] ||
                            (leaf.votes == table.votes[fewest] && leaf.key > table.keys[fewest]))) {
          ++head.dropped_leaves;
          head.dropped_votes += leaf.votes;
        } else {
          writer.add_leaf(leaf);
        }
      }
    int64_t left = head.ring, taken = 0;
    const auto theirs_at = [&](int64_t i) {
      RingRow row = from.ring_row(i);
      row.time = near_epoch(row.time + epoch - head.epoch);
      return row;
    };
    const int64_t more = head.ring + from.head->ring - head.ring_room;  // too many, which are the first to leave
    for (int64_t n = 0; left > 0 || taken < from.head->ring; ++n) {
      RingRow row;
      const bool from_them = taken < from.head->ring && (left == 0 || theirs_at(taken).time < table.ring_row(0).time);
      if (from_them) {
        row = theirs_at(taken++);
      } else {
        row = table.pop();
        --left;
      }
      if (n < more)
        head.absent += !writer.enter(row);
      else
        table.push(row);
    }
    head.position = std::max(head.position, from.head->position);
    head.seen += from.head->seen;
    head.absent += from.head->absent;
    head.dropped_leaves += from.head->dropped_leaves;
    head.dropped_votes += from.head->dropped_votes;
    ++head.revision;
    return Status();
  });
}

size_t UserState::migrate_workspace(const Context& context, const Codebook& to) const noexcept {
  if (to.empty()) return 0;
  Migration migration(*StateTable(*this).head, to);
  return workspace_of(migration) + encode_workspace(context, to);
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
  Arena arena(context.workspace);
  Migration scratch(head, to);
  scratch.carve(arena);
  Context encoding = context;
  int64_t rest;
  std::byte* const left = arena.take_rest(static_cast<int64_t>(encode_workspace(context, to)), &rest);
  encoding.workspace = {left, {rest}};
  HISAC_TRY(arena.check("migrate"));
  UserState made;
  HISAC_TRY(create(to, params(), memory, &made));
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
  Writer writer(to, {}, made);
  StateHead& target = writer.head();
  target.begun = head.begun;
  target.epoch = head.epoch;
  target.position = head.position;
  target.revision = head.revision + 1;
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
