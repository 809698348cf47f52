// SPDX-License-Identifier: Apache-2.0
// Votes one user at a time, in three steps: count votes of parents (the nodes above the leaves), allocate seats to
// parents, choose leaves of the parents with seats. There are two ways to count, neither with a branch that depends on
// a row:
//   dense   for longer histories in trees of few parents. A first pass over the rows counts votes of parents. Seats are
//           allocated. A second pass counts leaves, of parents with seats alone. A parent's seats are capped by how
//           many leaves it has, which only the second pass finds; until then the cap is the upper bound min(votes,
//           C_L). By budget the true caps may give seats to other parents, whose leaves another pass counts. Once the
//           leaves of every parent with seats are counted, the seats are those of the true caps: no seat went to an
//           absent leaf.
//   sorted  for everything else: leaf numbers are radix-sorted.
// Then the leaves that may have a seat are radix-sorted by votes, most first, lower codes first among equals, and taken
// while their parent has seats. That order is the order of the output.
#include <algorithm>
#include <type_traits>

#include "base/checks.h"
#include "base/parallel.h"
#include "codebook/body.h"
#include "cpu/row_votes.h"
#include "cpu/seats.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

// limits of dense counting; fan-out and beam fix beforehand how many parents have seats, so their limits are wider
constexpr int64_t kMostParents = 0xffff;  // most parents, and most codes of the last level
constexpr int64_t kDenseRows = 2048;      // least rows, by budget
constexpr int64_t kCells = 4;             // most 32-bit counters a row, by budget
constexpr int64_t kFixedRows = 512;       // least rows, by fan-out or beam
constexpr int64_t kFixedCells = 16;       // most counters a row, by fan-out or beam
constexpr int64_t kBlock = 256;           // rows located or gathered at a time
constexpr int kLanes = 4;                 // histograms of parents, so that equal codes in turn do not wait for a store
constexpr int64_t kLanesParents = 4096;   // most parents for several histograms
constexpr int kMostPasses = 3;            // most passes that count leaves
constexpr int64_t kNotCounted = -1;

/// A table of 2^j, because SSE2 cannot shift each lane by another count.
constexpr struct Bits {
  uint32_t of[32] = {};
  constexpr Bits() {
    for (int j = 0; j < 32; ++j) of[j] = uint32_t{1} << j;
  }
} kBits;

class Voter {
 public:
  Voter(const Codebook& book, const VoteParams& params) noexcept
      : book_(book), body_(book.body()), params_(params), levels_(book.levels()), last_(body_.size[levels_ - 1]) {
    int64_t seated = params.budget ? 0 : 1;
    for (int l = 0; l + 1 < levels_; ++l) {
      if (parents_possible_ <= kMostParents) parents_possible_ *= body_.size[l];
      seated = params.beam[0] ? params.beam[l] : seated * params.fanout[l];
    }
    fixed_cells_ = std::min(seated, parents_possible_) * last_;
    leaves_bits_ = bits_of(body_.stride[0] * static_cast<uint64_t>(body_.size[0]) - 1);  // 2^64 leaves wrap to 64 bits
    reciprocal_ = leaves_bits_ <= 32 && last_ > 1 ? ~uint64_t{0} / static_cast<uint64_t>(last_) + 1 : 0;
  }

  void carve(Arena& arena, const Codebook& book, int64_t longest) noexcept {
    const int64_t rows = std::min(longest, kMostVoters);
    const bool dense = counts_densely(rows);
    const int64_t most_parents = std::min(rows, parents_possible_ > kMostParents ? rows : parents_possible_);
    histogram_ = arena.take<uint64_t>(dense ? (parents_possible_ + 1) * histograms() : 0);
    block_ = arena.take<uint32_t>(dense ? parents_possible_ + 1 : 0);
    buffer_ = arena.take<uint64_t>(std::max(2 * (rows + 1), dense ? fixed_cells_ : 0) + (dense ? last_ : 0));
    row_votes_ = arena.take<uint64_t>(rows);
    spare_row_votes_ = arena.take<uint64_t>(rows);
    arena.take_into(rows + 1, located_, last_code_, owner_);
    votes_ = arena.take<int64_t>(rows + 1);
    parent_ = arena.take<Parent>(most_parents + 1);
    gathered_ = arena.take<int32_t>(kBlock * levels_);
    allocation_.carve(arena, book, params_, most_parents);
  }

  /// Votes for one user, who has the rows [first, first + rows): writes the kept leaves, by votes and code; returns how
  /// many.
  int64_t run(const Histories& in, int64_t first, int64_t rows, int32_t* out_codes, int64_t* out_votes) noexcept {
    in_ = &in;
    first_ = first;
    rows = std::min(rows, kMostVoters);
    parents_ = candidates_ = seated_ = all_votes_ = 0;
    key_ = located_;
    spare_ = buffer_;
    if (!in.weights)
      count<int32_t, void>(rows);
    else
      in.weights.dtype == DType::float32 ? count<int64_t, uint32_t>(rows) : count<int64_t, uint64_t>(rows);
    return write(out_codes, out_votes);
  }

 private:
  // ---- counting

  /// The codes of the user's rows [begin, end), at most kBlock of them: where they lie, or gathered by ids.
  template <int L>
  const int32_t* codes_of(int64_t begin, int64_t end) const noexcept {
    const int levels = L ? L : levels_;
    const int32_t* const table = in_->codes.data;
    if (!in_->x_ids) return table + (first_ + begin) * levels;
    const uint64_t items = static_cast<uint64_t>(in_->codes.shape[0]);
    int32_t* to = gathered_;
    for (int64_t i = first_ + begin; i < first_ + end; ++i, to += levels) {
      const int64_t id = in_->x_ids[i];
      const bool inside = static_cast<uint64_t>(id) < items;
      for (int l = 0; l < levels; ++l) to[l] = inside ? table[id * levels + l] : -1;
    }
    return gathered_;
  }

  /// Monotone in `rows`, so that what is carved for the longest history suffices for all.
  bool counts_densely(int64_t rows) const noexcept {
    if (parents_possible_ > std::min(kMostParents, rows) || last_ > kMostParents) return false;
    if (fixed_cells_) return rows >= kFixedRows && fixed_cells_ <= kFixedCells * rows;
    return rows >= kDenseRows && last_ <= kCells * rows;
  }

  int64_t histograms() const noexcept { return parents_possible_ <= kLanesParents ? kLanes : 1; }

  /// Count: of many votes. Vote: of a row's, where there are weights, else void.
  template <class Count, class Vote>
  void count(int64_t rows) noexcept {
    if constexpr (!std::is_void_v<Vote>) row_votes(book_, *in_, first_, rows, static_cast<Vote*>(row_votes_));
    if (!counts_densely(rows) || !count_dense<Count, Vote>(rows)) count_sorted<Count, Vote>(rows);
  }

  template <class Count, class Vote>
  void count_sorted(int64_t rows) noexcept {
    constexpr bool weighted = !std::is_void_v<Vote>;
    using Payload = std::conditional_t<weighted, Vote, uint32_t>;
    Payload *weight = static_cast<Payload*>(row_votes_), *spare_weight = static_cast<Payload*>(spare_row_votes_);
    int64_t n = 0;
    for (int64_t begin = 0; begin < rows; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, rows);
      n = levels_ == 2 ? find_leaves<2, weighted>(begin, end, n, weight)
                       : find_leaves<0, weighted>(begin, end, n, weight);
    }
    if (n == 0) return;
    radix_sort<weighted>(n, 0, leaves_bits_, key_, spare_, weight, spare_weight);
    uint64_t* const key = key_;
    key[n] = ~key[n - 1];
    int64_t* const votes_before = reinterpret_cast<int64_t*>(buffer_ + n + 1);
    int64_t sum = 0, leaves = 0;
    votes_before[0] = 0;
    for (int64_t i = 0; i < n; ++i) {
      sum += weighted ? static_cast<int64_t>(weight[i]) : 1;
      const uint64_t leaf = key[i];
      key[leaves] = leaf;
      votes_before[leaves + 1] = sum;
      leaves += key[i + 1] != leaf;
    }
    Count* const votes = static_cast<Count*>(votes_);
    uint64_t number = parent_of(key[0]);
    for (int64_t i = 0; i < leaves; ++i) {
      votes[i] = static_cast<Count>(votes_before[i + 1] - votes_before[i]);
      last_code_[i] = static_cast<uint32_t>(key[i] - number * static_cast<uint64_t>(last_));
      owner_[i] = static_cast<uint32_t>(parents_);
      parent_[parents_].number = number;
      parent_[parents_].begin = i + 1;  // the end, until all parents are known
      const uint64_t following = i + 1 < leaves ? parent_of(key[i + 1]) : ~number;
      parents_ += following != number;
      number = following;
    }
    for (int64_t p = 0, begin = 0; p < parents_; ++p) {
      Parent& parent = parent_[p];
      const int64_t end = parent.begin;
      parent = {parent.number, begin, votes_before[end] - votes_before[begin], end - begin, 0};
      begin = end;
    }
    allocation_.allocate(parent_, parents_);
    const auto leaves_of = [=](const Parent& parent) { return Cells<Count>{votes + parent.begin, parent.leaves}; };
    choose<Count>(leaves_of, [=](const Parent& parent, Count least) {
      for (int64_t i = parent.begin; i < parent.begin + parent.leaves; ++i) {
        key[candidates_] = sort_key(votes[i], i);
        all_votes_ |= votes[i];
        candidates_ += votes[i] >= least;
      }
    });
  }

  /// Writes the leaf numbers of those of the rows [begin, end) that vote, and their votes where weighted, in row order
  /// behind the n of earlier rows; returns how many there are.
  template <int L, bool weighted, class Payload>
  int64_t find_leaves(int64_t begin, int64_t end, int64_t n, Payload* weight) noexcept {
    const int levels = L ? L : levels_;
    const int32_t* codes = codes_of<L>(begin, end);
    uint64_t* const key = key_;
    for (int64_t i = begin; i < end; ++i, codes += levels) {
      bool ok = true;
      uint64_t number = 0;
      for (int l = 0; l < levels; ++l) {
        ok &= static_cast<uint32_t>(codes[l]) < static_cast<uint32_t>(body_.size[l]);
        number = number * static_cast<uint64_t>(body_.size[l]) + static_cast<uint32_t>(codes[l]);
      }
      key[n] = number;
      if (weighted) ok &= (weight[n] = weight[i]) != 0;  // n <= i
      n += ok;
    }
    return n;
  }

  uint64_t parent_of(uint64_t leaf) const noexcept {
    if (reciprocal_) return static_cast<uint64_t>(static_cast<unsigned __int128>(reciprocal_) * leaf >> 64);
    return leaf / static_cast<uint64_t>(last_);
  }

  /// False, with nothing done, where the leaves of too many parents would have to be counted.
  template <class Count, class Vote>
  bool count_dense(int64_t rows) noexcept {
    const int64_t none = parents_possible_, lanes = histograms(), stride = lanes > 1 ? none + 1 : 0;
    uint32_t* const row = reinterpret_cast<uint32_t*>(key_);  // its parent << 16 | its last code
    const auto votes_of = [&]([[maybe_unused]] int64_t i) {
      if constexpr (std::is_void_v<Vote>)
        return Count{1};
      else
        return static_cast<Count>(static_cast<const Vote*>(row_votes_)[i]);
    };
    Count* const lane = reinterpret_cast<Count*>(histogram_);
    std::fill(lane, lane + (none + 1) * lanes, Count{0});
    for (int64_t block_begin = 0; block_begin < rows; block_begin += kBlock) {
      const int64_t block_end = std::min(block_begin + kBlock, rows);
      levels_ == 2 ? locate<2>(block_begin, block_end, row) : locate<0>(block_begin, block_end, row);
      int64_t i = block_begin;
      for (; i + kLanes <= block_end; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) lane[j * stride + (row[i + j] >> 16)] += votes_of(i + j);
      for (; i < block_end; ++i) lane[row[i] >> 16] += votes_of(i);
    }
    for (int64_t j = 1; j < lanes; ++j)
      for (int64_t p = 0; p < none; ++p) lane[p] += lane[j * stride + p];
    for_each_at_least(lane, none, Count{1}, [&](int64_t p) {
      const int64_t votes = lane[p];
      parent_[parents_++] = {static_cast<uint64_t>(p), kNotCounted, votes, std::min(votes, last_), 0};
    });
    Count* const cells = reinterpret_cast<Count*>(buffer_);
    const int64_t capacity = params_.budget ? kCells * rows * 4 / static_cast<int64_t>(sizeof(Count)) : fixed_cells_;
    int64_t used = 0;
    std::fill(cells + capacity, cells + capacity + last_, Count{0});
    for (int round = 0; parents_; ++round) {
      allocation_.allocate(parent_, parents_);
      const int64_t before = used;
      std::fill(block_, block_ + none + 1, static_cast<uint32_t>(capacity));
      for (int64_t p = 0; p < parents_; ++p) {
        Parent& parent = parent_[p];
        if (!parent.seats || parent.begin != kNotCounted) continue;
        if (used + last_ > capacity || round == kMostPasses) return (parents_ = 0);
        block_[parent.number] = static_cast<uint32_t>(parent.begin = used);
        used += last_;
      }
      if (used == before) break;
      std::fill(cells + before, cells + used, Count{0});
      const uint32_t* const block = block_;
      const auto cell_of = [&](int64_t i) { return block[row[i] >> 16] + (row[i] & 0xffff); };
      int64_t i = 0;
      for (; i + 4 <= rows; i += 4) {  // four addresses, then four additions: 1.6 times as fast as one by one
        const uint32_t cell[4] = {cell_of(i), cell_of(i + 1), cell_of(i + 2), cell_of(i + 3)};
        for (int64_t j = 0; j < 4; ++j) cells[cell[j]] += votes_of(i + j);
      }
      for (; i < rows; ++i) cells[cell_of(i)] += votes_of(i);
      bool settled = true;
      for (int64_t p = 0; p < parents_ && params_.budget; ++p) {
        Parent& parent = parent_[p];
        if (!parent.seats) continue;
        if (parent.begin >= before) parent.leaves = count_at_least(Cells<Count>{cells + parent.begin, last_}, Count{1});
        settled &= parent.seats <= parent.leaves;
      }
      if (settled) break;
    }
    const auto leaves_of = [=](const Parent& parent) { return Cells<Count>{cells + parent.begin, last_}; };
    choose<Count>(leaves_of, [=](const Parent& parent, Count least) {
      const Count* const cell = cells + parent.begin;
      for_each_at_least(cell, last_, least, [&](int64_t code) {
        last_code_[candidates_] = static_cast<uint32_t>(code);
        owner_[candidates_] = static_cast<uint32_t>(&parent - parent_);
        all_votes_ |= cell[code];
        key_[candidates_] = sort_key(cell[code], candidates_);
        ++candidates_;
      });
    });
    return true;
  }

  /// row[i] = parent << 16 | last code for rows [begin, end). The parent is parents_possible where a code is out of
  /// range.
  template <int L>
  void locate(int64_t begin, int64_t end, uint32_t* row) const noexcept {
    const int levels = L ? L : levels_;
    const uint32_t none = static_cast<uint32_t>(parents_possible_) << 16;
    const int32_t* c = codes_of<L>(begin, end);
    for (int64_t i = begin; i < end; ++i, c += levels) {
      const uint32_t last = static_cast<uint32_t>(c[levels - 1]);
      bool ok = last < static_cast<uint32_t>(last_);
      uint32_t number = 0;
      for (int l = 0; l + 1 < levels; ++l) {
        ok &= static_cast<uint32_t>(c[l]) < static_cast<uint32_t>(body_.size[l]);
        number = number * static_cast<uint32_t>(body_.size[l]) + static_cast<uint32_t>(c[l]);
      }
      row[i] = ok ? number << 16 | last : none;
    }
  }

  // ---- leaves

  /// Calls f(i), in order, for each cell[i] >= least.
  template <class Count, class F>
  static void for_each_at_least(const Count* cell, int64_t n, Count least, F f) noexcept {
    const auto mask = [&](const Count* c) {
      uint32_t bits = 0;
      for (int j = 0; j < 32; ++j) bits |= c[j] >= least ? kBits.of[j] : 0;
      return static_cast<uint64_t>(bits);
    };
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
      for (uint64_t bits = mask(cell + i) | mask(cell + i + 32) << 32; bits; bits &= bits - 1)
        f(i + __builtin_ctzll(bits));
    for (; i < n; ++i)
      if (cell[i] >= least) f(i);
  }

  /// The votes of leaves, zeros among them.
  template <class Count>
  struct Cells {
    const Count* votes;
    int64_t n;
  };

  /// The sum is a Count, so that lanes are not widened; n is below 2^24.
  template <class Count>
  static int64_t count_at_least(Cells<Count> leaves, Count least) noexcept {
    Count found = 0;
    for (int64_t i = 0; i < leaves.n; ++i) found += leaves.votes[i] >= least;
    return found;
  }

  /// Calls add(parent, least) for each parent with seats, to make candidates of its leaves with so many votes. By beam
  /// all parents share their seats.
  template <class Count, class LeavesOf, class Add>
  void choose(LeavesOf leaves_of, Add add) noexcept {
    const auto choose_below = [&](const Parent* begin, const Parent* end) {
      const auto each = [&](auto visit) {
        for (const Parent* p = begin; p < end; ++p)
          if (p->seats) visit(*p);
      };
      Parent group{};
      each([&](const Parent& parent) {
        group.votes += parent.votes;
        group.leaves += parent.leaves;
        group.seats = parent.seats;
      });
      const Count least = least_votes<Count>(group, [&](Count votes) {
        int64_t found = 0;
        each([&](const Parent& parent) { found += count_at_least(leaves_of(parent), votes); });
        return found;
      });
      const int64_t before = candidates_;
      each([&](const Parent& parent) { add(parent, least); });
      seated_ += std::min(group.seats, candidates_ - before);
    };
    const Parent* const end = parent_ + parents_;
    if (params_.beam[0]) return choose_below(parent_, end);
    for (const Parent* p = parent_; p < end; ++p)
      if (p->seats) choose_below(p, p + 1);
  }

  /// A lower bound of the votes that a leaf of these parents needs for one of their seats. found(votes): how many of
  /// their leaves have so many.
  template <class Count, class Found>
  static Count least_votes(const Parent& group, Found found) noexcept {
    if (group.seats >= group.leaves / 2)
      return 1;  // few leaves could be left out; from here on votes >= leaves > 2 seats
    // the seats-th largest number of votes is at most the mean of the `seats` largest
    Count least = Count{1} << (bits_of(static_cast<uint64_t>(group.votes / group.seats)) - 1);
    while (least > 1 && found(least) < group.seats) least /= 2;
    return least;
  }

  /// Writes the candidates, by votes and code, as long as their parents have seats; returns how many.
  int64_t write(int32_t* codes, int64_t* out_votes) noexcept {
    sort_by_votes(candidates_, all_votes_, key_, spare_);
    const uint64_t* sorted = key_;
    for (int64_t kept = 0; kept < seated_; ++sorted) {
      const int64_t index = index_of(*sorted);
      Parent& parent = parent_[owner_[index]];
      int32_t* const c = codes + kept * levels_;
      out_votes[kept] = static_cast<int64_t>(kMostVotes - (*sorted >> kIndexBits));
      c[levels_ - 1] = static_cast<int32_t>(last_code_[index]);
      uint64_t number = parent.number;
      for (int l = levels_ - 2; l > 0; --l) {
        c[l] = static_cast<int32_t>(number % static_cast<uint64_t>(body_.size[l]));
        number /= static_cast<uint64_t>(body_.size[l]);
      }
      if (levels_ > 1) c[0] = static_cast<int32_t>(number);
      const bool seated = parent.seats > 0;
      parent.seats -= seated;
      kept += seated;
    }
    return seated_;
  }

  const Codebook& book_;
  const Codebook::Body& body_;
  const VoteParams& params_;
  const Histories* in_ = nullptr;
  int64_t first_ = 0;  // the user's first row
  int levels_, leaves_bits_;
  int64_t last_;                  // codes of the last level
  int64_t parents_possible_ = 1;  // above kMostParents where there are more
  int64_t fixed_cells_;           // counters of all parents that can be seated; 0 by budget
  uint64_t reciprocal_;           // of last_, for numbers of 32 bits; 0 where it does not apply
  int64_t parents_ = 0, candidates_ = 0, seated_ = 0, all_votes_ = 0;
  uint64_t *key_ = nullptr, *spare_ = nullptr;  // located_, and what it is sorted with
  // dense
  uint64_t* histogram_ = nullptr;  // [kLanes][parents + 1] votes of parents, the last for rows that do not vote
  uint32_t* block_ = nullptr;      // [parents + 1] first counter of a parent
  // both
  uint64_t* located_ = nullptr;  // [rows + 1] located rows; sorted: leaf numbers; then sort keys of leaves
  uint64_t* buffer_ = nullptr;   // dense: counters, the last C_L for parents that are not counted; then 2 x [rows + 1]:
                                 // a spare of `located_`; sorted: votes before a leaf
  void *row_votes_ = nullptr, *spare_row_votes_ = nullptr;  // [rows] uint32_t or uint64_t
  uint32_t *last_code_ = nullptr, *owner_ = nullptr;        // [leaves] last code; index of the parent
  void* votes_ = nullptr;                                   // [leaves] int32_t, or int64_t where weighted
  int32_t* gathered_ = nullptr;                             // [kBlock, L]
  Parent* parent_ = nullptr;
  SeatAllocation allocation_;
};

}  // namespace

size_t vote_workspace(const Context& context, const Codebook& book, const VoteParams& params,
                      const Histories& histories) noexcept {
  Arena arena;
  for (int w = 0; w < workers_of(context); ++w) Voter(book, params).carve(arena, book, histories.longest);
  return arena.used();
}

Status vote(const Context& context, const Codebook& book, const VoteParams& params, const Histories& histories,
            Agents out) noexcept {
  const Spans& spans = histories.offsets;
  const int64_t m = out.codes.shape[1], users = spans.users;
  const int levels = book.levels();
  const int64_t longest = histories.longest;
  Arena arena(context.workspace);
  for (int w = 0; w < workers_of(context); ++w) Voter(book, params).carve(arena, book, longest);
  HISAC_TRY(arena.check("vote"));
  const size_t slice_bytes = arena.used() / static_cast<size_t>(workers_of(context));
  parallel_for(context, users, [&](int64_t begin, int64_t end, int worker) {
    Arena slice(
        {context.workspace.data + static_cast<size_t>(worker) * slice_bytes, {static_cast<int64_t>(slice_bytes)}});
    Voter voter(book, params);
    voter.carve(slice, book, longest);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = spans.start(b), rows = spans.end(b) - first;
      const int64_t kept = voter.run(histories, first, rows, out.codes.data + b * m * levels, out.votes.data + b * m);
      out.count.data[b] = static_cast<int32_t>(kept);
      std::fill(out.codes.data + (b * m + kept) * levels, out.codes.data + (b + 1) * m * levels, -1);
      std::fill(out.votes.data + b * m + kept, out.votes.data + (b + 1) * m, int64_t{0});
    }
  });
  return {};
}

}  // namespace hisac::cpu
