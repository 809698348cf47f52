// SPDX-License-Identifier: Apache-2.0
// Sparse routing: which agents a behaviour is routed to, by its code of level 1 (RouteParams::sparse).
//
// The k nearest of a codeword's agents are found by float32 distances, from an origin among the prototypes. With |c|
// and |p| from there, such a distance errs by e = 1.2 (D + 24) u (|c| + |p|)^2 at most, and so does the k-th smallest
// of all, t. An agent below t - 2 e is one of the k, one above t + 2 e is none; those between are decided by the
// definition's own distances.
#pragma once
#include "base/arena.h"
#include "cpu/simd/kernels.h"
#include "hisac/route.h"

namespace hisac::cpu {

/// Whether a user of so many behaviours, of so many codes of level 1, and so many present agents is routed sparsely.
inline bool is_sparse(int64_t rows, int64_t groups, int64_t present, int64_t k) noexcept {
  using Wide = __int128;
  return k > 0 && present > k && Wide(rows) * (present - k) > Wide(groups) * (Wide(48) * k + present);
}

/// The lists of one user at a time.
class AgentLists {
 public:
  void carve(Arena& arena, int64_t agents, int64_t width) noexcept;

  /// Loads the agents of user b.
  void load(const Codebook& book, const RouteAgents& agents, int64_t b) noexcept;
  int64_t present() const noexcept { return present_; }
  const int32_t* index() const noexcept { return index_; }  // [present] the present agents

  /// Before the lists of n <= kBlock codes of level 1, which are numbered 0 .. n - 1 from then on.
  void measure(const int32_t* codes, int n) noexcept;

  /// The k present agents nearest to the codeword of code i, as agent_lists has them -> how many.
  int64_t nearest(int i, int64_t k, int32_t* out) noexcept;

  /// out [present] = 0 for the present agents to which behaviours of code i are routed, +inf for others; k < present().
  void find(int i, int64_t k, float* out) noexcept;

 private:
  struct Measured {
    double distance;
    int32_t agent;
  };

  /// out = the k < present() nearest to the codeword of code i, in any order.
  void find_nearest(int i, int64_t k, int32_t* out) noexcept;
  /// Sorts agents [0, n) by the definition's distance to the codeword of code i, as far as the first k.
  void sort(int i, int32_t* agents, int64_t n, int64_t k) noexcept;

  // A number is an agent's place among the present ones.
  const Codebook* book_ = nullptr;
  const RouteAgents* agents_ = nullptr;
  int64_t user_ = 0, seats_ = 0, present_ = 0;
  const int32_t* codes_ = nullptr;  // that were measured
  double largest_ = 0;              // |p| of present agents, from the origin
  int32_t* index_ = nullptr;        // [M] the agents of numbers
  int32_t* number_ = nullptr;       // [M] the numbers of agents; -1: absent
  int32_t* own_ = nullptr;          // [M] the own codes of numbers
  int32_t* found_ = nullptr;        // [M] numbers
  Measured* measured_ = nullptr;    // [M]
  float* origin_ = nullptr;         // [D]
  float* row_ = nullptr;            // [M, D] prototypes from the origin
  float* packed_ = nullptr;         // [D, M]
  float* norm_ = nullptr;           // [pad(M)]
  float* minus_one_ = nullptr;      // [pad(M)]
  float* codeword_ = nullptr;       // [kBlock, pad(D)] from the origin
  float* codeword_norm_ = nullptr;  // [kBlock]
  float* z_ = nullptr;              // [kBlock, pad(M)] distances in float32
};

}  // namespace hisac::cpu
