// SPDX-License-Identifier: Apache-2.0
// A scalar emulation of the AMX unit: tile registers as plain memory, with the architecture's limits and arithmetic
// (the instructions' public description). What would fault there throws here. It counts configurations, loads, stores
// and dots.
#pragma once
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "cpu/simd/amx.h"
#include "cpu/simd/pack.h"

#include "cpu/simd/amx.inl"

namespace hisac::simd {
namespace {

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

struct EmulatedTiles {
  struct Fault : std::logic_error {
    using std::logic_error::logic_error;
  };
  struct Tile {
    int rows, bytes;
    unsigned char data[16][64];
  };
  struct State {
    bool configured;
    Tile tile[8];
    int64_t configures, releases, loads, stores, dots;
  };
  static State& state() {
    thread_local State s;
    return s;
  }

  static void require(bool good, const char* what) {
    if (!good) throw Fault(what);
  }

  static void configure(const TileConfig& c) {
    State& s = state();
    ++s.configures;
    require(c.palette == 1, "palettes other than 1 (0 is for tilerelease)");
    require(c.start_row == 0, "a restart, which nothing here needs");
    for (unsigned char b : c.reserved0) require(b == 0, "reserved bytes 2-15");
    for (uint16_t b : c.reserved1) require(b == 0, "reserved bytes 32-47");
    for (unsigned char b : c.reserved2) require(b == 0, "reserved bytes 56-63");
    for (int t = 0; t < 8; ++t) {
      require(c.rows[t] <= 16 && c.row_bytes[t] <= 64, "a tile larger than 16 x 64 bytes");
      require((c.rows[t] == 0) == (c.row_bytes[t] == 0), "a tile with rows or bytes alone");
    }
    for (int t = 0; t < 8; ++t) s.tile[t] = {c.rows[t], c.row_bytes[t], {}};
    s.configured = true;
  }

  static void release() {
    ++state().releases;
    state().configured = false;
    for (Tile& t : state().tile) t = {};
  }

  static Tile& at(int t) {
    require(state().configured, "a tile used before ldtilecfg or after tilerelease");
    require(state().tile[t].rows > 0, "a tile that is not configured");
    return state().tile[t];
  }

  template <int t>
  static void zero() {
    std::memset(at(t).data, 0, sizeof(Tile::data));
  }

  template <int t>
  static void load(const void* p, int64_t row_bytes) {
    Tile& tile = at(t);
    ++state().loads;
    std::memset(tile.data, 0, sizeof(Tile::data));
    for (int r = 0; r < tile.rows; ++r)
      std::memcpy(tile.data[r], static_cast<const char*>(p) + r * row_bytes, static_cast<size_t>(tile.bytes));
  }

  template <int t>
  static void store(void* p, int64_t row_bytes) {
    const Tile& tile = at(t);
    ++state().stores;
    for (int r = 0; r < tile.rows; ++r)
      std::memcpy(static_cast<char*>(p) + r * row_bytes, tile.data[r], static_cast<size_t>(tile.bytes));
  }

  /// Denormals are zero, in and out.
  static float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

  template <int c, int a, int b>
  static void dot() {
    static_assert(c != a && a != b && b != c, "three different tiles");
    static_assert(c >= 0 && c < 8 && a >= 0 && a < 8 && b >= 0 && b < 8);
    Tile& sum = at(c);
    const Tile &left = at(a), &right = at(b);
    ++state().dots;
    require(sum.bytes % 4 == 0 && left.bytes % 4 == 0 && right.bytes % 4 == 0, "a row that ends within an element");
    require(sum.rows == left.rows && sum.bytes == right.bytes && left.bytes / 4 == right.rows, "tiles that do not fit");
    for (int m = 0; m < sum.rows; ++m)
      for (int n = 0; n < sum.bytes / 4; ++n) {
        float chain[2] = {0, 0}, old;
        for (int k = 0; k < right.rows; ++k) {
          uint32_t x, y;
          std::memcpy(&x, left.data[m] + k * 4, 4);
          std::memcpy(&y, right.data[k] + n * 4, 4);
          chain[0] = flush(std::fma(flush(float_of(x << 16)), flush(float_of(y << 16)), chain[0]));
          chain[1] = flush(std::fma(flush(float_of(x & 0xffff0000u)), flush(float_of(y & 0xffff0000u)), chain[1]));
        }
        std::memcpy(&old, sum.data[m] + n * 4, 4);
        const float total = flush(flush(old) + flush(chain[0] + chain[1]));
        std::memcpy(sum.data[m] + n * 4, &total, 4);
      }
  }

  static void pack(int64_t k, int64_t m, const float* columns, int64_t ld, float* out) {
    kernels().pack_columns(k, m, columns, ld, out);
  }
};

}  // namespace
}  // namespace hisac::simd
