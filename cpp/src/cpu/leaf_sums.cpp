// SPDX-License-Identifier: Apache-2.0
#include "cpu/leaf_sums.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "base/checks.h"
#include "base/parallel.h"
#include "base/radix_sort.h"
#include "cpu/verbs.h"

namespace hisac::cpu {
namespace {

constexpr int64_t kRoom = 16384;  // rows of short histories summed together: enough for all workers, little memory
constexpr int64_t kRun = 64;      // rows added one by one
constexpr int64_t kAhead = 12;    // rows asked for before their turn

/// A power of two that keeps a sum of n weights, each at most 1, at most 1, and so a sum of large v finite.
float scale_of(int64_t n) noexcept {
  return 1.f / static_cast<float>(uint64_t{1} << bits_of(static_cast<uint64_t>(n - 1)));
}

LeafRows from(const LeafSums& out, int64_t row) noexcept {
  return {out.x.data + row * out.x.shape[1], out.v.data + row * out.v.shape[1], out.bias.data + row,
          out.spread.data + row, out.codes.data + row * out.codes.shape[1]};
}

}  // namespace

LeafSummer::LeafSummer(const RouteInputs& in, int64_t longest, int workers) noexcept
    : in_(in),
      loader_(in, Operands::floats),
      k_(simd::kernels()),
      width_(in.prototypes.shape[2]),
      value_width_(in.v.width),
      room_(longest > 0 ? std::max(longest, std::min(in.histories.users, kRoom / longest) * longest) : 0),
      workers_(workers) {}

LeafSummer::Sum LeafSummer::carve_sum(Arena& arena) const noexcept {
  Sum sum;
  sum.x = arena.take<float>(width_);
  sum.v = arena.take<float>(value_width_);
  return sum;
}

void LeafSummer::carve(Arena& arena) noexcept {
  const int64_t users = in_.histories.users;
  start_ = arena.take<int64_t>(users + 1);
  leaves_ = arena.take<int64_t>(users);
  for (uint64_t** a : {&leaf_, &spare_leaf_}) *a = arena.take<uint64_t>(room_);
  for (int64_t** a : {&row_, &spare_row_}) *a = arena.take<int64_t>(room_);
  begin_ = arena.take<int64_t>(room_ + users);
  top_ = arena.take<float>(room_);
  mass_ = arena.take<double>(room_);
  weight_ = arena.take<float>(room_);
  absent_ = arena.take<bool>(room_);
  const int64_t slots = room_ / kPiece + 1;
  slot_ = arena.take<Sum>(slots);
  for (int64_t s = 0; s < slots; ++s) {
    const Sum one = carve_sum(arena);
    if (slot_) slot_[s] = one;
  }
  worker_ = arena.take<Worker>(workers_);
  for (int w = 0; w < workers_; ++w) {
    Worker one;
    one.sum = carve_sum(arena);
    one.absent = arena.take<double>(value_width_);
    for (float** a : {&one.x, &one.run_x}) *a = arena.take<float>(width_);
    for (float** a : {&one.v, &one.run_v}) *a = arena.take<float>(value_width_);
    if (worker_) worker_[w] = one;
  }
}

int64_t LeafSummer::fit(const int64_t* users, int64_t n) const noexcept {
  int64_t rows = 0, i = 0;
  for (; i < n; ++i) {
    rows += in_.histories.end(users[i]) - in_.histories.start(users[i]);
    if (i > 0 && rows > room_) break;
  }
  return i;
}

void LeafSummer::sum(const Context& context, const int64_t* users, int64_t n, const LeafRows& out) noexcept {
  users_ = users;
  n_ = n;
  out_ = out;
  start_[0] = 0;
  for (int64_t i = 0; i < n; ++i)
    start_[i + 1] = start_[i] + in_.histories.end(users[i]) - in_.histories.start(users[i]);
  parallel_for(context, n, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) list(i);
  });
  parallel_for(context, (start_[n] + kPiece - 1) / kPiece, [&](int64_t begin, int64_t end, int w) {
    each_part(begin * kPiece, end * kPiece,
              [&](int64_t i, int64_t first, int64_t last) { add_pieces(i, first, last, worker_[w]); });
  });
  parallel_for(context, n, [&](int64_t begin, int64_t end, int w) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t g = 0; g < leaves_[i]; ++g)
        if (pieces_of(i, g) > 1) finish(i, g, worker_[w]);
  });
}

/// part(i, first, last) for the users in the rooms [begin, end).
template <class Part>
void LeafSummer::each_part(int64_t begin, int64_t end, Part part) const noexcept {
  end = std::min(end, start_[n_]);
  for (int64_t i = std::upper_bound(start_, start_ + n_ + 1, begin) - start_ - 1; i < n_ && start_[i] < end; ++i) {
    const int64_t first = std::max(begin, start_[i]) - start_[i], last = std::min(end, start_[i + 1]) - start_[i];
    if (first < last) part(i, first, last);
  }
}

void LeafSummer::list(int64_t i) noexcept {
  const int64_t first = in_.histories.start(users_[i]), room = start_[i], length = start_[i + 1] - room;
  int64_t n = 0;
  for (int64_t row = first; row < first + length; ++row) {
    absent_[room + row - first] = !loader_.may_be_present(row);
    if (absent_[room + row - first]) continue;
    leaf_[room + n] = in_.book->leaf(in_.codes.data + row * in_.codes.shape[1]);
    row_[room + n++] = row;
  }
  sort(i, n);
  int64_t* const begin = begin_of(i);
  int64_t leaves = 0;
  for (int64_t e = 0; e < n; ++e) {
    if (e == 0 || leaf_[room + e] != leaf_[room + e - 1]) {
      top_[room + leaves] = -INFINITY;
      begin[leaves++] = e;
    }
    float& top = top_[room + leaves - 1];
    top = std::max(top, loader_.bias_of(row_[room + e]));
  }
  begin[leaves] = n;
  leaves_[i] = leaves;
}

/// Stable: equal leaves keep the order of their rows.
void LeafSummer::sort(int64_t i, int64_t n) noexcept {
  int32_t last[kMaxLevels];
  for (int l = 0; l < in_.book->levels(); ++l) last[l] = static_cast<int32_t>(in_.book->size(l) - 1);
  const int64_t room = start_[i];
  uint64_t *leaf = leaf_ + room, *spare_leaf = spare_leaf_ + room;
  int64_t *row = row_ + room, *spare_row = spare_row_ + room;
  radix_sort<true>(n, 0, bits_of(in_.book->leaf(last)), leaf, spare_leaf, row, spare_row);
  if (leaf == leaf_ + room) return;
  std::copy_n(leaf, n, spare_leaf);
  std::copy_n(row, n, spare_row);
}

/// Those pieces of a user's leaves that begin at its entries [begin, end). All pieces of a leaf but the last have
/// kPiece rows, and the last has less than two.
void LeafSummer::add_pieces(int64_t i, int64_t begin, int64_t end, Worker& w) noexcept {
  const int64_t* const first = begin_of(i);
  for (int64_t g = std::upper_bound(first, first + leaves_[i], begin) - first - 1; g >= 0 && g < leaves_[i]; ++g) {
    if (first[g] >= end) break;
    const int64_t pieces = pieces_of(i, g);
    for (int64_t p = 0; p < pieces; ++p)
      if (const int64_t at = first[g] + p * kPiece; at >= begin && at < end) add_piece(i, g, p, w);
    if (pieces == 1 && first[g] >= begin) finish(i, g, w);
  }
}

void LeafSummer::add_piece(int64_t i, int64_t g, int64_t p, Worker& w) noexcept {
  const int64_t *const first = begin_of(i), pieces = pieces_of(i, g);
  const int64_t begin = first[g] + p * kPiece, end = p + 1 < pieces ? begin + kPiece : first[g + 1];
  const int64_t* const rows = row_ + start_[i];
  const float top = top_[start_[i] + g], scale = scale_of(first[g + 1] - first[g]);
  Sum& sum = sum_of(i, g, p, w);
  sum.present = 0;
  sum.mass = sum.squares = 0;
  for (int64_t run = begin; run < end; run += kRun) {
    const bool later = sum.present > 0;
    float *const x = later ? w.run_x : sum.x, *const v = later ? w.run_v : sum.v;
    int64_t here = 0;
    for (int64_t e = run; e < std::min(run + kRun, end); ++e) {
      const int64_t row = rows[e];
      float norm = 0;
      if (e + kAhead < first[leaves_[i]]) loader_.prefetch(rows[e + kAhead]);
      if (!loader_.load_listed_x(row, w.x, &norm)) {
        absent_[start_[i] + row - in_.histories.start(users_[i])] = true;
        weight_[start_[i] + e] = -1;
        continue;
      }
      const float weight = in_.bias ? scale * std::exp(loader_.bias_of(row) - top) : scale;
      weight_[start_[i] + e] = weight;
      sum.mass += double(weight);
      sum.squares += double(weight) * (double(norm) + double(loader_.spread_of(row)));
      if (here++ == 0) {
        std::fill(x, x + width_, 0.f);
        std::fill(v, v + value_width_, 0.f);
      }
      k_.add_row(width_, w.x, weight, x);
      loader_.add_v(row, weight, v, w.v);
    }
    sum.present += here;
    if (later && here) join(x, v, sum);
  }
  if (sum.present) return;
  std::fill(sum.x, sum.x + width_, 0.f);
  std::fill(sum.v, sum.v + value_width_, 0.f);
}

void LeafSummer::join(const float* x, const float* v, Sum& sum) const noexcept {
  k_.add_row(width_, x, 1.f, sum.x);
  k_.add_row(value_width_, v, 1.f, sum.v);
}

/// The pieces of leaf g meet; its row: means, log mass, and E|x|^2 - |mean|^2.
void LeafSummer::finish(int64_t i, int64_t g, Worker& w) noexcept {
  const int64_t *const first = begin_of(i), row = start_[i] + g, rows = first[g + 1] - first[g];
  Sum& sum = sum_of(i, g, 0, w);
  fold_all(pieces_of(i, g), &sum, [&](Sum& into, const Sum& from) {
    join(from.x, from.v, into);
    into.present += from.present;
    into.mass += from.mass;
    into.squares += from.squares;
  });
  const double scale = double(scale_of(rows));
  if (sum.present > 0 && sum.mass < scale / 2) {  // the row of the largest bias was absent: once more, below the next
    top_[row] = -INFINITY;
    for (int64_t e = start_[i] + first[g]; e < start_[i] + first[g + 1]; ++e)
      if (weight_[e] >= 0) top_[row] = std::max(top_[row], loader_.bias_of(row_[e]));
    for (int64_t p = 0; p < pieces_of(i, g); ++p) add_piece(i, g, p, w);
    return finish(i, g, w);
  }
  mass_[row] = sum.mass;
  float *const x = out_.x + row * width_, *const v = out_.v + row * value_width_;
  double inverse = sum.present ? 1 / sum.mass : 0;
  const auto mean = [&](int64_t width, const float* from, float* to) {
    std::fill(to, to + width, 0.f);
    k_.add_row(width, from, static_cast<float>(inverse), to);
  };
  mean(value_width_, sum.v, v);
  mean(width_, sum.x, x);
  float square = k_.load_row(x, DType::float32, width_, w.x);
  if (square > 0x1.fffff0p99f) {  // every row is below 2^100: rounding shall not take their mean there
    inverse *= 1 - 0x1p-20;
    mean(width_, sum.x, x);
    square = k_.load_row(x, DType::float32, width_, w.x);
  }
  out_.bias[row] = sum.present ? static_cast<float>(double(top_[row]) + std::log(sum.mass / scale)) : -INFINITY;
  out_.spread[row] =
      static_cast<float>(std::min(std::max(0.0, sum.squares * inverse - double(square)), double(FLT_MAX)));
  uint64_t leaf = leaf_[start_[i] + first[g]];
  for (int l = 0, levels = in_.book->levels(); out_.codes && l < levels; ++l) {
    const uint64_t stride = in_.book->body().stride[l];
    out_.codes[row * levels + l] = static_cast<int32_t>(leaf / stride);
    leaf %= stride;
  }
}

int64_t LeafSummer::absent(int64_t i, int worker, float* v) const noexcept {
  double* const sum = worker_[worker].absent;
  int64_t count = 0;
  std::fill(sum, sum + value_width_, 0.0);
  each_absent(i, [&](int64_t row) {
    if (!loader_.has_value(row, v)) return;
    for (int64_t d = 0; d < value_width_; ++d) sum[d] += double(v[d]);
    ++count;
  });
  for (int64_t d = 0; d < value_width_ && count; ++d) v[d] = static_cast<float>(sum[d] / double(count));
  return count;
}

void LeafInput::carve(Arena& arena, LeafSummer& leaves, const RouteInputs& in) noexcept {
  const int64_t room = leaves.room(), n = in.histories.users;
  leaves.carve(arena);
  sums.x = arena.take<float>(room * in.prototypes.shape[2]);
  sums.v = arena.take<float>(room * in.v.width);
  sums.bias = arena.take<float>(room);
  sums.spread = arena.take<float>(room);
  for (int64_t** a : {&users, &starts, &ends}) *a = arena.take<int64_t>(n);
  for (int64_t b = 0; users && ends && b < n; ++b) users[b] = b;
}

void LeafInput::load(const Context& context, LeafSummer& leaves, const int64_t* list, int64_t n,
                     RouteInputs* rows) noexcept {
  const int64_t room = leaves.room();
  leaves.sum(context, list, n, sums);
  for (int64_t i = 0; i < n; ++i) {
    starts[list[i]] = leaves.start(i);
    ends[list[i]] = leaves.start(i) + leaves.leaves(i);
  }
  rows->x = {sums.x, DType::float32, room, rows->prototypes.shape[2]};
  rows->v = {sums.v, DType::float32, room, rows->v.width};
  rows->bias = {sums.bias, {room}};
  rows->spread = {sums.spread, {room}};
  rows->histories = {starts, ends, DType::int64, rows->histories.users};
  rows->x_ids = rows->v_ids = {};
  rows->x_scale = {};
  rows->codes = {};
  rows->book = nullptr;
}

void LeafSummer::give_back(const Context& context, const float* d_leaf, float* out) const noexcept {
  parallel_for(context, (start_[n_] + kPiece - 1) / kPiece, [&](int64_t begin, int64_t end, int) {
    each_part(begin * kPiece, end * kPiece, [&](int64_t i, int64_t from, int64_t to) {
      const int64_t* const first = begin_of(i);
      int64_t g = std::upper_bound(first, first + leaves_[i], from) - first - 1;
      for (int64_t e = from; e < std::min(to, first[leaves_[i]]); ++e) {
        while (first[g + 1] <= e) ++g;
        const int64_t row = row_[start_[i] + e], leaf = start_[i] + g;
        const float weight = weight_[start_[i] + e];
        if (weight < 0) continue;
        const float share = static_cast<float>(double(weight) / mass_[leaf]);
        k_.add_row(value_width_, d_leaf + leaf * value_width_, share, out + row * value_width_);
      }
    });
  });
}

size_t leaf_sums_workspace(const Context& context, const RouteInputs& in, int64_t longest) noexcept {
  Arena arena;
  LeafSummer(in, longest, workers_of(context)).carve(arena);
  arena.take<int64_t>(in.histories.users);
  return arena.used();
}

/// First the users' leaves stand where their rows would, then they are moved together.
Status leaf_sums(const Context& context, const RouteInputs& in, const LeafSums& out) noexcept {
  const int64_t users = in.histories.users;
  int64_t done = 0, room = 0;
  LeafSummer leaves(in, longest_of(in.histories), workers_of(context));
  Arena arena(context.workspace);
  leaves.carve(arena);
  int64_t* const list = arena.take<int64_t>(users);
  HISAC_TRY(arena.check("leaf_sums"));
  for (int64_t b = 0; b < users; ++b) list[b] = b;
  out.offsets.data[0] = 0;
  for (int64_t first = 0, n; first < users; first += n) {
    n = leaves.fit(list + first, users - first);
    leaves.sum(context, list + first, n, from(out, room));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t g = 0; g < leaves.leaves(i); ++g) {
        const LeafRows a = from(out, room + leaves.start(i) + g), b = from(out, done);
        if (!(*a.bias > -INFINITY)) continue;
        ++done;
        if (a.bias == b.bias) continue;
        const auto move = [](auto* to, const auto* source, int64_t count) {
          std::memmove(to, source, sizeof(*to) * size_t(count));
        };
        move(b.x, a.x, out.x.shape[1]);
        move(b.v, a.v, out.v.shape[1]);
        move(b.bias, a.bias, 1);
        move(b.spread, a.spread, 1);
        move(b.codes, a.codes, out.codes.shape[1]);
      }
      out.offsets.data[first + i + 1] = done;
    }
    room += leaves.start(n);
  }
  return {};
}

}  // namespace hisac::cpu
