// SPDX-License-Identifier: Apache-2.0
// One user's votes by one block, in three steps:
//
//   count     rows -> the leaves that have votes: number, before and mark [leaves]
//   level l   nodes and marks -> children, the seats of each; the children with seats are the nodes of level l + 1
//   write     children of the last level -> agent_keys, sorted -> results
//
//   shared memory  sums [M], and for up to 256 nodes these and their searches; one area that holds first the bitmap of
//                  the leaves or the sort's counters, in the end agent_keys; for a small user before and mark.
//   slice          of the workspace: number, children, and whatever of these does not fit in shared memory; the keys to
//                  be sorted [rows].
//
// Leaves that have votes get places 0 .. n in the order of their numbers, so that a node of the tree is a run of
// places; before[i] are the votes of the places before i, so that a run's votes are a difference; mark[i] is the level
// at which leaf i leaves the path of leaf i - 1, so that the children of a node at a level are the runs between marks.
//   bitmap  trees of at most 2^18 leaves: a bitmap of the leaves and its prefix sums give a row its place, where it is
//           counted. The rows are read twice.
//   sorted  all others: leaf numbers, radix-sorted.
// Then from the root down, all nodes of a level at once, as cpu/seats.h does it. All rules, and leaves as well as
// inner nodes, are one choice: the largest of the keys (n << shift) / j, j = 1 .. cap, then larger n, then lower
// codes; but by budget above the leaves the cap is 1, and the key n does. A search by halves finds the least key of the
// seats; where several children have it, a second one, by n, decides among them, then a count in the order of codes. By
// beam the children of a level are chosen from as if they were of one node.
#pragma once
#include "cuda/vote_task.h"

namespace hisac::cuda {

template <class Sum, bool kWeighted, bool kBitmap>  // 32-bit sums: those, prefix sums and marks in shared memory
class UserVote {
  static constexpr bool kShared = sizeof(Sum) == 4;
  using Votes = VoteSum<kWeighted>;
  using Number = std::conditional_t<kBitmap, uint32_t, uint64_t>;
  using Prefix = std::conditional_t<kShared, uint16_t, uint32_t>;

 public:
  SIMT_DEVICE UserVote(const VoteTask& task, const Slice& slice, int64_t user, int user_rows)
      : t(task), s(slice), b(user), rows(user_rows), number(static_cast<Number*>(slice.number)) {}

  SIMT_DEVICE void run() {
    if (kWeighted) find_scale(t, b, rows);
    if constexpr (kBitmap)
      n = count_by_bitmap();
    else
      n = count_sorted();
    nodes = n > 0;
    if (simt::thread() == 0) node()[0] = {0, static_cast<uint32_t>(n), seats_of(0, static_cast<uint32_t>(n)), 0};
    simt::sync();
    for (int level = 0; level < t.levels && !by_warps(level); ++level) {
      list_children(level);
      if (t.beam) unite(level);
      choose(t.budget && level + 1 < t.levels);
      if (level + 1 < t.levels) descend(level + 1);
    }
    write();
  }

 private:
  // recomputed where they are used: kept, they would take a third of the registers
  SIMT_DEVICE uint32_t* bits() const { return shared<uint32_t>(t.offset.area); }
  SIMT_DEVICE Prefix* prefix() const { return shared<Prefix>(t.offset.prefix); }
  SIMT_DEVICE Sum* before() const { return kShared ? shared<Sum>(t.offset.before) : static_cast<Sum*>(s.before); }
  SIMT_DEVICE uint16_t* mark() const { return kShared ? shared<uint16_t>(t.offset.mark) : s.mark; }
  SIMT_DEVICE uint32_t* sums() const { return shared<uint32_t>(t.offset.sums); }
  SIMT_DEVICE Node* node() const { return t.nodes > kMostShared ? s.node : shared<Node>(t.offset.nodes); }
  SIMT_DEVICE Search* search() const { return t.nodes > kMostShared ? s.search : shared<Search>(t.offset.searches); }

  template <class F>
  SIMT_DEVICE static void each(int count, F f) {
    for (int i = simt::thread(); i < count; i += simt::threads()) f(i);
  }
  SIMT_DEVICE uint32_t seats_of(int level, uint32_t seats) const {
    const uint32_t most = static_cast<uint32_t>(t.seats);
    return !t.budget ? t.kept[level] : seats < most ? seats : most;
  }

  // ---- counting

  /// use(number of the leaf, votes) for every row.
  template <class Use>
  SIMT_DEVICE void each_leaf(Use use) const {
    each_row<kWeighted, Number>(
        t, b, rows, [&](Number& leaf, int l, uint32_t code) { leaf = leaf * static_cast<Number>(t.size[l]) + code; },
        use);
  }

  SIMT_DEVICE int count_by_bitmap() {
    each(2 * t.pairs, [&](int w) { bits()[w] = 0; });
    SIMT_UNLESS_PLANTED(34, simt::sync());
    each_leaf([&](Number leaf, Votes votes) {
      if (votes) simt::atomic_or(&bits()[leaf >> 5], 1u << (leaf & 31));
    });
    simt::sync();
    const int found = static_cast<int>(scan<uint32_t>(
        t.pairs,
        [&](int p) {
          return static_cast<uint32_t>(simt::count_bits(bits()[2 * p]) + simt::count_bits(bits()[2 * p + 1]));
        },
        [&](int p, uint32_t place, uint32_t) {
          prefix()[p] = static_cast<Prefix>(place);
          for (int w = 2 * p; w < 2 * p + 2; ++w)
            for (uint32_t left = bits()[w]; left; left &= left - 1)
              number[place++] = static_cast<uint32_t>(32 * w + lowest(left));
        }));
    each(found + 1, [&](int i) { before()[i] = 0; });
    each(found, [&](int i) { mark()[i] = static_cast<uint16_t>(t.levels - 1); });
    simt::sync();
    each_leaf([&](Number leaf, Votes votes) {
      if (votes) simt::atomic_add(&before()[place_of(leaf)], static_cast<Sum>(votes));
    });
    for (int l = t.levels - 2; l >= 0; --l) {
      const uint32_t below = static_cast<uint32_t>(t.stride[l]),
                     leaves = static_cast<uint32_t>(t.stride[0]) * t.size[0];
      each(static_cast<int>(leaves / below), [&](int p) {
        const int begin = place_of(static_cast<uint32_t>(p) * below);
        if (begin < place_of(static_cast<uint32_t>(p + 1) * below)) mark()[begin] = static_cast<uint16_t>(l);
      });
      SIMT_UNLESS_PLANTED(35, simt::sync());
    }
    simt::sync();
    scan<Sum>(found + 1, [&](int i) { return before()[i]; }, [&](int i, Sum sum, Sum) { before()[i] = sum; });
    return found;
  }

  /// The leaves with votes whose numbers are lower.
  SIMT_DEVICE int place_of(uint32_t leaf) const {
    const uint32_t w = leaf >> 5;
    int place = static_cast<int>(prefix()[w / 2]) + simt::count_bits(bits()[w] & ((1u << (leaf & 31)) - 1));
    if (w & 1) place += simt::count_bits(bits()[w - 1]);
    return place;
  }

  SIMT_DEVICE int count_sorted() {
    if (simt::thread() == 0) sums()[0] = 0;
    simt::sync();
    each_leaf([&](Number leaf, Votes votes) {
      const uint32_t to = take_place(&sums()[0], votes != 0);
      if (!votes) return;
      s.key[to] = leaf;
      if (kWeighted) s.weight[to] = votes;
    });
    simt::sync();
    const int voters = static_cast<int>(sums()[0]);
    uint64_t *key = s.key, *spare = number;
    uint64_t *weight = s.weight, *spare_weight = s.spare_weight;
    for (int low = 0; low < t.bits; low += kDigit) {
      radix_pass<uint64_t>(
          voters, bits(), [&](int i) { return Keyed<uint64_t>{digit_of(key[i], low), key[i]}; },
          [&](int i, uint64_t value, uint32_t place) {
            spare[place] = value;
            if (kWeighted) spare_weight[place] = weight[i];
          });
      swap(key, spare);
      swap(weight, spare_weight);
    }
    number = spare;
    const uint64_t sum = scan<uint64_t>(
        voters,
        [&](int i) {
          const bool head = i == 0 || key[i] != key[i - 1];
          return uint64_t{head} << kVoteBits | (kWeighted ? weight[i] : 1);
        },
        [&](int i, uint64_t so_far, uint64_t value) {
          if (!(value >> kVoteBits)) return;
          number[so_far >> kVoteBits] = key[i];
          before()[so_far >> kVoteBits] = static_cast<Sum>(so_far & kMostVotes);
        });
    const int found = static_cast<int>(sum >> kVoteBits);
    if (simt::thread() == 0) before()[found] = static_cast<Sum>(sum & kMostVotes);
    each(found, [&](int i) {
      int l = 0;
      while (i > 0 && l + 1 < t.levels && number[i] / t.stride[l] == number[i - 1] / t.stride[l]) ++l;
      mark()[i] = static_cast<uint16_t>(l);
    });
    simt::sync();
    return found;
  }

  // ---- levels

  /// The owner of a place: a node of the level above. mark: owner + 1, and the level.
  SIMT_DEVICE void list_children(int level) {
    children = gather(
        n, [&](int i) { return (level == 0 || mark()[i] > kLevelBits) && (mark()[i] & kLevelBits) <= level; },
        [&](int i, int place) {
          const int owner = level == 0 ? 0 : (mark()[i] >> 3) - 1;
          s.child[place] = {static_cast<uint32_t>(i), 0, 0, static_cast<uint16_t>(owner), 0};
        });
    each(children, [&](int j) {
      Child& c = s.child[j];
      c.end = j + 1 < children && s.child[j + 1].node == c.node ? s.child[j + 1].begin : node()[c.node].end;
      if (j == 0 || s.child[j - 1].node != c.node) node()[c.node].first = static_cast<uint32_t>(j);
    });
  }

  /// By beam the children of all nodes are those of one.
  SIMT_DEVICE void unite(int level) {
    SIMT_UNLESS_PLANTED(64, simt::sync());
    each(children, [&](int j) { s.child[j].node = 0; });
    nodes = nodes > 0;
    if (simt::thread() == 0) node()[0] = {0, static_cast<uint32_t>(n), seats_of(level, 0), 0};
  }

  SIMT_DEVICE Sum votes(uint32_t begin, uint32_t end) const { return before()[end] - before()[begin]; }

  SIMT_DEVICE float scale_of(uint64_t key) const {
    return static_cast<float>(uint64_t{1} << t.shift) / static_cast<float>(key);
  }
  /// How many of the keys (votes << shift) / j, j = 1 .. least(leaves, most), are at least `key`.
  SIMT_DEVICE uint32_t keys_from(const Child& c, uint64_t key, float scale, uint32_t most) const {
    const Sum all = votes(c.begin, c.end);
    const uint32_t leaves = c.end - c.begin, cap = leaves < most ? leaves : most;
    const float estimate = static_cast<float>(all) * scale;  // the quotient, within 2^-21 of itself
    if (estimate >= static_cast<float>(cap + 1)) return cap;
    uint32_t quotient = static_cast<uint32_t>(estimate * (1 - 0x1p-20f));  // exact or one less: cap is at most 4,096
    quotient += (uint64_t{all} << t.shift) - quotient * key >= key;
    return quotient < cap ? quotient : cap;
  }

  /// sums[node] = the sum of count(child, its node's search) over its children; returns after a sync.
  template <class Count>
  SIMT_DEVICE void sum_up(Count count) {
    for (int first = simt::warp() * 32; first < children; first += simt::threads()) {
      const int j = first + simt::lane(), last = first + 31 < children ? first + 31 : children - 1;
      uint32_t reaching = 0;
      if (j < children) {
        const Search& k = search()[s.child[j].node];
        if (k.key) reaching = count(s.child[j], k.key, k.scale);
      }
      if (s.child[first].node == s.child[last].node) {
        for (int m = 16; m; m /= 2) reaching += simt::shuffle_xor(reaching, m);
        if (simt::lane() == 0 && reaching) simt::atomic_add(&sums()[s.child[first].node], reaching);
      } else if (reaching) {
        simt::atomic_add(&sums()[s.child[j].node], reaching);
      }
    }
    simt::sync();
  }

  SIMT_DEVICE void ask(Search& k, uint64_t key) const {
    k.key = key;
    k.scale = key ? scale_of(key) : 0;
  }
  SIMT_DEVICE void begin_search(int i, uint32_t seats, int shift) {
    const uint64_t all = uint64_t{votes(node()[i].begin, node()[i].end)} << shift;
    Search& k = search()[i];
    k.low = 1;
    k.high = seats ? all / seats + 1 : 1;  // fewer than `seats` keys reach it
    k.seats = seats;
    ask(k, k.high > 2 ? k.low + (k.high - k.low) / 2 : 0);
  }
  /// Halves [low, high) of every node until `high` follows the key of the last seat, or gives exactly the seats;
  /// count(child, key, scale): how many of its keys reach `key`. Then sums[node] is what `high` gives.
  template <class Count>
  SIMT_DEVICE void halve(Count count) {
    uint32_t* const open = shared<uint32_t>(256);
    if (simt::thread() < 2) open[simt::thread()] = 0;
    each(nodes, [&](int i) { sums()[i] = 0; });
    simt::sync();
    for (int round = 0;; ++round) {
      sum_up(count);
      if (simt::thread() == 0) open[(round + 1) & 1] = 0;
      each(nodes, [&](int i) {
        Search& k = search()[i];
        if (k.key) {
          if (sums()[i] >= k.seats) k.low = k.key;
          if (sums()[i] <= k.seats) k.high = k.key;
          const bool more = k.high - k.low > 1;
          ask(k, more ? k.low + (k.high - k.low) / 2 : 0);
          if (more) simt::atomic_or(&open[round & 1], 1);
        }
        sums()[i] = 0;
      });
      simt::sync();
      if (!open[round & 1]) break;
    }
    each(nodes, [&](int i) { ask(search()[i], search()[i].high); });
    simt::sync();
    sum_up(count);
  }

  /// The seats of every child, `kTied` off.
  SIMT_DEVICE void choose(bool in_proportion) {
    each(nodes, [&](int k) { begin_search(k, node()[k].seats, in_proportion ? t.shift : 0); });
    if (in_proportion) {
      const auto count = [&](const Child& c, uint64_t key, float scale) {
        return keys_from(c, key, scale, node()[c.node].seats);
      };
      halve(count);
      each(children, [&](int j) {
        Child& c = s.child[j];
        const Search& k = search()[c.node];
        const uint32_t sure = count(c, k.high, k.scale);
        const bool tied = sums()[c.node] < k.seats && count(c, k.low, scale_of(k.low)) > sure;
        c.seats = static_cast<uint16_t>(sure | (tied ? kTied : 0));
      });
      SIMT_UNLESS_PLANTED(32, simt::sync());
      each(nodes, [&](int k) { begin_search(k, node()[k].seats - sums()[k], 0); });
    } else {
      each(children, [&](int j) { s.child[j].seats = kTied; });
    }
    const auto count = [&](const Child& c, uint64_t key, float) {
      return uint32_t{(c.seats & kTied) != 0 && votes(c.begin, c.end) >= key};
    };
    halve(count);
    const auto last = [&](int j) {  // has as many votes as the last seat needs, and no more
      const Child& c = s.child[j];
      const Search& k = search()[c.node];
      return sums()[c.node] < k.seats && count(c, k.low, 0) && !count(c, k.high, 0);
    };
    scan<uint32_t>(children, last, [&](int j, uint32_t place, bool) { s.child[j].order = place; });
    each(children, [&](int j) {
      Child& c = s.child[j];
      const Search& k = search()[c.node];
      const bool has_seat = c.order - s.child[node()[c.node].first].order < k.seats - sums()[c.node];
      const uint32_t more = last(j) ? has_seat : count(c, k.high, 0);
      c.seats = static_cast<uint16_t>((c.seats & (kTied - 1)) + more);
    });
    simt::sync();
  }

  /// The children with seats are the nodes now.
  SIMT_DEVICE void descend(int level) {
    nodes = gather(
        children, [&](int j) { return s.child[j].seats != 0; },
        [&](int j, int place) {
          const Child& c = s.child[j];
          node()[place] = {c.begin, c.end, seats_of(level, c.seats), 0};
        });
    if (by_warps(level)) return;
    each(n, [&](int i) { mark()[i] &= kLevelBits; });
    SIMT_UNLESS_PLANTED(38, simt::sync());
    for (int k = simt::warp(); k < nodes; k += simt::threads() / 32)
      for (uint32_t i = node()[k].begin + static_cast<uint32_t>(simt::lane()); i < node()[k].end; i += 32)
        mark()[i] = static_cast<uint16_t>(mark()[i] | (k + 1) << 3);
    simt::sync();
  }

  /// Leaves of many nodes: each node's by one warp, with no barrier between its steps.
  SIMT_DEVICE bool by_warps(int level) const {
    return !t.beam && level + 1 == t.levels && nodes >= simt::threads() / 32;
  }

  // ---- results

  SIMT_DEVICE void write() {
    uint64_t* const agent_keys = shared<uint64_t>(t.offset.area);
    uint32_t& cursor = sums()[0];
    if (simt::thread() == 0) cursor = 0;
    simt::sync();
    if (by_warps(t.levels - 1)) {
      for (int k = simt::warp(); k < nodes; k += simt::threads() / 32) {
        const Node v = node()[k];
        const auto votes_of = [&](int i) { return votes(static_cast<uint32_t>(i), static_cast<uint32_t>(i) + 1); };
        pick(static_cast<int>(v.begin), static_cast<int>(v.end), v.seats, votes(v.begin, v.end), votes_of,
             [&](int i, bool taken) { append(agent_keys, &cursor, taken, taken ? votes_of(i) : 0, i); });
      }
    } else {
      for (int first = simt::warp() * 32; first < children; first += simt::threads()) {
        const int j = first + simt::lane();
        const bool taken = j < children && s.child[j].seats != 0;
        const Child c = taken ? s.child[j] : Child{};
        append(agent_keys, &cursor, taken, votes(c.begin, c.end), static_cast<int>(c.begin));
      }
    }
    simt::sync();
    write_agents(t, b, agent_keys, static_cast<int>(cursor), [&](int place) { return n ? number[place] : Number{0}; });
  }

  const VoteTask& t;
  const Slice& s;
  int64_t b;
  int rows;
  Number* number;
  int n = 0, nodes = 0, children = 0;
};

}  // namespace hisac::cuda
