// SPDX-License-Identifier: Apache-2.0
// One user's votes by one block.
//
// Leaves that have votes get places 0 .. n in the order of their numbers, so that a node of the tree is a run of
// places; before()[i] are the votes of the places before i, so that a run's votes are a difference; mark()[i] is the
// level at which leaf i leaves the path of leaf i - 1, so that the children of a node at a level are the runs between
// marks.
//   bitmap  trees of few leaves: a bitmap of the leaves and its prefix sums give a row its place, where it is counted
//           (two readings of the rows);
//   sorted  everything else: leaf numbers, radix-sorted.
// Then from the root down, all nodes of a level at once, as ../apportion.h does it. Both rules, and leaves as well as
// inner nodes, are one choice: the largest of the keys (n << 24) / j, j = 1 .. cap, then larger n, then lower codes;
// for fan-outs and leaves the cap is 1, and the key n does. A search by halves finds the least key of the seats; where
// several children have it, a second one, by n, decides among them, then a count in the order of codes.
#pragma once
#include "vote_task.h"

namespace hisac::cuda {

template <class Sum, bool kBitmap>  // 32-bit sums: those, prefix sums and marks in shared memory
class UserVote {
  static constexpr bool kShared = sizeof(Sum) == 4;
  using Number = std::conditional_t<kBitmap, uint32_t, uint64_t>;
  using Prefix = std::conditional_t<kShared, uint16_t, uint32_t>;

 public:
  SIMT_DEVICE UserVote(const VoteTask& task, const Slice& slice, int64_t user, int64_t rows)
      : t(task),
        s(slice),
        b(user),
        n_rows(static_cast<int>(rows)),
        first_row(task.start(user)),
        number(static_cast<Number*>(slice.number)) {}

  SIMT_DEVICE void run() {
    if constexpr (kBitmap)
      n = count_by_bitmap();
    else
      n = count_sorted();
    nodes = n > 0;
    if (simt::thread() == 0) node()[0] = {0, static_cast<uint32_t>(n), seats_of(0, static_cast<uint32_t>(n)), 0};
    simt::sync();
    for (int level = 0; level < t.levels; ++level) {
      list_children(level);
      choose(t.budget && level + 1 < t.levels);
      if (level + 1 < t.levels) descend(level + 1);
    }
    write();
  }

 private:
  template <class T>
  SIMT_DEVICE static T* at(int offset) {
    return reinterpret_cast<T*>(simt::shared() + offset);
  }
  // recomputed where they are used: kept, they would take a third of the registers
  SIMT_DEVICE uint32_t* bits() const { return at<uint32_t>(t.at.area); }
  SIMT_DEVICE Prefix* prefix() const { return at<Prefix>(t.at.prefix); }
  SIMT_DEVICE Sum* before() const {
    if constexpr (kShared)
      return at<Sum>(t.at.before);
    else
      return s.before;
  }
  SIMT_DEVICE uint16_t* mark() const { return kShared ? at<uint16_t>(t.at.mark) : s.mark; }
  SIMT_DEVICE uint32_t* sums() const { return at<uint32_t>(t.at.sums); }
  SIMT_DEVICE Node* node() const { return t.seats > kMostShared ? s.node : at<Node>(t.at.nodes); }
  SIMT_DEVICE Search* search() const { return t.seats > kMostShared ? s.search : at<Search>(t.at.searches); }

  template <class F>
  SIMT_DEVICE static void each(int count, F f) {
    for (int i = simt::thread(); i < count; i += simt::threads()) f(i);
  }
  SIMT_DEVICE uint32_t seats_of(int level, uint32_t seats) const {
    const uint32_t most = static_cast<uint32_t>(t.seats);
    return !t.budget ? t.fanout[level] : seats < most ? seats : most;
  }

  // ---- counting

  /// f(number of the leaf, votes) for every row, by whole warps; 0 votes: it does not vote, or is past the last. Loads
  /// of four rows a thread are under way together.
  template <class F>
  SIMT_DEVICE void each_row(F f) const {
    constexpr int kTogether = 4;
    const auto row = [&](int first, int k) { return first + simt::thread() + k * simt::threads(); };
    for (int first = 0; first < n_rows; first += kTogether * simt::threads()) {
      Number leaf[kTogether];
      uint32_t votes[kTogether];
      SIMT_EACH (k, kTogether) {
        leaf[k] = 0;
        votes[k] = 1;
      }
      SIMT_ROLLED for (int l = 0; l < t.levels; ++l) {
        const int32_t* const c = t.codes + first_row * t.levels + l;
        SIMT_EACH (k, kTogether) {
          const int i = row(first, k);
          const uint32_t code = i < n_rows ? static_cast<uint32_t>(c[int64_t{i} * t.levels]) : ~0u;
          votes[k] &= code < t.size[l];
          leaf[k] = leaf[k] * static_cast<Number>(t.size[l]) + code;
        }
      }
      if (t.weights)
        SIMT_EACH (k, kTogether) {
          const int i = row(first, k);
          votes[k] = votes[k] ? quantise(t.weights[first_row + i]) : 0;
        }
      SIMT_EACH (k, kTogether) f(leaf[k], votes[k]);
    }
  }

  SIMT_DEVICE int count_by_bitmap() {
    each(2 * t.pairs, [&](int w) { bits()[w] = 0; });
    SIMT_UNLESS_PLANTED(34, simt::sync());
    each_row([&](Number leaf, uint32_t votes) {
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
              number[place++] = static_cast<uint32_t>(32 * w + simt::count_bits((left & (0 - left)) - 1));
        }));
    each(found + 1, [&](int i) { before()[i] = 0; });
    each(found, [&](int i) { mark()[i] = static_cast<uint16_t>(t.levels - 1); });
    simt::sync();
    each_row([&](Number leaf, uint32_t votes) {
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
    each_row([&](Number leaf, uint32_t votes) {
      const uint32_t voting = simt::ballot(votes != 0);
      uint32_t to = 0;
      if (simt::lane() == 0) to = simt::atomic_add(&sums()[0], static_cast<uint32_t>(simt::count_bits(voting)));
      to = simt::shuffle(to, 0) + static_cast<uint32_t>(simt::count_bits(voting & ((1u << simt::lane()) - 1)));
      if (!votes) return;
      s.key[to] = leaf;
      if (t.weights) s.weight[to] = votes;
    });
    simt::sync();
    const int voters = static_cast<int>(sums()[0]);
    uint64_t *key = s.key, *spare = number;
    uint32_t *weight = t.weights ? s.weight : nullptr, *spare_weight = s.spare_weight;
    for (int low = 0; low < t.bits; low += kDigit) {
      radix_pass(voters, low, key, spare, weight, spare_weight, bits());
      swap(key, spare);
      if (weight) swap(weight, spare_weight);
    }
    number = spare;
    constexpr int kVoteBits = 40;
    const uint64_t sum = scan<uint64_t>(
        voters,
        [&](int i) {
          const bool head = i == 0 || key[i] != key[i - 1];
          return uint64_t{head} << kVoteBits | (weight ? weight[i] : 1);
        },
        [&](int i, uint64_t so_far, uint64_t own) {
          if (!(own >> kVoteBits)) return;
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

  template <class T>
  SIMT_DEVICE static void swap(T& x, T& y) {
    const T kept = x;
    x = y;
    y = kept;
  }

  // ---- levels

  /// The owner of a place: a node of the level above. mark: owner + 1, and the level.
  SIMT_DEVICE void list_children(int level) {
    children = static_cast<int>(scan<uint32_t>(
        n,
        [&](int i) {
          const bool owned = level == 0 || mark()[i] > kLevelBits;
          return uint32_t{owned && (mark()[i] & kLevelBits) <= level};
        },
        [&](int i, uint32_t place, uint32_t head) {
          const uint16_t owner = level == 0 ? uint16_t{0} : static_cast<uint16_t>((mark()[i] >> 3) - 1);
          if (head) s.child[place] = {static_cast<uint32_t>(i), 0, 0, owner, 0};
        }));
    each(children, [&](int j) {
      Child& c = s.child[j];
      c.end = j + 1 < children && s.child[j + 1].node == c.node ? s.child[j + 1].begin : node()[c.node].end;
      if (j == 0 || s.child[j - 1].node != c.node) node()[c.node].first = static_cast<uint32_t>(j);
    });
    simt::sync();
  }

  SIMT_DEVICE uint64_t votes(uint32_t begin, uint32_t end) const { return before()[end] - before()[begin]; }

  /// How many of the keys (votes << 24) / j, j = 1 .. least(leaves, most), are at least `key`.
  SIMT_DEVICE uint32_t keys_from(const Child& c, uint64_t key, uint32_t most) const {
    const uint64_t scaled = votes(c.begin, c.end) << 24;
    const uint32_t leaves = c.end - c.begin, cap = leaves < most ? leaves : most;
    const float near = static_cast<float>(scaled) / static_cast<float>(key);  // within 2^-21 of itself
    if (near >= static_cast<float>(cap + 1)) return cap;
    uint32_t quotient = static_cast<uint32_t>(near * (1 - 0x1p-20f));  // exact or one less: cap is at most 4,096
    quotient += scaled - quotient * key >= key;
    return quotient < cap ? quotient : cap;
  }

  /// sums()[node] = the sum of count(child) over its children; returns after a sync.
  template <class Count>
  SIMT_DEVICE void sum_up(Count count) {
    for (int first = simt::warp() * 32; first < children; first += simt::threads()) {
      const int j = first + simt::lane(), last = first + 31 < children ? first + 31 : children - 1;
      const uint32_t own = j < children ? count(s.child[j]) : 0;
      if (s.child[first].node == s.child[last].node) {
        uint32_t sum = own;
        for (int m = 16; m; m /= 2) sum += simt::shuffle_xor(sum, m);
        if (simt::lane() == 0 && sum) simt::atomic_add(&sums()[s.child[first].node], sum);
      } else if (own) {
        simt::atomic_add(&sums()[s.child[j].node], own);
      }
    }
    simt::sync();
  }

  /// Halves [low, high) of every node until `high` is the key after the last seat's, or exactly as many are above;
  /// count(child, key): how many of its keys are at least `key`. Then sums()[node] is what `high` gives.
  template <class Count>
  SIMT_DEVICE void halve(Count count) {
    uint32_t* const open = at<uint32_t>(256);
    const auto middle = [](const Search& k) { return k.low + (k.high - k.low) / 2; };
    if (simt::thread() < 2) open[simt::thread()] = 0;
    each(nodes, [&](int k) { sums()[k] = 0; });
    simt::sync();
    for (int round = 0;; ++round) {
      sum_up([&](const Child& c) {
        const Search& k = search()[c.node];
        return k.high - k.low > 1 ? count(c, middle(k)) : 0;
      });
      if (simt::thread() == 0) open[(round + 1) & 1] = 0;
      each(nodes, [&](int i) {
        Search& k = search()[i];
        if (k.high - k.low > 1) {
          const uint64_t m = middle(k);
          if (sums()[i] >= k.seats) k.low = m;
          if (sums()[i] <= k.seats) k.high = m;
          if (k.high - k.low > 1) simt::atomic_add(&open[round & 1], 1u);
        }
        sums()[i] = 0;
      });
      simt::sync();
      if (!open[round & 1]) break;
    }
    sum_up([&](const Child& c) { return count(c, search()[c.node].high); });
  }

  /// The seats of every child, `kTied` off.
  SIMT_DEVICE void choose(bool in_proportion) {
    const auto begin = [&](int k, uint32_t seats, int shift) {
      const uint64_t all = votes(node()[k].begin, node()[k].end) << shift;
      search()[k] = {1, seats ? all / seats + 1 : 1, seats};
    };
    each(nodes, [&](int k) { begin(k, node()[k].seats, in_proportion ? 24 : 0); });
    if (in_proportion) {
      const auto count = [&](const Child& c, uint64_t key) { return keys_from(c, key, node()[c.node].seats); };
      halve(count);
      each(children, [&](int j) {
        Child& c = s.child[j];
        const Search& k = search()[c.node];
        const uint32_t sure = count(c, k.high);
        const bool tied = sums()[c.node] < k.seats && count(c, k.low) > sure;
        c.seats = static_cast<uint16_t>(sure | (tied ? kTied : 0));
      });
      simt::sync();
      each(nodes, [&](int k) { begin(k, node()[k].seats - sums()[k], 0); });
    } else {
      each(children, [&](int j) { s.child[j].seats = kTied; });
    }
    simt::sync();
    const auto count = [&](const Child& c, uint64_t key) {
      return uint32_t{(c.seats & kTied) != 0 && votes(c.begin, c.end) >= key};
    };
    halve(count);
    const auto last = [&](int j) {  // has as many votes as the last seat needs, or too few
      const Child& c = s.child[j];
      const Search& k = search()[c.node];
      return sums()[c.node] < k.seats && count(c, k.low) && !count(c, k.high);
    };
    scan<uint32_t>(
        children, [&](int j) { return uint32_t{last(j)}; },
        [&](int j, uint32_t place, uint32_t) { s.child[j].order = place; });
    each(children, [&](int j) {
      Child& c = s.child[j];
      const Search& k = search()[c.node];
      const bool room = c.order - s.child[node()[c.node].first].order < k.seats - sums()[c.node];
      const uint32_t more = last(j) ? room : count(c, k.high);
      c.seats = static_cast<uint16_t>((c.seats & (kTied - 1)) + more);
    });
    simt::sync();
  }

  /// The children with seats are the nodes now.
  SIMT_DEVICE void descend(int level) {
    nodes = static_cast<int>(scan<uint32_t>(
        children, [&](int j) { return uint32_t{s.child[j].seats != 0}; },
        [&](int j, uint32_t place, uint32_t some) {
          const Child& c = s.child[j];
          if (some) node()[place] = {c.begin, c.end, seats_of(level, c.seats), 0};
        }));
    each(n, [&](int i) { mark()[i] &= kLevelBits; });
    simt::sync();
    for (int k = simt::warp(); k < nodes; k += simt::threads() / 32)
      for (uint32_t i = node()[k].begin + static_cast<uint32_t>(simt::lane()); i < node()[k].end; i += 32)
        mark()[i] = static_cast<uint16_t>(mark()[i] | (k + 1) << 3);
    simt::sync();
  }

  // ---- results

  /// The seated leaves, by votes and number.
  SIMT_DEVICE void write() {
    uint64_t* const rank = at<uint64_t>(t.at.area);  // votes left to the most, then the place: upwards
    const int kept = static_cast<int>(scan<uint32_t>(
        children, [&](int j) { return uint32_t{s.child[j].seats != 0}; },
        [&](int j, uint32_t place, uint32_t some) {
          const Child& c = s.child[j];
          if (some) rank[place] = (kMostVotes - votes(c.begin, c.end)) << 24 | c.begin;
        }));
    int padded = 1;
    while (padded < kept) padded *= 2;
    each(padded - kept, [&](int i) { rank[kept + i] = ~uint64_t{0}; });
    simt::sync();
    sort_in_place(rank, padded);
    each(t.seats, [&](int i) {
      const bool some = i < kept;
      Number path = some ? number[rank[i] & kMostVoters] : 0;
      t.out_votes[b * t.seats + i] = some ? static_cast<int64_t>(kMostVotes - (rank[i] >> 24)) : 0;
      int32_t* const c = t.out_codes + (b * t.seats + i) * t.levels;
      for (int l = t.levels - 1; l >= 0; --l) {
        const Number size = static_cast<Number>(t.size[l]), up = path / size;
        c[l] = some ? static_cast<int32_t>(path - up * size) : -1;
        path = up;
      }
    });
    if (simt::thread() == 0) t.out_count[b] = kept;
    simt::sync();
  }

  const VoteTask& t;
  const Slice& s;
  int64_t b;
  int n_rows;
  int64_t first_row;
  Number* number;
  int n = 0, nodes = 0, children = 0;
};

}  // namespace hisac::cuda
