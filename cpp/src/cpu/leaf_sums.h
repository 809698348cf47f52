// SPDX-License-Identifier: Apache-2.0
// Leaf sums in rooms: a user's leaves stand where its rows would, so that users need not know of each other. First each
// user's rows are sorted by leaf; then pieces of a leaf are summed by whoever is free, reading x and v once; last the
// pieces of long leaves meet. The same bits for any number of workers and whatever else is in the batch.
#pragma once
#include "cpu/histories.h"
#include "hisac/leaf_sums.h"

namespace hisac::cpu {

/// Rows of leaf sums; a leaf without a present behaviour has a bias of -inf.
struct LeafRows {
  float* x = nullptr;        // [room, D]
  float* v = nullptr;        // [room, V]
  float* bias = nullptr;     // [room]
  float* spread = nullptr;   // [room]
  int32_t* codes = nullptr;  // [room, L], null: not wanted
};

/// Sums of a list of users at a time, at most `room` rows of them together.
class LeafSummer {
 public:
  LeafSummer(const RouteInputs& in, int64_t longest, int workers) noexcept;
  void carve(Arena& arena) noexcept;
  int64_t room() const noexcept { return room_; }

  /// How many users of the list have room, at least 1.
  int64_t fit(const int64_t* users, int64_t n) const noexcept;
  void sum(const Context& context, const int64_t* users, int64_t n, const LeafRows& out) noexcept;

  /// Of the i-th user of the list: where its room begins, and its leaves.
  int64_t start(int64_t i) const noexcept { return start_[i]; }
  int64_t leaves(int64_t i) const noexcept { return leaves_[i]; }
  /// v [V] = the mean v of its absent behaviours that have one, and how many these are.
  int64_t absent(int64_t i, int worker, float* v) const noexcept;

  /// out[row] += share of the row in its leaf times d_leaf [room, V]; histories may not overlap.
  void give_back(const Context& context, const float* d_leaf, float* out) const noexcept;
  /// visit(row) for its absent rows.
  template <class Visit>
  void each_absent(int64_t i, Visit visit) const noexcept {
    const int64_t first = in_.histories.start(users_[i]);
    for (int64_t at = start_[i]; at < start_[i + 1]; ++at)
      if (absent_[at]) visit(first + at - start_[i]);
  }

 private:
  static constexpr int64_t kPiece = 1024;  // rows of a leaf summed at a time; runs of 64 join its sum
  struct Sum {
    int64_t present = 0;
    double mass = 0, squares = 0;      // of weights; of weighted |x|^2 and spreads
    float *x = nullptr, *v = nullptr;  // [D], [V]
  };
  struct Worker {
    Sum sum;
    double* absent = nullptr;  // [V]
    float *x = nullptr, *v = nullptr, *run_x = nullptr, *run_v = nullptr;
  };

  int64_t* begin_of(int64_t i) const noexcept { return begin_ + start_[i] + i; }
  int64_t pieces_of(int64_t i, int64_t g) const noexcept {
    return std::max<int64_t>(1, (begin_of(i)[g + 1] - begin_of(i)[g]) / kPiece);
  }
  /// Where piece p of leaf g is summed. Pieces of long leaves have kPiece rows at least, so no two share a slot.
  Sum& sum_of(int64_t i, int64_t g, int64_t p, Worker& w) const noexcept {
    return pieces_of(i, g) > 1 ? slot_[(start_[i] + begin_of(i)[g]) / kPiece + p] : w.sum;
  }

  Sum carve_sum(Arena& arena) const noexcept;
  void list(int64_t i) noexcept;
  void sort(int64_t i, int64_t n) noexcept;
  template <class Part>
  void each_part(int64_t begin, int64_t end, Part part) const noexcept;
  void add_pieces(int64_t i, int64_t begin, int64_t end, Worker& w) noexcept;
  void add_piece(int64_t i, int64_t g, int64_t p, Worker& w) noexcept;
  void join(const float* x, const float* v, Sum& sum) const noexcept;
  void finish(int64_t i, int64_t g, Worker& w) noexcept;

  const RouteInputs& in_;
  RowLoader loader_;
  const simd::Kernels& k_;
  int64_t width_, value_width_, room_;
  int workers_;
  const int64_t* users_ = nullptr;
  int64_t n_ = 0;
  LeafRows out_;
  int64_t *start_ = nullptr, *leaves_ = nullptr;      // [B + 1], [B]
  uint64_t *leaf_ = nullptr, *spare_leaf_ = nullptr;  // [room] of an entry: a row that may be present, by leaf
  int64_t *row_ = nullptr, *spare_row_ = nullptr;     // [room] that row
  int64_t* begin_ = nullptr;                          // [room + B] where a leaf's entries begin, then where all end
  float* top_ = nullptr;                              // [room] a leaf's largest bias
  double* mass_ = nullptr;                            // [room] sum of its weights
  float* weight_ = nullptr;                           // [room] of an entry: scale e^(bias - top); -1: absent
  bool* absent_ = nullptr;                            // [room] of a row
  Sum* slot_ = nullptr;                               // [room / kPiece + 1] pieces of long leaves
  Worker* worker_ = nullptr;
};

/// Leaf sums as the rows of `route`, in the workspace.
struct LeafInput {
  LeafRows sums;
  int64_t *users = nullptr, *starts = nullptr, *ends = nullptr;  // [B]; users: 0 .. B - 1

  void carve(Arena& arena, LeafSummer& leaves, const RouteInputs& in) noexcept;
  /// The sums of these users in place of their behaviours.
  void load(const Context& context, LeafSummer& leaves, const int64_t* list, int64_t n, RouteInputs* rows) noexcept;
};

}  // namespace hisac::cpu
