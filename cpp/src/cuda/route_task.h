// SPDX-License-Identifier: Apache-2.0
// What the kernels of `route` are told: arrays, the geometry of blocks, and the plan that they make for themselves.
//
// A user's rows form tiles of kTile rows whose states merge in the fixed tree of base/reduction_tree.h. A unit is an
// aligned power of two of a user's tiles, that is a subtree; a block takes units one after another, with one tile of
// agents and one of value columns. A user with several units is merged by a kernel of its own, with the same
// arithmetic, so how histories are cut changes no bit. The plan lies on the device, for only the device knows the
// offsets: nothing waits for the host.
#pragma once
#include "cuda/histories.h"

#ifndef HISAC_CUDA_TILE
#define HISAC_CUDA_TILE 2048  // as in base/reduction_tree.h; a test of many tiles takes small ones
#endif

namespace hisac::cuda {

constexpr int kTile = HISAC_CUDA_TILE;
constexpr int kValues = 64;  // value columns of a block
constexpr int kValuePitch = kValues + 8;
constexpr int kWorkBytes = 48;
constexpr int kMostStates = 24;  // of a tree: 2^24 tiles

struct Unit {
  int32_t user, first, last, slot;  // tiles [first, last); slot -1: the whole user
};
struct SharedUser {
  int32_t user, slot, count;
};
struct Plan {
  int32_t units, shared, next;  // next: the item to take
};

/// How a launch is laid out.
struct Geometry {
  int mt = 1, parts = 1, stored = 1;  // tiles of 16 agents a warp; bfloat16 parts of an agent and a weight, of a row
  int warps = 1;
  int depth = 0, chunk = 0, chunks = 0;  // D up to 16s; columns of a chunk; chunks
  int rows = 0;                          // of a step
  int buffers = 2;                       // of rows; 1 where other work comes between steps
  int sides = 1;                         // operands of an agent: its prototype, and the gradient of its mean x
  int tile_agents = 0, agent_tiles = 0;
  int v_tiles = 0, value_tiles = 0;  // of columns of v; of those and, behind them, of x
  int blocks = 0;                    // resident: the grid
  int workers = 0;                   // what the plan cuts for
  int levels = 0;                    // of a block's stack
  struct Offsets {                   // in shared memory
    int prototypes, x, v, raw_x, raw_v, ids, scale, bias, spread, codes, half, shift, node, norm, cross, row_lse,
        agents, work;
  } offset = {};
  size_t shared_bytes = 0;

  SIMT_BOTH int threads() const { return 32 * warps; }
  SIMT_BOTH int warps_of(int64_t agents) const { return least((agents + 16 * mt - 1) / (16 * mt), 1 << 20); }
  SIMT_BOTH int pitch() const { return chunk + 8; }  // elements; an odd number of 16 bytes, so that no bank conflicts
  /// Floats of a thread's state: max_logit and mass of an agent, the sums.
  SIMT_BOTH int state() const { return mt * (4 + kValues / 2); }
  SIMT_BOTH int64_t state_floats() const { return int64_t{state()} * threads(); }
};

/// Columns, up to 16s; tiles of value columns.
SIMT_BOTH int depth_of(int64_t width) { return static_cast<int>((width + 15) / 16 * 16); }
SIMT_BOTH int value_tiles_of(int64_t width) { return static_cast<int>((width + kValues - 1) / kValues); }

/// What values a block has: kValues columns of v or of x.
struct ValueColumns {
  int32_t of_x, first;
};

struct Task : Behaviours {
  bool x_aligned = false, v_aligned = false;  // rows of whole 16 bytes at 16
  int64_t agents = 0;
  const float* prototypes = nullptr;
  const int32_t* count = nullptr;
  const float* temperature = nullptr;
  bool per_agent = false;  // temperature [M]
  bool softmax_over_agents = false;
  int mask_words = 0;  // of agents, in a mask of sparse routing; 0: none
  Geometry g;
  // workspace
  Plan* plan = nullptr;
  Unit* unit = nullptr;                      // [B + 8 workers]
  SharedUser* shared = nullptr;              // [4 workers]
  uint16_t* packed = nullptr;                // [B, agent_tiles, sides, parts, tile_agents, depth]
  float *half = nullptr, *rate = nullptr;    // [B, agent_tiles * tile_agents] -|p|^2 / 2, 2 log2(e) / tau
  const uint32_t* masks = nullptr;           // [B, C_1, mask_words]
  float *stack = nullptr, *slots = nullptr;  // [blocks, levels], [8 workers, agent_tiles, value_tiles] states
  Tokens out;

  SIMT_DEVICE int64_t tiles(int64_t b) const { return (end(b) - start(b) + kTile - 1) / kTile; }
  SIMT_BOTH int items() const { return g.agent_tiles * g.value_tiles; }  // of a unit
  SIMT_DEVICE ValueColumns value_columns(int tile) const {
    const bool of_x = tile >= g.v_tiles;
    return {of_x, (of_x ? tile - g.v_tiles : tile) * kValues};
  }

  /// By a warp: what an agent's products take, in bfloat16 parts. element(d): of column d, zero past the last.
  template <class Element>
  SIMT_DEVICE void pack_row(int64_t user, int64_t agent, int side, Element element) const {
    const int64_t tile = (user * g.agent_tiles + agent / g.tile_agents) * g.sides + side;
    const int64_t row = tile * g.parts * g.tile_agents + agent % g.tile_agents;
    for (int d = 2 * simt::lane(); d < g.depth; d += 64) {
      uint32_t low, high = bf16_parts_keeping_infinity(element(d), element(d + 1), &low);
      auto* const to = reinterpret_cast<uint32_t*>(packed + row * g.depth + d);
      *to = high;
      if (g.parts > 1) to[int64_t{g.tile_agents} * g.depth / 2] = low;
    }
  }
};

/// The factors of an earlier and a later state that are added.
struct Merge {
  float max_logit, earlier, later;
  Merge() = default;
  SIMT_DEVICE Merge(float a, float b) : max_logit(larger(a, b)), earlier(1), later(0) {
    if (max_logit == -kInfinity) return;
    earlier = simt::exp2(a - max_logit);
    later = simt::exp2(b - max_logit);
  }
  SIMT_DEVICE float sum(float a, float b) const { return simt::fused(a, earlier, b * later); }
};

/// One agent's results: nothing of an agent past the last, no columns that are not wanted.
struct Row {
  const Task& t;
  int64_t row, columns;
  bool here, of_x;
  float max_logit, mass, scale;
  SIMT_DEVICE Row(const Task& task, bool values_of_x, int64_t user, int64_t agent, float maximum, float total)
      : t(task),
        row(user * t.agents + agent),
        columns(values_of_x ? t.out.mean_x.data ? t.x.width : 0 : t.v.width),
        here(agent < t.agents),
        of_x(values_of_x),
        max_logit(maximum),
        mass(total),
        scale(maximum == -kInfinity ? 0.f : 1.f / total) {}
  SIMT_DEVICE void finish() const {
    const double sum = static_cast<double>(max_logit) + static_cast<double>(simt::log2(mass));
    if (here) t.out.lse.data[row] = max_logit == -kInfinity ? -kInfinity : static_cast<float>(sum * kLn2);
  }
  SIMT_DEVICE void put(int64_t column, float a, float b) const {
    put(column, a);
    put(column + 1, b);
  }

 private:
  SIMT_DEVICE void put(int64_t column, float sum) const {
    if (!here || column >= columns) return;
    void* const out = of_x ? t.out.mean_x.data : t.out.tokens.data;
    const DType type = of_x ? DType::float32 : t.out.tokens.dtype;
    store(out, type, row * columns + column, max_logit == -kInfinity ? 0.f : sum * scale);
  }
};

}  // namespace hisac::cuda
