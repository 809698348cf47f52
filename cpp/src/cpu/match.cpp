// SPDX-License-Identifier: Apache-2.0
// Tree match. A worker takes a user: it finds the nodes of all its candidates, then writes the candidates in their
// order. The first candidate of a node gets the mean of its rows, the others a copy of that. Rows are added in runs of
// 64, and tiles of 2,048 rows merge in a fixed tree.
#include "cpu/match.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/checks.h"
#include "base/parallel.h"
#include "base/reduction_tree.h"
#include "codebook/body.h"
#include "cpu/rows.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

/// `by` where `less`, else 0, without a branch.
uint64_t step(bool less, uint64_t by) noexcept { return by & (0 - uint64_t{less}); }

}  // namespace

void MatchUser::carve(Arena& arena, const Codebook& book, const MatchInputs& in, int64_t* node,
                      int64_t* next) noexcept {
  levels_ = book.levels();
  for (int l = 0; l < book.levels(); ++l) {
    codes_[l] = static_cast<uint32_t>(book.size(l));
    stride_[l] = book.body().stride[l];
  }
  all_bits_ = bits_of(stride_[0] * codes_[0] - 1);
  node_ = node;
  next_ = next;
  bias_ = arena.take<float>(in.sums.longest + simd::kLanes);
  leaf_ = arena.take<uint64_t>(in.sums.longest);
  begin_ = arena.take<int64_t>(2 * in.sums.longest + 2);
  owner_ = arena.take<int64_t>(levels_, in.sums.longest);
}

bool MatchUser::leaf_of(const int32_t* code, uint64_t* leaf) const noexcept {
  const int64_t levels = levels_;
  bool ok = true;
  uint64_t found = 0;
  for (int64_t l = 0; l < levels; ++l) {
    ok &= static_cast<uint32_t>(code[l]) < codes_[l];
    found += static_cast<uint64_t>(code[l]) * stride_[l];
  }
  *leaf = found;
  return ok;
}

void MatchUser::load_sums(const Histories& sums) noexcept {
  const float* const bias = sums.bias ? sums.bias.data + start_ : nullptr;
  const int64_t levels = levels_;
  const int32_t* const codes = sums.codes.data + start_ * levels;
  for (int64_t s = 0; s < size_; ++s) bias_[s] = !bias ? 0.f : bias[s] - bias[s] == 0 ? bias[s] : -INFINITY;
  for (int64_t s = 0; s < size_; ++s) {
    if (leaf_of(codes + s * levels, &leaf_[s])) continue;
    leaf_[s] = s > 0 ? leaf_[s - 1] : 0;  // an absent one in the place of the one before
    bias_[s] = -INFINITY;
  }
  const int bits = std::min(bits_of(static_cast<uint64_t>(size_)), all_bits_);
  shift_ = std::min(all_bits_ - bits, 63);
  const int64_t buckets = int64_t{1} << bits;
  std::fill_n(begin_, buckets + 1, int64_t{0});
  for (int64_t s = 0; s < size_; ++s) begin_[(leaf_[s] >> shift_) + 1] = s + 1;
  int64_t most = 0;
  for (int64_t k = 0; k < buckets; ++k) {
    begin_[k + 1] = std::max(begin_[k + 1], begin_[k]);
    most = std::max(most, begin_[k + 1] - begin_[k]);
  }
  most_ = most ? uint64_t{1} << (bits_of(static_cast<uint64_t>(most)) - 1) : 0;
}

int64_t MatchUser::find(uint64_t leaf) const noexcept {
  const uint64_t size = static_cast<uint64_t>(size_);
  uint64_t at = static_cast<uint64_t>(begin_[leaf >> shift_]);
  for (uint64_t half = most_; half; half >>= 1) at += step(leaf_[std::min(at + half, size) - 1] < leaf, half);
  return static_cast<int64_t>(at);
}

void MatchUser::find_nodes(const MatchInputs& in, int64_t n) noexcept {
  int64_t* const node = node_ + n * levels_;
  std::fill_n(node, levels_, int64_t{-1});
  const int64_t row = in.ids ? in.ids[n] : n;
  if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(in.codes.shape[0])) return;
  const int32_t* const code = in.codes.data + row * levels_;
  uint64_t leaf;
  if (!leaf_of(code, &leaf)) return;
  leaf = 0;
  for (int64_t l = 0; l < levels_; ++l) {
    leaf += static_cast<uint64_t>(code[l]) * stride_[l];
    const int64_t at = find(leaf);
    node[l] = at < size_ && leaf_[at] - leaf < stride_[l] ? at : -1;
  }
}

void MatchUser::load(const MatchInputs& in, int64_t b) noexcept {
  start_ = in.sums.offsets.start(b);
  size_ = in.sums.offsets.end(b) - start_;
  const int64_t first = in.candidates.start(b), last = in.candidates.end(b);
  if (size_ == 0) return std::fill(node_ + first * levels_, node_ + last * levels_, int64_t{-1});
  load_sums(in.sums);
  for (int64_t n = first; n < last; ++n) find_nodes(in, n);
  std::fill_n(owner_, levels_ * size_, int64_t{-1});
  for (int64_t n = last; n-- > first;)  // so that a chain has ascending candidates
    for (int64_t l = 0; l < levels_; ++l) {
      const int64_t i = n * levels_ + l;
      if (node_[i] < 0) continue;
      int64_t& owner = owner_[l * size_ + node_[i]];
      if (next_) next_[i] = owner;
      owner = n;
    }
}

int64_t MatchUser::last(int64_t first, int64_t level) const noexcept {
  const uint64_t stride = stride_[level], begin = leaf_[first] - leaf_[first] % stride;
  int64_t last = first + 1;
  while (last < size_ && leaf_[last] - begin < stride) ++last;
  return last;
}

namespace {

struct Worker {
  MatchUser user;
  float *rows = nullptr, *run = nullptr;  // [kBlock, V] of another type than float32, [V]
  float** stack = nullptr;                // sums of tiles [V]
};

class Forward {
 public:
  Forward(const Context& context, const Codebook& book, const MatchInputs& in, const Match& out) noexcept
      : context_(context), book_(book), in_(in), out_(out), levels_(book.levels()), width_(in.sums.v.width) {}

  void carve(Arena& arena) noexcept {
    const Rows& v = in_.sums.v;
    int64_t* const node = arena.take<int64_t>(in_.size(), levels_);
    worker_ = arena.take_each<Worker>(workers_of(context_), [&](Worker& one) {
      one.user.carve(arena, book_, in_, node, nullptr);
      if (v.dtype != DType::float32) one.rows = arena.take<float>(simd::kBlock, width_);
      one.run = arena.take<float>(width_);
      one.stack = arena.take_each<float*>(fold_depth(tiles_of(in_.sums.longest)),
                                          [&](float*& sum) { sum = arena.take<float>(width_); });
    });
  }

  void run() noexcept {
    int64_t end = 0;
    for (int64_t b = 0; b < in_.candidates.users; ++b) {
      clear(end, in_.candidates.start(b));
      end = in_.candidates.end(b);
    }
    clear(end, in_.size());
    parallel_for(context_, in_.candidates.users, [&](int64_t begin, int64_t last, int w) {
      for (int64_t b = begin; b < last; ++b) user(b, worker_[w]);
    });
  }

 private:
  void user(int64_t b, Worker& w) noexcept {
    MatchUser& u = w.user;
    if (in_.candidates.start(b) == in_.candidates.end(b)) return;
    u.load(in_, b);
    for (int64_t n = in_.candidates.start(b); n < in_.candidates.end(b); ++n)
      for (int64_t l = 0; l < levels_; ++l) {
        const int64_t first = u.first(n, l), owner = first < 0 ? n : u.owner(first, l);
        if (owner != n) {
          std::memcpy(v_of(n, l), v_of(owner, l), bytes());
          lse_of(n, l) = lse_of(owner, l);
        } else if (first < 0 || !mean(first, u.last(first, l), v_of(n, l), &lse_of(n, l), w)) {
          std::memset(v_of(n, l), 0, bytes());
          lse_of(n, l) = -INFINITY;
        }
      }
  }

  /// Writes the v and lse of the sums [first, last); false where none is present.
  bool mean(int64_t first, int64_t last, std::byte* v, float* lse, Worker& w) noexcept {
    const float* const bias = w.user.bias(first);
    const std::byte* const rows =
        static_cast<const std::byte*>(in_.sums.v.data) + (w.user.start() + first) * static_cast<int64_t>(bytes());
    const float largest = k_.largest(last - first, bias);
    if (largest == -INFINITY) return false;
    if (last - first == 1) {
      std::memcpy(v, rows, bytes());
      *lse = largest;
      return true;
    }
    const int64_t n = last - first;
    const float scale = scale_of(n);
    double total = 0;
    fold(
        0, tiles_of(n), w.stack,
        [&](int64_t t, float* sum) {
          for (int64_t i = t * kTile; i < std::min((t + 1) * kTile, n); i += simd::kBlock) {
            const int count = static_cast<int>(std::min<int64_t>(simd::kBlock, n - i));
            float* const to = i == t * kTile ? sum : w.run;
            total +=
                double(k_.weigh_rows(count, width_, bias + i, largest, scale, run_of(rows, i, count, w), width_, to));
            if (to == w.run) k_.add_row(width_, w.run, 1.f, sum);
          }
        },
        [&](float* sum, const float* later) { k_.add_row(width_, later, 1.f, sum); });
    k_.store_row(v, in_.sums.v.dtype, width_, w.stack[0], static_cast<float>(1 / total));
    *lse = largest + std::log(static_cast<float>(total / double(scale)));
    return true;
  }

  /// `count` rows from the i-th on, as float32.
  const float* run_of(const std::byte* rows, int64_t i, int count, Worker& w) const noexcept {
    const std::byte* const source = rows + i * static_cast<int64_t>(bytes());
    if (!w.rows) return reinterpret_cast<const float*>(source);
    for (int j = 0; j < count; ++j)
      k_.load_row(source + j * static_cast<int64_t>(bytes()), in_.sums.v.dtype, width_, w.rows + j * width_);
    return w.rows;
  }

  /// Candidates [first, last) of no user.
  void clear(int64_t first, int64_t last) noexcept {
    if (first >= last) return;
    std::memset(v_of(first, 0), 0, static_cast<size_t>((last - first) * levels_) * bytes());
    std::fill(&lse_of(first, 0), &lse_of(first, 0) + (last - first) * levels_, -INFINITY);
  }

  size_t bytes() const noexcept { return static_cast<size_t>(width_ * bytes_of(in_.sums.v.dtype)); }
  std::byte* v_of(int64_t n, int64_t level) const noexcept {
    return static_cast<std::byte*>(out_.v.data) + (n * levels_ + level) * static_cast<int64_t>(bytes());
  }
  float& lse_of(int64_t n, int64_t level) const noexcept { return out_.lse.data[n * levels_ + level]; }

  const Context& context_;
  const Codebook& book_;
  const MatchInputs& in_;
  const Match& out_;
  const simd::Kernels& k_ = simd::kernels();
  int64_t levels_, width_;
  Worker* worker_ = nullptr;
};

}  // namespace

size_t match_workspace(const Context& context, const Codebook& book, const MatchInputs& inputs) noexcept {
  return workspace_of(Forward(context, book, inputs, {}));
}

Status match(const Context& context, const Codebook& book, const MatchInputs& inputs, const Match out) noexcept {
  return run_call("match", context, Forward(context, book, inputs, out));
}

}  // namespace hisac::cpu
