// SPDX-License-Identifier: Apache-2.0
// Leaf sums. A user's leaves are written at the offset of its rows, so that users are independent of one another. First
// each user's rows are sorted by leaf. Then workers sum pieces of leaves, reading x and v once. Then the pieces of long
// leaves are merged. Last the leaves are moved to the front. The bits are the same for any number of workers and
// whatever else is in the batch.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "base/arena.h"
#include "base/parallel.h"
#include "base/radix_sort.h"
#include "base/reduction_tree.h"
#include "codebook/checks.h"
#include "cpu/histories.h"
#include "cpu/row_votes.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

constexpr int64_t kCapacity = 16384;   // rows of short histories summed together: enough for all workers, little memory
constexpr int64_t kPiece = 1024;       // rows of a leaf summed at a time
constexpr int64_t kRun = 64;           // rows added one by one before their sum joins that of the piece
constexpr int64_t kPrefetchRows = 12;  // how many rows before its use a row is prefetched

/// Never less for more users or a longer history, so that a workspace serves smaller batches too.
int64_t capacity_of(int64_t users, int64_t longest) noexcept {
  const bool many = longest > 0 && users > kCapacity / longest;
  return std::max(longest, many ? kCapacity : users * longest);
}

struct Sum {
  int64_t present = 0;
  double total_weight = 0, squares = 0;  // squares: of weighted |x - origin|^2 and spreads
  float *x = nullptr, *v = nullptr;      // [D] of x - origin, [V]

  void carve(Arena& arena, int64_t width, int64_t value_width) noexcept {
    x = arena.take<float>(width);
    v = arena.take<float>(value_width);
  }
};

struct Worker {
  Sum sum;
  float* origin = nullptr;  // [D] of the leaf that is summed
  float *x = nullptr, *v = nullptr, *run_x = nullptr, *run_v = nullptr;
};

/// Sums the leaves of some users after others: of as many at a time as have `capacity` rows together.
class LeafSummer {
 public:
  LeafSummer(const Context& context, const Codebook& book, const Histories& in, const LeafSums& out) noexcept
      : context_(context), book_(book), in_(in), out_(out) {}

  void carve(Arena& arena) noexcept {
    const int64_t users = in_.offsets.users;
    start_ = arena.take<int64_t>(users + 1);
    leaves_ = arena.take<int64_t>(users);
    begin_ = arena.take<int64_t>(capacity_ + users);
    arena.take_into(capacity_, leaf_, spare_leaf_, row_, spare_row_, votes_, max_bias_, weight_);
    piece_sum_ =
        arena.take_each<Sum>(capacity_ / kPiece + 1, [&](Sum& sum) { sum.carve(arena, width_, value_width_); });
    worker_ = arena.take_each<Worker>(workers_of(context_), [&](Worker& one) {
      one.sum.carve(arena, width_, value_width_);
      arena.take_into(width_, one.origin, one.x, one.run_x);
      arena.take_into(value_width_, one.v, one.run_v);
    });
  }

  /// With ragged offsets, all users' leaves with a present behaviour or a vote are moved to the front; otherwise each
  /// user's to the offset of its rows.
  void run() noexcept {
    const MutableSpans& spans = out_.offsets;
    const bool ragged = spans.ragged();
    int64_t kept = 0;
    if (ragged) spans.starts[0] = 0;
    while (first_ < in_.offsets.users) {
      choose_users();
      sum_users();
      for (int64_t i = 0; i < n_; ++i) {
        if (!ragged) spans.starts[first_ + i] = kept = base_ + start_[i];
        for (int64_t row = base_ + start_[i], end = row + leaves_[i]; row < end; ++row)
          if (out_.bias.data[row] > -INFINITY || out_.votes.data[row] != 0) move_leaf(row, kept++);
        spans.ends[first_ + i] = kept;
      }
      first_ += n_;
      base_ += start_[n_];
    }
  }

 private:
  /// The users from first_ on whose rows fit into the capacity, at least one.
  void choose_users() noexcept {
    start_[0] = 0;
    for (n_ = 0; first_ + n_ < in_.offsets.users; ++n_) {
      start_[n_ + 1] = start_[n_] + in_.offsets.end(first_ + n_) - in_.offsets.start(first_ + n_);
      if (n_ > 0 && start_[n_ + 1] > capacity_) break;
    }
  }

  void sum_users() noexcept {
    parallel_each(context_, n_, [&](int64_t i, int) { group_rows(i); });
    parallel_pieces(context_, start_[n_], kPiece, [&](int64_t begin, int64_t end, int w) {
      int64_t i = std::upper_bound(start_, start_ + n_ + 1, begin) - start_ - 1;
      for (; i < n_ && start_[i] < end; ++i) sum_pieces(i, begin - start_[i], end - start_[i], worker_[w]);
    });
    parallel_each(context_, n_, [&](int64_t i, int w) {
      for (int64_t g = 0; g < leaves_[i]; ++g)
        if (pieces_of(i, g) > 1) write_leaf(i, g, worker_[w]);
    });
  }

  int64_t* begin_of(int64_t i) const noexcept { return begin_ + start_[i] + i; }
  int64_t pieces_of(int64_t i, int64_t g) const noexcept {
    return std::max<int64_t>(1, (begin_of(i)[g + 1] - begin_of(i)[g]) / kPiece);
  }
  /// Where piece p of leaf g is summed. Pieces of long leaves have at least kPiece rows, so each has a slot of its own.
  Sum& sum_of(int64_t i, int64_t g, int64_t p, Worker& w) const noexcept {
    return pieces_of(i, g) > 1 ? piece_sum_[(start_[i] + begin_of(i)[g]) / kPiece + p] : w.sum;
  }

  void group_rows(int64_t i) noexcept {
    const int64_t first = in_.offsets.start(first_ + i), offset = start_[i], length = start_[i + 1] - offset;
    const bool wide = in_.weights && in_.weights.dtype == DType::int64;
    uint64_t* const votes = votes_ + offset;
    uint32_t* const narrow_votes = reinterpret_cast<uint32_t*>(votes);
    const int64_t voters = std::min(length, kMostVoters);
    wide ? row_votes(book_, in_, first, voters, votes) : row_votes(book_, in_, first, voters, narrow_votes);
    const auto votes_of = [&](int64_t row) {
      const int64_t at = row - first;
      return at >= voters ? 0 : wide ? static_cast<int64_t>(votes[at]) : int64_t{narrow_votes[at]};
    };
    int64_t n = 0;
    for (int64_t row = first; row < first + length; ++row) {
      const bool may_be_present = loader_.may_be_present(row);
      if (!may_be_present && !votes_of(row)) continue;
      leaf_[offset + n] = book_.leaf(loader_.codes_of(row));
      row_[offset + n++] = may_be_present ? row : ~row;
    }
    sort_by_leaf(offset, n);
    // entries without the rows that only vote, and leaf_ by leaf, in place
    int64_t* const begin = begin_of(i);
    int64_t* const leaf_votes = out_.votes.data + base_;
    int64_t leaves = 0, kept = 0;
    for (int64_t e = offset; e < offset + n; ++e) {
      const uint64_t leaf = leaf_[e];
      if (leaves == 0 || leaf != leaf_[offset + leaves - 1]) {
        leaf_[offset + leaves] = leaf;
        max_bias_[offset + leaves] = -INFINITY;
        leaf_votes[offset + leaves] = 0;
        begin[leaves++] = kept;
      }
      const int64_t row = row_[e] < 0 ? ~row_[e] : row_[e], g = offset + leaves - 1;
      leaf_votes[g] += votes_of(row);
      if (row_[e] < 0) continue;
      max_bias_[g] = std::max(max_bias_[g], loader_.bias_of(row));
      row_[offset + kept++] = row;
    }
    begin[leaves] = kept;
    leaves_[i] = leaves;
  }

  /// Sorts the n entries from `offset` on by leaf; entries of one leaf keep the order of their rows.
  void sort_by_leaf(int64_t offset, int64_t n) noexcept {
    const uint64_t all_leaves = book_.body().stride[0] * static_cast<uint64_t>(book_.size(0));  // 0: 2^64
    uint64_t *leaf = leaf_ + offset, *spare_leaf = spare_leaf_ + offset;
    int64_t *row = row_ + offset, *spare_row = spare_row_ + offset;
    radix_sort<true>(n, 0, bits_of(all_leaves - 1), leaf, spare_leaf, row, spare_row);
    if (leaf == leaf_ + offset) return;
    std::copy_n(leaf, n, spare_leaf);
    std::copy_n(row, n, spare_row);
  }

  /// Sums the pieces of a user's leaves that begin at its entries [begin, end). All pieces of a leaf but the last have
  /// kPiece rows, and the last has fewer than 2 kPiece.
  void sum_pieces(int64_t i, int64_t begin, int64_t end, Worker& w) noexcept {
    const int64_t* const first = begin_of(i);
    const int64_t following = std::lower_bound(first, first + leaves_[i], begin) - first;  // leaves may have no entry
    for (int64_t g = std::max<int64_t>(following - 1, 0); g < leaves_[i]; ++g) {
      if (first[g] >= end) break;
      const int64_t pieces = pieces_of(i, g);
      for (int64_t p = 0; p < pieces; ++p)
        if (const int64_t entry = first[g] + p * kPiece; entry >= begin && entry < end) sum_piece(i, g, p, w);
      if (pieces == 1 && first[g] >= begin) write_leaf(i, g, w);
    }
  }

  /// The origin of a leaf's sums: its first present row, or zero; returns the row's entry, or -1. The spread is a
  /// difference of squares, which would lose its digits where rows lie far from zero and near each other.
  int64_t find_origin(int64_t i, int64_t g, Worker& w) const noexcept {
    const int64_t* const first = begin_of(i);
    float norm;
    for (int64_t e = first[g]; e < first[g + 1]; ++e)
      if (loader_.load_x_unchecked(row_[start_[i] + e], w.origin, &norm)) return e;
    std::fill_n(w.origin, width_, 0.f);
    return -1;
  }

  void clear(float* x, float* v) const noexcept {
    std::fill_n(x, width_, 0.f);
    std::fill_n(v, value_width_, 0.f);
  }

  void sum_piece(int64_t i, int64_t g, int64_t p, Worker& w) noexcept {
    const int64_t *const first = begin_of(i), pieces = pieces_of(i, g);
    const int64_t begin = first[g] + p * kPiece, end = p + 1 < pieces ? begin + kPiece : first[g + 1];
    const int64_t* const rows = row_ + start_[i];
    const float max_bias = max_bias_[start_[i] + g], scale = scale_of(first[g + 1] - first[g]);
    Sum& sum = sum_of(i, g, p, w);
    const int64_t origin = find_origin(i, g, w);
    sum.present = 0;
    sum.total_weight = sum.squares = 0;
    for (int64_t run = begin; run < end; run += kRun) {
      const bool later = sum.present > 0;
      float *const x = later ? w.run_x : sum.x, *const v = later ? w.run_v : sum.v;
      int64_t added = 0;
      for (int64_t e = run; e < std::min(run + kRun, end); ++e) {
        const int64_t row = rows[e];
        float norm = 0;
        if (e + kPrefetchRows < first[leaves_[i]]) loader_.prefetch(rows[e + kPrefetchRows]);
        if (e != origin && !loader_.load_x_unchecked(row, w.x, &norm)) {
          weight_[start_[i] + e] = -1;
          continue;
        }
        if (e != origin) norm = k_.subtract_row(width_, w.origin, w.x);
        const float weight = in_.bias ? scale * std::exp(loader_.bias_of(row) - max_bias) : scale;
        weight_[start_[i] + e] = weight;
        sum.total_weight += double(weight);
        sum.squares += double(weight) * (double(norm) + double(loader_.spread_of(row)));
        if (added++ == 0) clear(x, v);
        if (e != origin) k_.add_row(width_, w.x, weight, x);  // its difference is zero
        loader_.v_source.add(row, weight, v, w.v);
      }
      sum.present += added;
      if (later && added) add_sums(x, v, sum);
    }
    if (!sum.present) clear(sum.x, sum.v);
  }

  void add_sums(const float* x, const float* v, Sum& sum) const noexcept {
    k_.add_row(width_, x, 1.f, sum.x);
    k_.add_row(value_width_, v, 1.f, sum.v);
  }

  /// Merges the pieces of leaf g and writes its row: means, log of the total weight, and, about the origin of its sums,
  /// E|x|^2 - |mean|^2. A leaf without a present behaviour has a bias of -inf.
  void write_leaf(int64_t i, int64_t g, Worker& w) noexcept {
    const int64_t *const first = begin_of(i), row = start_[i] + g, rows = first[g + 1] - first[g];
    Sum& sum = sum_of(i, g, 0, w);
    fold_all(pieces_of(i, g), &sum, [&](Sum& state, const Sum& later) {
      add_sums(later.x, later.v, state);
      state.present += later.present;
      state.total_weight += later.total_weight;
      state.squares += later.squares;
    });
    const double scale = double(scale_of(rows));
    if (sum.present > 0 &&
        sum.total_weight < scale / 2) {  // the row of the largest bias was absent: again, with the next largest
      max_bias_[row] = -INFINITY;
      for (int64_t e = start_[i] + first[g]; e < start_[i] + first[g + 1]; ++e)
        if (weight_[e] >= 0) max_bias_[row] = std::max(max_bias_[row], loader_.bias_of(row_[e]));
      for (int64_t p = 0; p < pieces_of(i, g); ++p) sum_piece(i, g, p, w);
      return write_leaf(i, g, w);
    }
    const int64_t out = base_ + row, levels = book_.levels();
    float *const x = out_.x.data + out * width_, *const v = out_.v.data + out * value_width_;
    const double inverse = sum.present ? 1 / sum.total_weight : 0;
    clear(x, v);
    k_.add_row(value_width_, sum.v, static_cast<float>(inverse), v);
    k_.add_row(width_, sum.x, static_cast<float>(inverse), x);
    const float square = k_.load_row(x, DType::float32, width_, w.x);
    if (pieces_of(i, g) > 1) find_origin(i, g, w);  // the worker may have summed another leaf since
    if (sum.present) k_.add_row(width_, w.origin, 1.f, x);
    if (k_.load_row(x, DType::float32, width_, w.x) >
        0x1.fffff0p99f)  // rows are below 2^100, and so must their mean be
      k_.store_row(x, DType::float32, width_, w.x, 1 - 0x1p-20f);
    out_.bias.data[out] =
        sum.present ? static_cast<float>(double(max_bias_[row]) + std::log(sum.total_weight / scale)) : -INFINITY;
    out_.spread.data[out] =
        static_cast<float>(std::min(std::max(0.0, sum.squares * inverse - double(square)), double(FLT_MAX)));
    uint64_t leaf = leaf_[row];
    for (int64_t l = 0; l < levels; ++l) {
      const uint64_t stride = book_.body().stride[l];
      out_.codes.data[out * levels + l] = static_cast<int32_t>(leaf / stride);
      leaf %= stride;
    }
  }

  /// Moves a leaf to an earlier row of the output, or leaves it where it is.
  void move_leaf(int64_t from, int64_t to) const noexcept {
    if (from == to) return;
    const auto move = [&](auto* data, int64_t width) { std::copy_n(data + from * width, width, data + to * width); };
    move(out_.x.data, width_);
    move(out_.v.data, value_width_);
    move(out_.codes.data, book_.levels());
    move(out_.bias.data, 1);
    move(out_.spread.data, 1);
    move(out_.votes.data, 1);
  }

  const Context& context_;
  const Codebook& book_;
  const Histories& in_;
  const LeafSums out_;
  const simd::Kernels& k_ = simd::kernels();
  const int64_t width_ = width_of(&book_, in_), value_width_ = in_.v.width;
  const int64_t capacity_ = capacity_of(in_.offsets.users, in_.longest);
  const RowLoader loader_{&book_, in_, width_};
  int64_t first_ = 0, n_ = 0;  // the users whose leaves are summed, from which on and how many
  int64_t base_ = 0;           // the rows of all users before them
  // of the i-th of them: the offset of its rows and leaves, and the number of its leaves
  int64_t *start_ = nullptr, *leaves_ = nullptr;      // [B + 1], [B]
  uint64_t *leaf_ = nullptr, *spare_leaf_ = nullptr;  // [capacity] the leaves in turn; while rows are sorted, of a row
  int64_t *row_ = nullptr, *spare_row_ = nullptr;     // [capacity] entries: rows that may be present, by leaf
  uint64_t* votes_ = nullptr;                         // [capacity] of a row
  int64_t* begin_ = nullptr;                          // [capacity + B] first entry of a leaf, then the end of all
  float* max_bias_ = nullptr;                         // [capacity] a leaf's largest bias
  float* weight_ = nullptr;                           // [capacity] of an entry: scale e^(bias - max_bias); -1: absent
  Sum* piece_sum_ = nullptr;                          // [capacity / kPiece + 1] pieces of long leaves
  Worker* worker_ = nullptr;
};

}  // namespace

size_t leaf_sums_workspace(const Context& context, const Codebook& book, const Histories& histories) noexcept {
  return workspace_of(LeafSummer(context, book, histories, {}));
}

Status leaf_sums(const Context& context, const Codebook& book, const Histories& histories,
                 const LeafSums& out) noexcept {
  return run_call("leaf_sums", context, LeafSummer(context, book, histories, out));
}

}  // namespace hisac::cpu
