// SPDX-License-Identifier: Apache-2.0
#include "cpu/leaf_sums.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "base/checks.h"
#include "base/parallel.h"
#include "base/radix_sort.h"
#include "codebook/checks.h"
#include "cpu/row_votes.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

constexpr int64_t kCapacity = 16384;   // rows of short histories summed together: enough for all workers, little memory
constexpr int64_t kRun = 64;           // rows added one by one before their sum joins that of the piece
constexpr int64_t kPrefetchRows = 12;  // how many rows before its use a row is prefetched

/// Never less for more users or a longer history, so that a workspace serves smaller batches too.
int64_t capacity_of(int64_t users, int64_t longest) noexcept {
  const bool many = longest > 0 && users > kCapacity / longest;
  return std::max(longest, many ? kCapacity : users * longest);
}

LeafRows rows_from(const LeafSums& out, int64_t row) noexcept {
  return {out.x.data + row * out.x.shape[1],
          out.v.data + row * out.v.shape[1],
          out.bias.data + row,
          out.spread.data + row,
          out.codes.data + row * out.codes.shape[1],
          out.votes.data + row};
}

}  // namespace

LeafSummer::LeafSummer(const Codebook* book, const Histories& in, int64_t width, int workers) noexcept
    : book_(book),
      in_(in),
      loader_(book, in, width),
      k_(simd::kernels()),
      width_(width),
      value_width_(in.v.width),
      capacity_(capacity_of(in.offsets.users, in.longest)),
      workers_(workers) {}

void LeafSummer::carve(Arena& arena) noexcept {
  const int64_t users = in_.offsets.users;
  start_ = arena.take<int64_t>(users + 1);
  leaves_ = arena.take<int64_t>(users);
  begin_ = arena.take<int64_t>(capacity_ + users);
  arena.take_into(capacity_, leaf_, spare_leaf_, row_, spare_row_, votes_, max_bias_, weight_);
  const int64_t piece_sums = capacity_ / kPiece + 1;
  piece_sum_ = arena.take<Sum>(piece_sums);
  float* const x = arena.take<float>(piece_sums, width_);
  float* const v = arena.take<float>(piece_sums, value_width_);
  for (int64_t s = 0; v && s < piece_sums; ++s) {
    piece_sum_[s] = {};
    piece_sum_[s].x = x + s * width_;
    piece_sum_[s].v = v + s * value_width_;
  }
  worker_ = arena.take_each<Worker>(workers_, [&](Worker& one) {
    arena.take_into(width_, one.sum.x, one.origin, one.x, one.run_x);
    arena.take_into(value_width_, one.sum.v, one.v, one.run_v);
  });
}

int64_t LeafSummer::users_that_fit(const int64_t* users, int64_t n) const noexcept {
  int64_t rows = 0, i = 0;
  for (; i < n; ++i) {
    rows += in_.offsets.end(users[i]) - in_.offsets.start(users[i]);
    if (i > 0 && rows > capacity_) break;
  }
  return i;
}

void LeafSummer::sum(const Context& context, const int64_t* users, int64_t n, const LeafRows& out) noexcept {
  users_ = users;
  n_ = n;
  out_ = out;
  start_[0] = 0;
  for (int64_t i = 0; i < n; ++i) start_[i + 1] = start_[i] + in_.offsets.end(users[i]) - in_.offsets.start(users[i]);
  parallel_for(context, n, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) group_rows(i);
  });
  parallel_for(context, (start_[n] + kPiece - 1) / kPiece, [&](int64_t begin, int64_t end, int w) {
    each_user_part(begin * kPiece, end * kPiece,
                   [&](int64_t i, int64_t first, int64_t last) { sum_pieces(i, first, last, worker_[w]); });
  });
  parallel_for(context, n, [&](int64_t begin, int64_t end, int w) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t g = 0; g < leaves_[i]; ++g)
        if (pieces_of(i, g) > 1) write_leaf(i, g, worker_[w]);
  });
}

/// Calls part(i, first, last) for each user with rows in [begin, end) of all rows, first and last counted from its own
/// first row.
template <class Part>
void LeafSummer::each_user_part(int64_t begin, int64_t end, Part part) const noexcept {
  end = std::min(end, start_[n_]);
  for (int64_t i = std::upper_bound(start_, start_ + n_ + 1, begin) - start_ - 1; i < n_ && start_[i] < end; ++i) {
    const int64_t first = std::max(begin, start_[i]) - start_[i], last = std::min(end, start_[i + 1]) - start_[i];
    if (first < last) part(i, first, last);
  }
}

void LeafSummer::group_rows(int64_t i) noexcept {
  const int64_t first = in_.offsets.start(users_[i]), offset = start_[i], length = start_[i + 1] - offset;
  const bool wide = in_.weights && in_.weights.dtype == DType::int64;
  uint64_t* const votes = votes_ + offset;
  uint32_t* const narrow_votes = reinterpret_cast<uint32_t*>(votes);
  const int64_t voters = std::min(length, kMostVoters);
  wide ? row_votes(*book_, in_, first, voters, votes) : row_votes(*book_, in_, first, voters, narrow_votes);
  const auto votes_of = [&](int64_t row) {
    const int64_t at = row - first;
    return at >= voters ? 0 : wide ? static_cast<int64_t>(votes[at]) : int64_t{narrow_votes[at]};
  };
  int64_t n = 0;
  for (int64_t row = first; row < first + length; ++row) {
    const bool may_be_present = loader_.may_be_present(row);
    if (!may_be_present && !votes_of(row)) continue;
    leaf_[offset + n] = book_->leaf(loader_.codes_of(row));
    row_[offset + n++] = may_be_present ? row : ~row;
  }
  sort_by_leaf(i, n);
  // entries without the rows that only vote, and leaf_ by leaf, in place
  int64_t* const begin = begin_of(i);
  int64_t leaves = 0, kept = 0;
  for (int64_t e = offset; e < offset + n; ++e) {
    const uint64_t leaf = leaf_[e];
    if (leaves == 0 || leaf != leaf_[offset + leaves - 1]) {
      leaf_[offset + leaves] = leaf;
      max_bias_[offset + leaves] = -INFINITY;
      out_.votes[offset + leaves] = 0;
      begin[leaves++] = kept;
    }
    const int64_t row = row_[e] < 0 ? ~row_[e] : row_[e], g = offset + leaves - 1;
    out_.votes[g] += votes_of(row);
    if (row_[e] < 0) continue;
    max_bias_[g] = std::max(max_bias_[g], loader_.bias_of(row));
    row_[offset + kept++] = row;
  }
  begin[leaves] = kept;
  leaves_[i] = leaves;
}

/// Sorts the n entries of user i by leaf; entries of one leaf keep the order of their rows.
void LeafSummer::sort_by_leaf(int64_t i, int64_t n) noexcept {
  const uint64_t all_leaves = book_->body().stride[0] * static_cast<uint64_t>(book_->size(0));  // 0: 2^64
  const int64_t offset = start_[i];
  uint64_t *leaf = leaf_ + offset, *spare_leaf = spare_leaf_ + offset;
  int64_t *row = row_ + offset, *spare_row = spare_row_ + offset;
  radix_sort<true>(n, 0, bits_of(all_leaves - 1), leaf, spare_leaf, row, spare_row);
  if (leaf == leaf_ + offset) return;
  std::copy_n(leaf, n, spare_leaf);
  std::copy_n(row, n, spare_row);
}

/// Sums the pieces of a user's leaves that begin at its entries [begin, end). All pieces of a leaf but the last have
/// kPiece rows, and the last has fewer than 2 kPiece.
void LeafSummer::sum_pieces(int64_t i, int64_t begin, int64_t end, Worker& w) noexcept {
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
int64_t LeafSummer::find_origin(int64_t i, int64_t g, Worker& w) const noexcept {
  const int64_t* const first = begin_of(i);
  float norm;
  for (int64_t e = first[g]; e < first[g + 1]; ++e)
    if (loader_.load_x_unchecked(row_[start_[i] + e], w.origin, &norm)) return e;
  std::fill_n(w.origin, width_, 0.f);
  return -1;
}

void LeafSummer::sum_piece(int64_t i, int64_t g, int64_t p, Worker& w) noexcept {
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
      if (added++ == 0) {
        std::fill(x, x + width_, 0.f);
        std::fill(v, v + value_width_, 0.f);
      }
      if (e != origin) k_.add_row(width_, w.x, weight, x);  // its difference is zero
      loader_.add_v(row, weight, v, w.v);
    }
    sum.present += added;
    if (later && added) add_sums(x, v, sum);
  }
  if (sum.present) return;
  std::fill(sum.x, sum.x + width_, 0.f);
  std::fill(sum.v, sum.v + value_width_, 0.f);
}

void LeafSummer::add_sums(const float* x, const float* v, Sum& sum) const noexcept {
  k_.add_row(width_, x, 1.f, sum.x);
  k_.add_row(value_width_, v, 1.f, sum.v);
}

/// Merges the pieces of leaf g and writes its row: means, log of the total weight, and, about the origin of its sums,
/// E|x|^2 - |mean|^2.
void LeafSummer::write_leaf(int64_t i, int64_t g, Worker& w) noexcept {
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
  float *const x = out_.x + row * width_, *const v = out_.v + row * value_width_;
  const double inverse = sum.present ? 1 / sum.total_weight : 0;
  const auto mean = [&](int64_t width, const float* sums, float* means) {
    std::fill(means, means + width, 0.f);
    k_.add_row(width, sums, static_cast<float>(inverse), means);
  };
  mean(value_width_, sum.v, v);
  mean(width_, sum.x, x);
  const float square = k_.load_row(x, DType::float32, width_, w.x);
  if (pieces_of(i, g) > 1) find_origin(i, g, w);  // the worker may have summed another leaf since
  if (sum.present) k_.add_row(width_, w.origin, 1.f, x);
  if (k_.load_row(x, DType::float32, width_, w.x) > 0x1.fffff0p99f)  // rows are below 2^100, and so must their mean be
    k_.store_row(x, DType::float32, width_, w.x, 1 - 0x1p-20f);
  out_.bias[row] =
      sum.present ? static_cast<float>(double(max_bias_[row]) + std::log(sum.total_weight / scale)) : -INFINITY;
  out_.spread[row] =
      static_cast<float>(std::min(std::max(0.0, sum.squares * inverse - double(square)), double(FLT_MAX)));
  uint64_t leaf = leaf_[row];
  for (int l = 0, levels = book_->levels(); l < levels; ++l) {
    const uint64_t stride = book_->body().stride[l];
    out_.codes[row * levels + l] = static_cast<int32_t>(leaf / stride);
    leaf %= stride;
  }
}

size_t leaf_sums_workspace(const Context& context, const Codebook& book, const Histories& histories) noexcept {
  Arena arena;
  LeafSummer(&book, histories, width_of(&book, histories), workers_of(context)).carve(arena);
  arena.take<int64_t>(histories.offsets.users);
  return arena.used();
}

/// Writes each user's leaves at the offset of its rows, and those with a present behaviour or a vote to the front; with
/// ragged offsets those of all users together.
Status leaf_sums(const Context& context, const Codebook& book, const Histories& histories,
                 const LeafSums& out) noexcept {
  const int64_t users = histories.offsets.users;
  const bool ragged = out.offsets.ragged();
  int64_t kept = 0, offset = 0;
  LeafSummer leaves(&book, histories, out.x.shape[1], workers_of(context));
  Arena arena(context.workspace);
  leaves.carve(arena);
  int64_t* const order = arena.take<int64_t>(users);
  HISAC_TRY(arena.check("leaf_sums"));
  for (int64_t b = 0; b < users; ++b) order[b] = b;
  if (ragged) out.offsets.starts[0] = 0;
  for (int64_t first = 0, n; first < users; first += n) {
    n = leaves.users_that_fit(order + first, users - first);
    leaves.sum(context, order + first, n, rows_from(out, offset));
    for (int64_t i = 0; i < n; ++i) {
      if (!ragged) out.offsets.starts[first + i] = kept = offset + leaves.start(i);
      for (int64_t g = 0; g < leaves.leaves(i); ++g) {
        const LeafRows a = rows_from(out, offset + leaves.start(i) + g), b = rows_from(out, kept);
        if (!(*a.bias > -INFINITY) && *a.votes == 0) continue;
        ++kept;
        if (a.bias == b.bias) continue;
        std::copy_n(a.x, out.x.shape[1], b.x);  // an earlier row: they do not overlap
        std::copy_n(a.v, out.v.shape[1], b.v);
        std::copy_n(a.codes, out.codes.shape[1], b.codes);
        *b.bias = *a.bias;
        *b.spread = *a.spread;
        *b.votes = *a.votes;
      }
      out.offsets.ends[first + i] = kept;
    }
    offset += leaves.start(n);
  }
  return {};
}

}  // namespace hisac::cpu
