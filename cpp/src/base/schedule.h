// SPDX-License-Identifier: Apache-2.0
// Divides a batch of histories into work. A chunk is an aligned power of two of tiles. That is a subtree of the
// reduction tree, so several workers can share a long history without changing the tree.
#pragma once
#include <algorithm>
#include <numeric>
#include <utility>

#include "base/arena.h"
#include "base/parallel.h"
#include "base/reduction_tree.h"
#include "hisac/array.h"

namespace hisac {

/// One piece of work: tiles [first, last) of a user. Where several units share the user, `slot` is where its state
/// goes; else it is -1.
struct Unit {
  int64_t user, first, last, slot;

  /// Its behaviours [first, second).
  std::pair<int64_t, int64_t> rows(const Spans& h) const noexcept {
    const int64_t start = h.start(user);
    return {start + first * kTile, std::min(start + last * kTile, h.end(user))};
  }
};

/// The units of a list of users. Long histories are divided where there are several workers.
class Units {
 public:
  /// Most slots that `workers` can need: a shared user has more than one chunk, each chunk at least
  /// tiles / (4 workers) tiles.
  static int64_t most_slots(int workers) noexcept { return workers > 1 ? 8 * workers : 0; }

  void carve(Arena& arena, int64_t users) noexcept { arena.take_into(users + 1, unit_, slot_); }

  /// Plans the units of n users: those in order, or null for 0 .. n - 1.
  void plan(const Spans& h, const int64_t* order, int64_t n, int workers) noexcept {
    h_ = &h;
    order_ = order;
    n_ = n;
    int64_t total = 0;
    for (int64_t i = 0; i < n; ++i) total += tiles(i);
    chunk_ = 1;
    while (chunk_ < (workers > 1 ? (total + 4 * workers - 1) / (4 * workers) : total)) chunk_ *= 2;
    unit_[0] = slot_[0] = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t chunks = std::max<int64_t>(1, (tiles(i) + chunk_ - 1) / chunk_);
      unit_[i + 1] = unit_[i] + chunks;
      slot_[i + 1] = slot_[i] + (chunks > 1 ? chunks : 0);
    }
  }

  /// Calls work(unit, worker) for all units.
  template <class Work>
  void run(const Context& context, Work work) const {
    parallel_for(context, unit_[n_], [&](int64_t begin, int64_t end, int w) {
      for (int64_t u = begin; u < end; ++u) work(unit(u), w);
    });
  }

  /// The same, then merge(user, states, shared, worker) for each user whom several units
  /// share, with the states that they left in their slots.
  template <class State, class Work, class Merge>
  void run(const Context& context, State* slots, Work work, Merge merge) const {
    run(context, work);
    if (slot_[n_] == 0) return;  // no user is shared: the workers are not woken again
    parallel_each(context, n_, [&](int64_t i, int w) {
      if (const int64_t shared = slot_[i + 1] - slot_[i]; shared > 0) merge(user(i), slots + slot_[i], shared, w);
    });
  }

 private:
  int64_t user(int64_t i) const noexcept { return order_ ? order_[i] : i; }

  Unit unit(int64_t u) const noexcept {
    const int64_t i = std::upper_bound(unit_, unit_ + n_ + 1, u) - unit_ - 1, chunk = u - unit_[i];
    const bool shared = slot_[i + 1] > slot_[i];
    return {user(i), chunk * chunk_, std::min((chunk + 1) * chunk_, tiles(i)), shared ? slot_[i] + chunk : -1};
  }

  int64_t tiles(int64_t i) const noexcept { return tiles_of(h_->end(user(i)) - h_->start(user(i))); }

  const Spans* h_ = nullptr;
  const int64_t* order_ = nullptr;
  int64_t n_ = 0, chunk_ = 1;
  int64_t *unit_ = nullptr, *slot_ = nullptr;
};

/// Groups users into waves. Histories of one wave do not overlap, so its users may add to rows without a race. Waves
/// run one after another in a fixed order, so sums have the same bits every time. A ragged batch is a single wave.
class Waves {
 public:
  void carve(Arena& arena, int64_t users) noexcept {
    arena.take_into(users, order_, wave_, heap_, gap_);
    begin_ = arena.take<int64_t>(users + 2);
  }

  /// Interval colouring in the order of starts: a user joins the wave that ends first if that is in time, else a new
  /// one.
  void plan(const Spans& h) noexcept {
    std::iota(order_, order_ + h.users, int64_t{0});
    std::sort(order_, order_ + h.users,
              [&](int64_t a, int64_t b) { return h.start(a) != h.start(b) ? h.start(a) < h.start(b) : a < b; });
    count_ = 0;
    int64_t reach = 0, gap = 0;  // the end of the histories so far; the behaviours before it that are in none
    for (int64_t i = 0; i < h.users; ++i) {
      const int64_t b = order_[i];
      gap_[b] = gap += std::max<int64_t>(h.start(b) - reach, 0);
      reach = std::max(reach, h.end(b));
      const bool joins = count_ > 0 && heap_[0].end <= h.start(b);
      if (joins) std::pop_heap(heap_, heap_ + count_);
      wave_[b] = joins ? heap_[count_ - 1].wave : count_++;
      heap_[count_ - 1] = {h.end(b), wave_[b]};
      std::push_heap(heap_, heap_ + count_);
    }
    behaviours_ = reach - gap;
    std::fill(begin_, begin_ + count_ + 2, int64_t{0});
    for (int64_t b = 0; b < h.users; ++b) ++begin_[wave_[b] + 2];
    for (int64_t w = 0; w < count_; ++w) begin_[w + 2] += begin_[w + 1];
    for (int64_t b = 0; b < h.users; ++b) order_[begin_[wave_[b] + 1]++] = b;  // leaves each wave's begin in begin_
  }

  int64_t count() const noexcept { return count_; }
  const int64_t* users(int64_t wave) const noexcept { return order_ + begin_[wave]; }
  int64_t size(int64_t wave) const noexcept { return begin_[wave + 1] - begin_[wave]; }

  /// How many behaviours are in some history, and how many before a user's start are in none. So i - gap(b) numbers
  /// those in some history without gaps, i being one of user b's.
  int64_t behaviours() const noexcept { return behaviours_; }
  int64_t gap(int64_t user) const noexcept { return gap_[user]; }

 private:
  struct WaveEnd {
    int64_t end, wave;
    bool operator<(const WaveEnd& o) const noexcept { return end != o.end ? end > o.end : wave > o.wave; }
  };

  int64_t count_ = 0, behaviours_ = 0;
  int64_t *order_ = nullptr, *wave_ = nullptr, *begin_ = nullptr, *gap_ = nullptr;
  WaveEnd* heap_ = nullptr;
};

}  // namespace hisac
