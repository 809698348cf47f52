// SPDX-License-Identifier: Apache-2.0
// Leaf sums. A user's leaves are written at the offset of its rows, so that users are independent of one another. First
// each user's rows are sorted by leaf. Then workers sum pieces of leaves, reading x and v once. Last the pieces of long
// leaves are merged. The bits are the same for any number of workers and whatever else is in the batch.
#pragma once
#include "cpu/histories.h"
#include "hisac/leaf_sums.h"

namespace hisac::cpu {

/// Rows of leaf sums; a leaf without a present behaviour has a bias of -inf.
struct LeafRows {
  float* x = nullptr;        // [capacity, D]
  float* v = nullptr;        // [capacity, V]
  float* bias = nullptr;     // [capacity]
  float* spread = nullptr;   // [capacity]
  int32_t* codes = nullptr;  // [capacity, L]
  int64_t* votes = nullptr;  // [capacity]
};

/// Sums the leaves of a list of users, whose histories have at most `capacity` rows together.
class LeafSummer {
 public:
  /// book: of the codes. width: D.
  LeafSummer(const Codebook* book, const Histories& in, int64_t width, int workers) noexcept;
  void carve(Arena& arena) noexcept;

  /// How many users from the start of the list fit into the capacity, at least 1.
  int64_t users_that_fit(const int64_t* users, int64_t n) const noexcept;
  void sum(const Context& context, const int64_t* users, int64_t n, const LeafRows& out) noexcept;

  /// Of the i-th user of the list: the offset of its rows and leaves, and the number of its leaves.
  int64_t start(int64_t i) const noexcept { return start_[i]; }
  int64_t leaves(int64_t i) const noexcept { return leaves_[i]; }

 private:
  static constexpr int64_t kPiece = 1024;  // rows of a leaf summed at a time
  struct Sum {
    int64_t present = 0;
    double total_weight = 0, squares = 0;  // squares: of weighted |x - origin|^2 and spreads
    float *x = nullptr, *v = nullptr;      // [D] of x - origin, [V]
  };
  struct Worker {
    Sum sum;
    float* origin = nullptr;  // [D] of the leaf that is summed
    float *x = nullptr, *v = nullptr, *run_x = nullptr, *run_v = nullptr;
  };

  int64_t* begin_of(int64_t i) const noexcept { return begin_ + start_[i] + i; }
  int64_t pieces_of(int64_t i, int64_t g) const noexcept {
    return std::max<int64_t>(1, (begin_of(i)[g + 1] - begin_of(i)[g]) / kPiece);
  }
  /// Where piece p of leaf g is summed. Pieces of long leaves have at least kPiece rows, so each has a slot of its own.
  Sum& sum_of(int64_t i, int64_t g, int64_t p, Worker& w) const noexcept {
    return pieces_of(i, g) > 1 ? piece_sum_[(start_[i] + begin_of(i)[g]) / kPiece + p] : w.sum;
  }

  void group_rows(int64_t i) noexcept;
  void sort_by_leaf(int64_t i, int64_t n) noexcept;
  template <class Part>
  void each_user_part(int64_t begin, int64_t end, Part part) const noexcept;
  int64_t find_origin(int64_t i, int64_t g, Worker& w) const noexcept;
  void sum_pieces(int64_t i, int64_t begin, int64_t end, Worker& w) noexcept;
  void sum_piece(int64_t i, int64_t g, int64_t p, Worker& w) noexcept;
  void add_sums(const float* x, const float* v, Sum& sum) const noexcept;
  void write_leaf(int64_t i, int64_t g, Worker& w) noexcept;

  const Codebook* book_;
  const Histories& in_;
  RowLoader loader_;
  const simd::Kernels& k_;
  int64_t width_, value_width_, capacity_;
  int workers_;
  const int64_t* users_ = nullptr;
  int64_t n_ = 0;
  LeafRows out_;
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

}  // namespace hisac::cpu
