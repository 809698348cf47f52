// SPDX-License-Identifier: Apache-2.0
// `match` in four launches. The table of nodes is cleared; a thread finds the nodes of a candidate; a warp sums a node,
// or a block a long one; a warp copies a node to each other cell that has it.
//
// The limit is memory. With N candidates, L levels and V columns, the N L V cells are written once, those that share a
// node are read once too, and a sum is read once for each level on which a candidate asks for its node: the first time
// from memory, the other times mostly from the L2 cache. A cell takes 36 bytes of workspace, which are written and read
// once. A search reads the codes of 2 log2(S) sums on the first level and fewer below. There are two float64 operations
// for an element of v. One user of 500 candidates does not fill a GPU: its time is that of four launches.
#include "cuda/match_task.h"
#include "cuda/verbs.h"

namespace hisac::cuda {
namespace {

constexpr int kFewThreads = 64;  // of the blocks that search, so that a small batch has many

/// All clear the table; block 0 finds where the users' candidates have ended, whatever the offsets hold.
SIMT_KERNEL(kMatchThreads) prepare_table(SIMT_CONSTANT MatchTask t) {
  for (int64_t i = int64_t{simt::block()} * kMatchThreads + simt::thread(); i < 2 * t.cells;
       i += int64_t{simt::blocks()} * kMatchThreads) {
    t.key[i] = 0;
    if (t.asking) t.asking[i] = 0;
  }
  if (simt::block() != 0) return;
  int64_t ended = 0;
  for (int64_t first = 0; first < t.users; first += kMatchThreads) {
    const int64_t b = first + simt::thread(), end = b < t.users ? t.candidates.end(b) : 0;
    int64_t before = 0;
    SIMT_UNLESS_PLANTED(81, before = scan_threads(end, &ended, Larger{}));
    if (b < t.users) t.ended[b] = static_cast<int32_t>(before < end ? end : before);
  }
}

/// A thread has a candidate.
SIMT_KERNEL(kFewThreads) find_nodes(SIMT_CONSTANT MatchTask t) {
  for (int64_t n = int64_t{simt::block()} * kFewThreads + simt::thread(); n < t.candidates.rows;
       n += int64_t{simt::blocks()} * kFewThreads) {
    const int64_t user = t.user_of(n), row = row_in_table(t.ids, n, t.asked.shape[0]);
    const int32_t* const codes = t.asked.data + row * t.levels;
    const bool some = user >= 0 && row >= 0 && t.valid(codes);
    int64_t first = some ? t.start(user) : 0, last = some ? t.end(user) : 0;
    SIMT_ROLLED for (int l = 0; l < t.levels; ++l) {
      const int64_t cell = n * t.levels + l, end = last;
      if (first < end) {
        first = t.find(first, end, l, codes[l]);
        last = first;
        if (first < end && t.codes[first * t.levels + l] == codes[l]) last = t.find(first, end, l, codes[l] + 1);
      }
      t.node[cell] = {static_cast<int32_t>(first), static_cast<int32_t>(last)};
      t.place[cell] = -1;
      if (first >= last) continue;
      const uint64_t key = MatchTask::key_of(user, l, first);
      const int64_t place = t.probe(key, [&](int64_t at) {
        const uint64_t there = simt::atomic_claim(t.key + at, key);
        if (there == 0) t.owner[at] = static_cast<int32_t>(cell);
        return there == 0 || there == key;
      });
      t.place[cell] = static_cast<int32_t>(place);
      if (t.asking) simt::atomic_add(t.asking + place, 1);
    }
  }
}

/// By a warp: row `from` to row `to`, bit for bit.
SIMT_DEVICE void copy_row(const void* from, int64_t source, const MutableRows& to, int64_t target) {
  SIMT_ROLLED for (int64_t c = simt::lane(); c < to.width; c += 32) {
    const int64_t i = source * to.width + c, o = target * to.width + c;
    if (to.dtype == DType::float32)
      static_cast<uint32_t*>(to.data)[o] = static_cast<const uint32_t*>(from)[i];
    else
      static_cast<uint16_t*>(to.data)[o] = static_cast<const uint16_t*>(from)[i];
  }
}

template <bool kBlock>
SIMT_DEVICE void sum_node(const MatchTask& t, const Match& out, int64_t cell) {
  const Node node = t.node[cell];
  const NodeMean<kBlock> mean(t, node);
  const bool some = mean.largest > -kInfinity, single = node.last - node.first == 1;
  if (some && single) copy_row(t.v.data, node.first, out.v, cell);
  SIMT_ROLLED for (int64_t column = 0; column < t.v.width && !(some && single); column += kNodeColumns) {
    double v[2] = {};
    if (some) mean.at(column, v);
    SIMT_EACH (i, 2)
      if (const int64_t c = column + 32 * i + simt::lane(); c < t.v.width && mean.writes())
        store(out.v.data, out.v.dtype, cell * t.v.width + c, static_cast<float>(v[i]));
  }
  if (simt::lane() != 0 || !mean.writes()) return;
  const double log_total = some && !single ? kLn2 * static_cast<double>(simt::log2(static_cast<float>(mean.total))) : 0;
  out.lse.data[cell] = static_cast<float>(static_cast<double>(mean.largest) + log_total);
}

SIMT_KERNEL(kMatchThreads, 4) sum_nodes(SIMT_CONSTANT MatchTask t, SIMT_CONSTANT Match out) {
  each_owner(t, [&](int64_t cell, auto in_block) { sum_node<decltype(in_block)::value>(t, out, cell); });
}

/// A warp has a cell.
SIMT_KERNEL(kMatchThreads) copy_nodes(SIMT_CONSTANT MatchTask t, SIMT_CONSTANT Match out) {
  for (int64_t cell = int64_t{simt::block()} * kMatchWarps + simt::warp(); cell < t.cells;
       cell += int64_t{simt::blocks()} * kMatchWarps) {
    const int64_t place = t.place[cell], owner = place < 0 ? cell : t.owner[place];
    if (owner == cell) continue;
    copy_row(out.v.data, owner, out.v, cell);
    if (simt::lane() == 0) out.lse.data[cell] = out.lse.data[owner];
  }
}

int blocks_of(int64_t n, int each, int most) { return least((n + each - 1) / each, most); }

}  // namespace

Status check_match(const char* verb, const MatchInputs& in) {
  const int64_t users = in.candidates.users, sums = in.sums.v.rows, cells = in.size() * in.codes.shape[1];
  if (users <= 1 << 30 && sums < int64_t{1} << 31 && cells <= 1 << 30) return {};
  return Status::error(Code::not_implemented,
                       "%s: expected B up to 2^30, S below 2^31 and N L up to 2^30 on CUDA, got %" PRId64 ", %" PRId64
                       " and %" PRId64,
                       verb, users, sums, cells);
}

MatchTask match_task(const Codebook& book, const MatchInputs& in, bool gradients, Arena& arena) {
  MatchTask t;
  static_cast<Behaviours&>(t) = behaviours_of(&book, in.sums, 0);
  static_cast<Spans&>(t.candidates) = in.candidates;
  t.candidates.rows = in.size();
  t.asked = in.codes;
  t.ids = in.ids;
  t.cells = in.size() * book.levels();
  t.ended = arena.take<int32_t>(t.users);
  t.key = arena.take<uint64_t>(t.cells, 2);
  t.owner = arena.take<int32_t>(t.cells, 2);
  if (gradients) t.asking = arena.take<int32_t>(t.cells, 2);
  t.place = arena.take<int32_t>(t.cells);
  t.node = arena.take<Node>(t.cells);
  return t;
}

void launch_find_nodes(const MatchTask& t, Launcher& launch) {
  const int processors = launch.machine.processors;
  launch(prepare_table, 1 + blocks_of(2 * t.cells, kMatchThreads, processors * 8), kMatchThreads, kFront, t);
  launch(find_nodes, blocks_of(t.candidates.rows, kFewThreads, processors * 32), kFewThreads, 0, t);
}

size_t match_workspace(const Context&, const Codebook& book, const MatchInputs& inputs) noexcept {
  Arena arena;
  match_task(book, inputs, false, arena);
  return arena.used();
}

Status match(const Context& context, const Codebook& book, const MatchInputs& inputs, Match out) noexcept {
  HISAC_TRY(check_match("match", inputs));
  Arena arena(context.workspace);
  const MatchTask t = match_task(book, inputs, false, arena);
  HISAC_TRY(arena.check("match"));
  Launcher launch("match", context);
  HISAC_TRY(launch.status());
  const int blocks = blocks_of(t.cells, kMatchWarps, launch.machine.processors * 8);
  launch_find_nodes(t, launch);
  launch(sum_nodes, blocks, kMatchThreads, kNodeBytes, t, out);
  launch(copy_nodes, blocks, kMatchThreads, 0, t, out);
  return launch.status();
}

}  // namespace hisac::cuda
