// SPDX-License-Identifier: Apache-2.0
// Rows and agents into shared memory, for the inner kernel of `route`: any type, width and alignment, absence and norms
// end here; what follows sees bfloat16 operands, half norms and shifts. 16 lanes have a row. multiply_step multiplies
// the operands.
#pragma once
#include "cuda/device/product.h"
#include "cuda/route_task.h"

namespace hisac::cuda {

/// Q and S: the bfloat16 parts of an agent and of a row; MT: tiles of 16 agents a warp; R: rows of a step; kBack: the
/// geometry names buffers and whether values come too.
template <int MT, int Q, int S, int R = 64 / S, bool kBack = false>
struct RouteStream {
  static constexpr int kRows = R;

  SIMT_DEVICE explicit RouteStream(const Task& task) : t(task), g(task.g) {}

  /// Rows kept in one part for agents in two are bfloat16 already.
  SIMT_DEVICE DType x_type() const { return Q > S ? DType::bfloat16 : t.x.dtype; }
  SIMT_DEVICE DType value_type() const { return Q > S ? DType::bfloat16 : values().dtype; }
  SIMT_DEVICE bool has_x() const { return Q > S || t.x.data; }
  SIMT_DEVICE const float* scale() const { return Q > S ? nullptr : t.scale; }

  SIMT_DEVICE bool has_values() const { return !kBack || g.value_tiles > 0; }
  SIMT_DEVICE const Rows& values() const { return work().values.of_x ? t.x : t.v; }

  /// What the block has taken.
  struct Work {
    int64_t start;  // the user's first row; others count from it
    Unit unit;
    int32_t found, rows, agent_tile, value_tile;  // found: there was one; value_tile: the chunk, of rows' gradients
    ValueColumns values;
  };
  static_assert(sizeof(Work) <= kWorkBytes, "Work has its place");
  SIMT_DEVICE Work& work() const { return *reinterpret_cast<Work*>(simt::shared() + g.offset.work); }
  SIMT_DEVICE int unit_end() const { return least(int64_t{work().unit.last} * kTile, work().rows); }

  /// By one thread: the next item of the plan, that is a unit, a tile of agents and one of value columns.
  SIMT_DEVICE void take_item() const {
    Work& w = work();
    const int item = simt::atomic_add(&t.plan->next, 1), unit = item / t.items();
    w.found = unit < t.plan->units;
    if (!w.found) return;
    w.unit = t.unit[unit];
    w.start = t.start(w.unit.user);
    w.rows = static_cast<int32_t>(t.end(w.unit.user) - w.start);
    w.agent_tile = item % t.items() % g.agent_tiles;
    w.value_tile = item % t.items() / g.agent_tiles;
    w.values = t.value_columns(w.value_tile);
  }

  // in shared memory: from offsets that lie in constant memory, so that no register holds a pointer
  static SIMT_DEVICE float* floats(int offset) { return reinterpret_cast<float*>(simt::shared() + offset); }
  static SIMT_DEVICE uint16_t* halves(int offset) { return reinterpret_cast<uint16_t*>(simt::shared() + offset); }
  SIMT_DEVICE uint16_t* operand_x(int buffer) const { return halves(g.offset.x) + buffer * (S * kRows * g.pitch()); }
  SIMT_DEVICE uint16_t* operand_v(int buffer) const { return halves(g.offset.v) + buffer * (S * kRows * kValuePitch); }
  SIMT_DEVICE std::byte* raw_x(int buffer, int row) const {
    return simt::shared() + g.offset.raw_x + (buffer * kRows + row) * g.chunk * size_of(x_type());
  }
  SIMT_DEVICE std::byte* raw_v(int buffer, int row) const {
    return simt::shared() + g.offset.raw_v + (buffer * kRows + row) * kValues * size_of(value_type());
  }
  /// What is known of this thread's agent: 0: half its norm, 1: its rate.
  SIMT_DEVICE float agent(int what, int h, int r) const {
    return floats(g.offset.agents)[what * g.tile_agents + simt::warp() * 16 * MT + h * 16 + r * 8 + simt::lane() / 4];
  }
  /// A float of a row, in one of two buffers. offset: that of scale, bias, spread, half or shift.
  SIMT_DEVICE float& term_of(int offset, int buffer, int row) const { return floats(offset)[buffer * kRows + row]; }
  /// The code of level 1 of a row that is present, or -1; for sparse routing.
  SIMT_DEVICE int32_t& node_of(int buffer, int row) const {
    return reinterpret_cast<int32_t*>(simt::shared() + g.offset.node)[buffer * kRows + row];
  }
  SIMT_DEVICE int32_t* raw_codes(int buffer, int row) const {
    return reinterpret_cast<int32_t*>(simt::shared() + g.offset.codes) + (buffer * kRows + row) * t.levels;
  }

  /// The two words of an id of v, or else x; those of four blocks of rows are kept, see fetch.
  SIMT_DEVICE int32_t* raw_id(bool of_v, int block, int row) const {
    int slot = block & 1;
    SIMT_UNLESS_PLANTED(9, slot = block & 3);
    return reinterpret_cast<int32_t*>(simt::shared() + g.offset.ids) + ((slot * kRows + row) * 2 + of_v) * 2;
  }
  SIMT_DEVICE int place_of(int block, int row) const { return begin + block * kRows + row; }
  SIMT_DEVICE int64_t id(bool of_v, int block, int row) const {
    const int32_t* const word = raw_id(of_v, block, row);
    if ((of_v ? t.v_ids : t.x_ids).dtype != DType::int64) return word[0];
    return static_cast<int64_t>(static_cast<uint64_t>(word[1]) << 32 | static_cast<uint32_t>(word[0]));
  }
  /// Whether there is such a behaviour and it has a row of v, or else x; and which.
  SIMT_DEVICE bool has(bool of_v, int block, int row) const {
    const void* const ids = of_v ? t.v_ids.data : t.x_ids.data;
    return place_of(block, row) < end &&
           (!ids || static_cast<uint64_t>(id(of_v, block, row)) < static_cast<uint64_t>(of_v ? t.v.rows : t.x.rows));
  }
  SIMT_DEVICE int64_t row_of(bool of_v, int block, int row) const {
    return (of_v ? t.v_ids.data : t.x_ids.data) ? id(of_v, block, row) : work().start + place_of(block, row);
  }

  struct Step {
    int block = 0, chunk = 0;  // of rows, of columns
  };
  SIMT_DEVICE Step after(Step s) const {
    return s.chunk + 1 < g.chunks ? Step{s.block, s.chunk + 1} : Step{s.block + 1, 0};
  }
  SIMT_DEVICE int buffer_of(Step s) const { return (s.block * g.chunks + s.chunk) & ((kBack ? g.buffers : 2) - 1); }
  SIMT_DEVICE int columns(int chunk) const { return least(g.depth - chunk * g.chunk, g.chunk); }

  /// The agents' columns of a step's chunk: where D is one chunk, they stay. side: 0 for prototypes.
  SIMT_DEVICE Operand<Q> prototypes(Step s, int side = 0) const {
    const int pitch = g.pitch(), size = g.tile_agents * pitch;
    const int place = (g.chunks > 1 ? buffer_of(s) : 0) * sides() + side;
    return {halves(g.offset.prototypes) + place * (Q * size), pitch, size};
  }
  SIMT_DEVICE int sides() const { return kBack ? g.sides : 1; }

  /// y += the warp's agents times the rows of a step, by the columns of its chunk.
  SIMT_DEVICE void multiply_step(float (&y)[MT][kRows / 8][4], Step s, int side = 0) const {
    const Operand<S> rows{operand_x(buffer_of(s)), g.pitch(), kRows * g.pitch()};
    multiply_rows<MT>(y, prototypes(s, side).from(simt::warp() * 16 * MT, 0), rows, columns(s.chunk), kRows);
  }

  SIMT_DEVICE void fetch_agents(Step s, int agent_tile) {
    const int pieces = columns(s.chunk) / 8, lane = simt::lane() & 15, rows = sides() * Q * g.tile_agents;
    const uint16_t* const from =
        t.packed + (int64_t{work().unit.user} * g.agent_tiles + agent_tile) * rows * g.depth + s.chunk * g.chunk;
    SIMT_ROLLED for (int r = simt::thread() / 16; r < rows; r += simt::threads() / 16) {
      if (lane >= pieces) continue;
      simt::copy16(prototypes(s).data + r * g.pitch() + lane * 8, from + int64_t{r} * g.depth + lane * 8, true);
    }
  }

  /// Columns [first, first + n) of a row, raw; zero beyond the matrix.
  SIMT_DEVICE void fetch_row(std::byte* to, const Rows& m, bool aligned, int64_t row, int first, int n, bool valid,
                             int piece) {
    const int bytes = size_of(Q > S ? DType::bfloat16 : m.dtype), per = 16 / bytes;
    if (piece * per >= n) return;
    const int64_t column = first + piece * per;
    const std::byte* const from = static_cast<const std::byte*>(m.data) + (row * m.width + column) * bytes;
    if (aligned) {
      const bool inside = valid && column < m.width;
      simt::copy16(to + piece * 16, inside ? from : static_cast<const std::byte*>(m.data), inside);
      return;
    }
    for (int e = 0; e < per; ++e) {
      const bool inside = valid && column + e < m.width;
      if (bytes == 4)
        reinterpret_cast<float*>(to + piece * 16)[e] = inside ? reinterpret_cast<const float*>(from)[e] : 0.f;
      else if (bytes == 1)
        to[piece * 16 + e] = inside ? from[e] : std::byte{0};
      else
        reinterpret_cast<uint16_t*>(to + piece * 16)[e] =
            inside ? reinterpret_cast<const uint16_t*>(from)[e] : uint16_t{0};
    }
  }

  SIMT_DEVICE void fetch_ids(int block, int r) {
    const int place = place_of(block, r);
    if (place >= end) return;
    SIMT_ROLLED for (int of_v = 0; of_v < 2; ++of_v) {
      const Ids ids = of_v ? t.v_ids : t.x_ids;
      const int words = ids.dtype == DType::int64 ? 2 : 1;
      if (!ids.data) continue;
      const auto* const from = static_cast<const int32_t*>(ids.data) + (work().start + place) * words;
      simt::copy4(raw_id(of_v, block, r), from, true);
      if (words > 1) simt::copy4(raw_id(of_v, block, r) + 1, from + 1, true);
    }
  }

  /// Those ids that the first two steps of a sweep need; fetch asks for the others two blocks before their use.
  SIMT_DEVICE void fetch_first_ids() {
    if (!t.gathers()) return;
    SIMT_ROLLED for (int r = simt::thread(); r < 2 * kRows; r += simt::threads()) fetch_ids(r / kRows, r % kRows);
    simt::commit();
    SIMT_UNLESS_PLANTED(10, simt::template wait<0>());
    SIMT_UNLESS_PLANTED(11, simt::sync());
  }

  SIMT_DEVICE void fetch(Step s) {
    const int buffer = buffer_of(s), thread = simt::fresh_thread(), lane = thread & 15, x_bytes = size_of(x_type());
    const bool last = s.chunk + 1 == g.chunks, of_x = has_values() && work().values.of_x;
    const int x_pieces = has_x() ? columns(s.chunk) * x_bytes / 16 : 0,
              value_pieces = last && has_values() && (has_x() || !of_x) ? kValues * size_of(value_type()) / 16 : 0;
    SIMT_ROLLED for (int r = thread; r < kRows; r += simt::threads()) {
      if (t.gathers() && s.chunk == 0) fetch_ids(s.block + 2, r);
      const int place = place_of(s.block, r);
      const bool valid = place < end;
      const int64_t row = valid ? work().start + place : 0;
      if (t.levels && (last || !has_x())) {
        const bool coded = has(false, s.block, r);
        const int32_t* const codes = t.codes + (coded ? row_of(false, s.block, r) : 0) * t.levels;
        SIMT_ROLLED for (int l = 0; l < t.levels; ++l) simt::copy4(raw_codes(buffer, r) + l, codes + l, coded);
      }
      if (last && t.bias) simt::copy4(&term_of(g.offset.bias, buffer, r), t.bias + row, valid);
      if (last && t.spread) simt::copy4(&term_of(g.offset.spread, buffer, r), t.spread + row, valid);
      if (!scale()) continue;
      const bool has_row = has(false, s.block, r);
      simt::copy4(&term_of(g.offset.scale, buffer, r),
                  t.scale + (t.scale_per_row && has_row ? row_of(false, s.block, r) : 0), has_row);
    }
    SIMT_ROLLED for (int r = thread / 16; r < kRows; r += simt::threads() / 16) {
      const bool here = has(false, s.block, r), has_value = has(!of_x, s.block, r);
      const int64_t row = here ? row_of(false, s.block, r) : 0, value_row = has_value ? row_of(!of_x, s.block, r) : 0;
      SIMT_ROLLED for (int c = lane; c < x_pieces + value_pieces; c += 16) {
        if (c < x_pieces)
          fetch_row(raw_x(buffer, r), t.x, t.x_aligned, row, s.chunk * g.chunk, columns(s.chunk), here, c);
        else
          fetch_row(raw_v(buffer, r), values(), of_x ? t.x_aligned : t.v_aligned, value_row, work().values.first,
                    kValues, has_value, c - x_pieces);
      }
    }
  }

  /// Eight columns of a behaviour's x; raw: as they were fetched.
  SIMT_DEVICE void load_x(const std::byte* raw, int buffer, int row, int64_t column, float (&f)[8]) {
    if (!has_x()) return t.prototype8(raw_codes(buffer, row), column, f);
    load8(raw, x_type(), f);
    if (scale())
      SIMT_EACH (i, 8) f[i] *= term_of(g.offset.scale, buffer, row);
  }

  /// 16 lanes a row: raw to operands; with the last chunk the row's norm, shift and absence.
  SIMT_DEVICE void prepare(Step s) {
    const int buffer = buffer_of(s), thread = simt::fresh_thread(), lane = thread & 15, kind = s.block & 1;
    const bool last = s.chunk + 1 == g.chunks;
    SIMT_ROLLED for (int r = thread / 16; r < kRows; r += simt::threads() / 16) {
      float f[8], squares = 0;
      if (lane * 8 < columns(s.chunk)) {
        const std::byte* const raw = raw_x(buffer, r) + lane * 8 * size_of(x_type());
        load_x(raw, buffer, r, s.chunk * g.chunk + lane * 8, f);
        if (Q == 1)  // the norm of what is multiplied: small distances stay small
          SIMT_EACH (i, 8) f[i] = rounded(f[i]);
        SIMT_EACH (i, 8) squares = simt::fused(f[i], f[i], squares);
        put<false>(f, raw, true, operand_x(buffer) + r * g.pitch() + lane * 8, kRows * g.pitch());
      }
      for (int m = 8; m; m /= 2) squares += simt::shuffle_xor(squares, m);
      float& norm = floats(g.offset.norm)[r];
      if (s.chunk > 0) squares += norm;
      if (!last) {
        simt::sync_warp();
        if (lane == 0) norm = squares;
        continue;
      }
      const float bias = t.bias ? term_of(g.offset.bias, buffer, r) : 0.f,
                  spread = t.spread ? term_of(g.offset.spread, buffer, r) : 0.f;
      const auto x_element = [&](int64_t d) { return t.x_element(row_of(false, s.block, r), d); };
      const bool here = has(true, s.block, r) && has(false, s.block, r) && t.valid_terms(bias, spread) &&
                        t.valid(raw_codes(buffer, r)) && below_limit(squares, t.x.width, x_element);
      if (has_values() && lane < kValues / 8) {
        const std::byte* const raw = raw_v(buffer, r) + lane * 8 * size_of(value_type());
        if (work().values.of_x)
          load_x(raw, buffer, r, work().values.first + lane * 8, f);
        else
          load8(raw, value_type(), f);
        bool keep = true;  // a weight of 0 does not take NaN away
        SIMT_UNLESS_PLANTED(5, keep = here);
        put<true>(f, raw, keep, operand_v(buffer) + r * kValuePitch + lane * 8, kRows * kValuePitch);
      }
      if (lane == 0) {
        term_of(g.offset.half, kind, r) = here ? -0.5f * (squares + spread) : 0.f;
        term_of(g.offset.shift, kind, r) = here ? base2(bias) : -kInfinity;
        if (t.mask_words) node_of(kind, r) = here ? *raw_codes(buffer, r) : -1;
      }
    }
  }

  /// Eight floats, or else zeros, as S operands, `part_stride` elements from one to the next; raw: what they came from.
  template <bool any>
  SIMT_DEVICE void put(const float (&f)[8], const void* raw, bool keep, uint16_t* to, int part_stride) {
    simt::Quad high, low;
    if (Q > S) high = *static_cast<const simt::Quad*>(raw);
    SIMT_EACH (i, 4) {
      if (Q == S)
        high.word[i] = any ? bf16_parts_keeping_infinity(f[2 * i], f[2 * i + 1], &low.word[i])
                           : bf16_parts(f[2 * i], f[2 * i + 1], &low.word[i]);
      if (!keep) high.word[i] = low.word[i] = 0;
    }
    *reinterpret_cast<simt::Quad*>(to) = high;
    if (S > 1) *reinterpret_cast<simt::Quad*>(to + part_stride) = low;
  }

  const Task& t;
  const Geometry& g;
  int begin = 0, end = 0;  // the sweep's rows, from the user's first
};

}  // namespace hisac::cuda
