// SPDX-License-Identifier: Apache-2.0
// Writes to the table and the ring of a state, row by row and leaf by leaf.
#pragma once
#include <cmath>
#include <cstring>

#include "base/arena.h"
#include "cpu/histories.h"
#include "state/table.h"

namespace hisac {

constexpr int kUnitBits = 12;  // with a half-life a vote is 2^-12 of a behaviour of weight 1 at the epoch
constexpr int64_t kMostTime = int64_t{1} << 53;
constexpr int64_t kNear = int64_t{1} << 30;  // without a half-life: the time after the epoch at which it moves
constexpr int64_t kAhead = 4;                // how many rows before its use an item is prefetched

/// 2^f on [0, 1), by Horner's rule in float64: as the definition has it, to the bit.
inline double power(double f) noexcept {
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

inline int64_t floor_div(int64_t a, int64_t b) noexcept { return a / b - (a % b < 0); }

inline int64_t limited(int64_t time) noexcept { return std::clamp(time, -kMostTime, kMostTime); }

inline int32_t near_epoch(int64_t since) noexcept {
  return static_cast<int32_t>(std::clamp<int64_t>(since, INT32_MIN, INT32_MAX));
}

inline int64_t shifted(int64_t votes, int64_t halvings) noexcept { return votes >> std::min<int64_t>(halvings, 63); }

/// 0 below the least mass.
inline float mass_of(double mass) noexcept { return mass < 0x1p-100 ? 0.f : static_cast<float>(mass); }

inline float halved(float mass, int64_t halvings) noexcept {
  return mass_of(std::ldexp(double(mass), -static_cast<int>(std::min<int64_t>(halvings, 400))));
}

/// What a row adds to its leaf; x and v may be scratch.
struct StateLeaf {
  uint64_t key;
  int64_t votes;
  float mass, spread;
  float *x, *v;
};

/// The tables as histories, one behaviour a row; x only where the state has mean x.
inline Histories histories_of(const StateItems& items, const StateHead& head) noexcept {
  Histories in;
  in.v = items.v;
  in.codes = items.codes;
  if (!head.mean_x) return in;
  in.x = items.x;
  in.x_scale = items.x_scale;
  return in;
}

/// Writes to a state's table and ring.
class StateWriter {
 public:
  StateWriter(const Codebook& book, const StateItems& items, const UserState& state) noexcept
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
    const int64_t since = time - head_.epoch;
    if (h && floor_div(since, h) >= kFar) move_epoch(floor_div(since, h) * h);
    if (!h && since >= kNear) move_epoch(since);
    return near_epoch(time - head_.epoch);
  }

  /// by: whole half-lives, where the state has one.
  void move_epoch(int64_t by) noexcept {
    const int64_t halvings = head_.half_life ? by / head_.half_life : 0;
    head_.epoch = std::min(head_.epoch + by, kMostEpoch);
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
    count(head_.dropped_leaves, 1);
    count(head_.dropped_votes, table_.votes[at]);
    remove(at);
  }

  /// The leaf with fewest votes, the last of equals.
  int64_t fewest() const noexcept {
    int64_t found = 0;
    for (int64_t i = 1; i < head_.leaves; ++i)
      if (table_.votes[i] <= table_.votes[found]) found = i;
    return found;
  }

  /// Whether a new leaf has fewer votes than one that is there, or as many and a higher number.
  bool behind(const StateLeaf& leaf, int64_t at) const noexcept {
    return leaf.votes < table_.votes[at] || (leaf.votes == table_.votes[at] && leaf.key > table_.keys[at]);
  }

  /// Adds to a leaf that is there. x is overwritten.
  void add(int64_t at, const StateLeaf& leaf) noexcept {
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
  void add_leaf(const StateLeaf& leaf) noexcept {
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
    StateLeaf leaf{0, 0, 0, 0, x_, v_};
    if (!usable(row.weight) || !leaf_of(row.id, &leaf.key)) return false;
    float norm;
    bool routed = loader_.v_source.has(row.id) && loader_.load_x_unchecked(row.id, x_, &norm);
    if (routed) {
      loader_.v_source.load(row.id, v_);
      routed = cpu::finite(v_, head_.value_width, INFINITY);
    }
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
        move_epoch(head_.half_life);
        time -= head_.half_life;
        leaf.votes = votes();
      }
    } else {
      leaf.votes = std::min(rounded(weight), kMostTableVotes - head_.votes);
    }
    leaf.mass = routed ? mass_of(mass) : 0.f;
    if (!leaf.votes && !(leaf.mass > 0)) return true;
    add_leaf(leaf);
    return true;
  }

  /// Rows leave the ring for the table until so many are left.
  void leave(int64_t most) noexcept {
    while (head_.ring > most) count(head_.absent, !enter(table_.pop()));
  }

  void append(int64_t id, float weight, int64_t time) noexcept {
    count(head_.seen, 1);
    if (!usable(weight) || id < 0) return count(head_.absent, 1);
    advance(time);
    if (head_.ring_room) {
      leave(head_.ring_room - 1);  // which may move the epoch
      table_.push({id, weight, near_epoch(limited(time) - head_.epoch)});
    } else {
      count(head_.absent, !enter({id, weight, near_epoch(limited(time) - head_.epoch)}));
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

}  // namespace hisac
